"""The linear layer in MXFP4, forward and backward (paper section 3.3).

Three matmuls, six quantizers. Each quantizer's groups of 32 lie along the reduction axis of the matmul that reads
its result:

    Y  = Q1(X) Q2(W)^T + b              Eq. 3    reduces over D
    dX = Q3(dY) Q4(Q2(W))               Eq. 4    reduces over C
    dW = Q5(dY)^T Q6(Q1(X))             Eq. 5    reduces over N
    db = sum of dY over N, unquantized, in fp32

    Q1  X      1x32 along D   nearest         Q4  Q2(W)  32x1 along C   stochastic
    Q2  W      1x32 along D   nearest, Q-EMA  Q5  dY     32x1 along N   stochastic
    Q3  dY     1x32 along C   stochastic      Q6  Q1(X)  32x1 along N   stochastic

Q4 and Q6 quantize what the forward pass used a second time (double quantization), so that dX and dW are unbiased
estimates of the straight-through gradient of the quantized forward pass: E[dX] = dY Q2(W), E[dW] = dY^T Q1(X).

Every operand comes with its reduction axis last, so each matmul is `a @ b.T` of two row-major matrices. An E2M1
value times a power of two is exact in bf16, hence multiplying the dequantized operands there, accumulated in fp32,
is multiplying the codes.

Shape suffixes: N tokens (all leading axes folded), D input channels, C output channels, B bytes of codes, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .formats import Rounding
from .mx import backend_for
from .philox import fresh_keys
from .recipe import Quantizer, Recipe

BLOCK_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The linears of a transformer block, the layers that the paper quantizes."""

Q_EMA_START = 10
"""Q-EMA decides roundings from this update of the moving average on (paper Algorithm 1)."""


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """bf16 for bf16 input or under autocast, else fp32. fp16 lacks the exponent range of MX scales."""
    if x.dtype == torch.float64:  # which autocast leaves alone
        return torch.float64
    if torch.is_autocast_enabled(x.device.type) or x.dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.float32


def _output_dtype(x: Tensor) -> torch.dtype:
    """What `nn.Linear` would return."""
    device_type = x.device.type
    if x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def _forward_operand(
    x_RL: Tensor,
    q: Quantizer,
    dtype: torch.dtype,
    key: Tensor | None = None,
    pack: bool = False,
    ema_RL: Tensor | None = None,
    ema_active: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Q1 or Q2: the operand of the forward matmul in `dtype`, and what the backward pass keeps of it: codes and
    scales if `pack` asks for them, else the operand as it came."""
    if not q.enabled:
        return x_RL.to(dtype), (x_RL,)
    values_RL, codes_RB, scales_RG = backend_for(x_RL, dtype).quantize(
        x_RL,
        q.element,
        q.scaling,
        q.rounding if ema_RL is None else Rounding.EMA,
        key=key,
        ema_RL=ema_RL,
        ema_active=ema_active,
        values_dtype=dtype,
        pack=pack,
    )
    return values_RL, (codes_RB, scales_RG) if pack else (x_RL,)


def _backward_operand(x_RL: Tensor, q: Quantizer, key: Tensor, dtype: torch.dtype) -> Tensor:
    """Q3, Q4, Q5 or Q6: the operand of a backward matmul, [R, L] in `dtype`, quantized along the rows of `x_RL`."""
    if not q.enabled:
        return x_RL.to(dtype)
    backend = backend_for(x_RL, dtype)
    return backend.quantize(x_RL, q.element, q.scaling, q.rounding, key=key, values_dtype=dtype, pack=False).values_RL


def _read(saved: tuple[Tensor, ...], q: Quantizer, length: int, dtype: torch.dtype) -> Tensor:
    """What the forward pass saved of an operand: packed codes and scales, or the operand itself."""
    if len(saved) == 1:
        return saved[0]
    codes_RB, scales_RG = saved
    return backend_for(codes_RB, dtype).dequantize(codes_RB, scales_RG, length, q.element, dtype)


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`. On a GPU the fp32 accumulator reaches an fp32 gradient without a detour through bf16."""
    if a.is_cuda and a.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


class _MXLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight_CD: Tensor,
        bias_C: Tensor | None,
        ema_CD: Tensor | None,
        ema_active: Tensor | None,
        recipe: Recipe,
        save: bool,
    ) -> Tensor:
        q1, q2, dtype = recipe.q1, recipe.q2, _matmul_dtype(x)
        x_ND = x.reshape(-1, x.shape[-1])
        keys = (None, None)
        if Rounding.STOCHASTIC in (q1.rounding, q2.rounding):
            keys = fresh_keys(2, x.device)
        pack = recipe.double and save
        x_operand_ND, saved_x = _forward_operand(x_ND, q1, dtype, keys[0], pack)
        w_operand_CD, saved_w = _forward_operand(weight_CD, q2, dtype, keys[1], pack, ema_CD, ema_active)
        y_NC = F.linear(x_operand_ND, w_operand_CD, None if bias_C is None else bias_C.to(dtype))

        if not save:
            saved_x = saved_w = ()
        # Codes and scales are 4.25 bits a value. They are tensors of the graph like any other, so activation
        # checkpointing and saved-tensor hooks see them.
        ctx.save_for_backward(*saved_x, *saved_w)
        ctx.num_saved_x = len(saved_x)
        ctx.recipe, ctx.matmul_dtype = recipe, dtype
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight_CD.dtype
        ctx.bias_dtype = None if bias_C is None else bias_C.dtype
        return y_NC.to(_output_dtype(x)).reshape(*x.shape[:-1], weight_CD.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        recipe, dtype = ctx.recipe, ctx.matmul_dtype
        saved = ctx.saved_tensors  # read once: checkpointing recomputes the forward pass for it
        saved_x, saved_w = saved[: ctx.num_saved_x], saved[ctx.num_saved_x :]
        num_in = ctx.x_shape[-1]
        dy_NC = dy.reshape(-1, dy.shape[-1])
        # Fresh for every layer, operand and backward pass: micro-batches and ranks round independently.
        key3, key4, key5, key6 = fresh_keys(4, dy.device)

        dx = dw_CD = db_C = None
        if ctx.needs_input_grad[0]:
            dy_operand_NC = _backward_operand(dy_NC, recipe.q3, key3, dtype)
            w_CD = _read(saved_w, recipe.q2, num_in, dtype)
            w_operand_DC = _backward_operand(w_CD.T, recipe.q4, key4, dtype)
            dx = _matmul(dy_operand_NC, w_operand_DC.T, ctx.x_dtype).reshape(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            dy_operand_CN = _backward_operand(dy_NC.T, recipe.q5, key5, dtype)
            x_ND = _read(saved_x, recipe.q1, num_in, dtype)
            x_operand_DN = _backward_operand(x_ND.T, recipe.q6, key6, dtype)
            dw_CD = _matmul(dy_operand_CN, x_operand_DN.T, ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            db_C = dy_NC.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw_CD, db_C, None, None, None, None


class QuantLinear(nn.Linear):
    """Drop-in for `nn.Linear` whose matmuls run in MX by `recipe`, TetraJet's if none is given.

    `weight` and `bias` are the fp32 master parameters under their usual names. With Q-EMA the layer also owns
    `weight_ema` (fp32, the shape of `weight`) and `ema_updates` (int64 scalar), which `QEma` advances; a checkpoint
    without them, such as a stock DeiT's, loads and starts the average at the loaded weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe = Recipe() if recipe is None else recipe
        self.use_q_ema = recipe.q_ema_beta is not None
        """Off during Q-Ramping's detection, which studies plain rounding."""
        if self.use_q_ema:
            self._register_ema()

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe) -> QuantLinear:
        """A layer that shares the parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", recipe=recipe)
        layer.weight, layer.bias = linear.weight, linear.bias
        if layer.use_q_ema:
            layer._register_ema()
        return layer.train(linear.training)

    def _register_ema(self) -> None:
        self.register_buffer("weight_ema", self.weight.detach().to(torch.float32, copy=True))
        self.register_buffer("ema_updates", torch.zeros((), dtype=torch.int64, device=self.weight.device))

    @torch.no_grad()
    def reset_ema(self) -> None:
        """Start the moving average anew at the present weight."""
        self.weight_ema.copy_(self.weight)
        self.ema_updates.zero_()

    def _ema_arguments(self) -> tuple[Tensor | None, Tensor | None]:
        # The comparison stays on the device: whether the average is in use never costs a synchronisation.
        return (self.weight_ema, self.ema_updates >= Q_EMA_START) if self.use_q_ema else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"QuantLinear needs a floating-point tensor, got {x.dtype}")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the last axis must have {self.in_features} channels, got {tuple(x.shape)}")
        return _MXLinear.apply(x, self.weight, self.bias, *self._ema_arguments(), self.recipe, torch.is_grad_enabled())

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """Q2(W) in fp32, [C, D], by the quantizer that the forward pass uses; W itself where Q2 is off."""
        q2 = self.recipe.q2
        key = fresh_keys(1, self.weight.device) if q2.rounding is Rounding.STOCHASTIC else None
        ema_CD, ema_active = self._ema_arguments()
        return _forward_operand(self.weight, q2, torch.float32, key, ema_RL=ema_CD, ema_active=ema_active)[0].detach()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        weight = state_dict.get(prefix + "weight")
        if self.recipe.q_ema_beta is not None and weight is not None and prefix + "weight_ema" not in state_dict:
            state_dict[prefix + "weight_ema"] = weight.detach().to(torch.float32, copy=True)
            state_dict[prefix + "ema_updates"] = torch.zeros_like(self.ema_updates)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe.describe()}"


def swap_linears(model: nn.Module, recipe: Recipe, names: Sequence[str] = BLOCK_LINEARS) -> nn.Module:
    """Replace, in place, every `nn.Linear` whose qualified name ends in one of `names`; parameters are shared.

    A recipe that quantizes nothing leaves the model as it is. Returns `model`. Raises ValueError if no layer matches.
    """
    if not recipe.quantizes:
        return model
    names = (names,) if isinstance(names, str) else names
    endings = tuple("." + name for name in names)
    found = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and ("." + name).endswith(endings)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer named {', '.join(names)}; pass other names")
    replacements = {module: QuantLinear.from_linear(module, recipe) for module in map(model.get_submodule, found)}
    for name in found:
        parent, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, leaf, replacements[getattr(parent, leaf)])
    return model


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized linears of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
