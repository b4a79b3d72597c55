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

Q4 and Q6 quantize a second time what Q2 and Q1 quantized (double quantization), so that dX and dW are unbiased
estimates of the straight-through gradient of the quantized forward pass: E[dX] = dY Q2(W), E[dW] = dY^T Q1(X).

Every operand comes with its reduction axis last, so each matmul is `a @ b.T` of two row-major matrices; Q4 and Q6 read
the packed codes that the forward pass kept. An E2M1 value times a power of two is exact in bf16 and, with one power of
two taken out of the whole tensor, in FP8: multiplying such operands, accumulated in fp32, is multiplying the codes.
`matmul.py` decides between the two. A group whose scale is too small for FP8 underflows: it becomes zero and is
counted.

Shape suffixes: N tokens (all leading axes folded), D input channels, C output channels, R rows of either operand and L
elements in a row, B bytes of codes, G groups.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .formats import Fp8, Rounding
from .matmul import Matmul, has_fp8, matmul_dtype, multiply, output_dtype, underflow_counters
from .mx import backend_for
from .philox import fresh_keys
from .recipe import Quantizer, Recipe, layer_for
from .reference import Operand, Packed
from .shards import local

Q_EMA_START = 10
"""From this update of the moving average on, Q-EMA decides the roundings (paper Algorithm 1)."""


class WeightCache(Protocol):
    """Keeps the operand Q2(W) of one layer between forward passes; `weight_cache.py` implements it.

    `how` is everything beside the layer's own tensors that the operand depends on.
    """

    def get(self, *how):
        """The operand that `put` was given with the same `how`, or None if the weight has changed since."""

    def put(self, made, *how) -> None:
        """Keep `made`, which follows from `how` and the present weight."""


@dataclass(frozen=True)
class _Plan:
    """The recipe and the arithmetic of the three matmuls, which do not depend on the tensors' values."""

    recipe: Recipe
    dtype: torch.dtype
    """The dtype of operands that are not in FP8."""
    fp8: bool
    """If true, the operands of a matmul are FP8 numbers, provided that both are quantized."""
    underflowed: Tensor | None = field(default=None, compare=False)
    """int64 [1], which counts the groups that underflow in FP8; None without FP8."""

    def fp8_of(self, first: Quantizer, second: Quantizer) -> tuple[Fp8, Fp8] | tuple[None, None]:
        """The FP8 formats of a matmul's two operands, or (None, None) if either of them is not quantized.

        Numbers that no quantizer made are not exact in FP8.
        Gradients and, in the forward pass, activations come first: their scales span more binades than those of
        weights.
        """
        return (Fp8.E5M2, Fp8.E4M3) if self.fp8 and first.enabled and second.enabled else (None, None)


@dataclass(frozen=True)
class _Kept:
    """How X or W is stored for the backward pass: as packed codes or as it came, with or without its amax.

    The forward pass keeps codes and scales where double quantization reads them, 4.25 bits a value, else the tensor as
    it came; and the amax if the backward matmul is in FP8.
    """

    quantizer: Quantizer
    length: int
    packed: bool
    has_amax: bool

    def read(self, saved: list[Tensor]) -> tuple[Tensor | Packed, Tensor | None]:
        """Takes its tensors from the front of `saved`."""
        source = saved.pop(0)
        if self.packed:
            source = Packed(source, saved.pop(0), self.length, self.quantizer)
        return source, saved.pop(0) if self.has_amax else None


def _forward_operand(
    x_RL: Tensor,
    q: Quantizer,
    plan: _Plan,
    fp8: Fp8 | None,
    keep_amax: bool,
    keep_packed: bool,
    key: Tensor | None = None,
    ema_RL: Tensor | None = None,
    ema_active: Tensor | None = None,
) -> tuple[Operand, _Kept, tuple[Tensor, ...]]:
    """Q1 or Q2: the operand of the forward matmul, and what the backward pass keeps."""
    backend = backend_for(x_RL, plan.dtype)
    amax = backend.largest_magnitude(x_RL) if keep_amax or fp8 is not None else None
    kept = _Kept(q, x_RL.shape[1], keep_packed and q.enabled, keep_amax)
    if not q.enabled:
        return Operand(x_RL.to(plan.dtype)), kept, (x_RL, amax) if keep_amax else (x_RL,)
    values_RL, codes_RB, scales_RG, operand_scale = backend.quantize(
        x_RL,
        q if ema_RL is None else replace(q, rounding=Rounding.EMA),
        key=key,
        ema_RL=ema_RL,
        ema_active=ema_active,
        values_dtype=plan.dtype if fp8 is None else None,
        fp8=fp8,
        largest=amax,
        lost=plan.underflowed,
        pack=keep_packed,
    )
    tensors = (codes_RB, scales_RG) if keep_packed else (x_RL,)
    return Operand(values_RL, operand_scale), kept, (*tensors, amax) if keep_amax else tensors


def _backward_operands(
    source: Tensor | Packed,
    rows: Quantizer | None,
    columns: Quantizer | None,
    key: Tensor,
    plan: _Plan,
    fp8: Fp8 | None,
    amax: Tensor | None,
    with_sum: bool = False,
) -> tuple[Operand | None, Operand | None, Tensor | None]:
    """Q3 and Q5, or Q4, or Q6: operands from the rows and from the columns of `source` [R, L], and its column sums.

    The operand of the rows is [R, L], that of the columns [L, R]. Each of the three is None if it was not asked for.
    """
    operands = [None, None]
    dense = None
    for i, q in enumerate((rows, columns)):
        if q is not None and not q.enabled:
            if dense is None:
                dense = _dense(source, plan.dtype)
            operands[i] = Operand((dense if i == 0 else dense.T).to(plan.dtype))
    rows, columns = (q if q is not None and q.enabled else None for q in (rows, columns))
    total = None
    if rows is not None or columns is not None:
        tensor = source.codes_RB if isinstance(source, Packed) else source
        *quantized, total = backend_for(tensor, plan.dtype).quantize_both(
            source,
            rows,
            columns,
            key=key,
            dtype=plan.dtype,
            fp8=fp8,
            largest=amax,
            lost=plan.underflowed,
            with_sum=with_sum,
        )
        operands = [q if q is not None else o for q, o in zip(quantized, operands)]
    elif with_sum:
        total = _dense(source, plan.dtype).sum(dim=0, dtype=torch.float32)
    return *operands, total


def _gradient_operands(
    dy_NC: Tensor,
    plan: _Plan,
    needs: tuple[bool, bool, bool],
    key: Tensor,
) -> tuple[Operand | None, Operand | None, Tensor | None]:
    """Q3(dY) [N, C], Q5(dY) transposed to [C, N], and the fp32 column sums [C] for db, each None where not needed.

    `needs` tells which of dX, dW and db are. One pass over dY makes all three, unless one of the two matmuls is in FP8
    and the other is not, because its second operand is not quantized. Q3 and Q5 share the draws of `key`: dX needs Q3
    to be independent of Q4, and dW needs Q5 to be independent of Q6, but no product holds both Q3 and Q5.
    """
    recipe, (needs_dx, needs_dw, needs_db) = plan.recipe, needs
    q3, q5 = recipe.q3 if needs_dx else None, recipe.q5 if needs_dw else None
    dx_fp8, _ = plan.fp8_of(recipe.q3, recipe.q4)
    dw_fp8, _ = plan.fp8_of(recipe.q5, recipe.q6)
    amax = None
    if (q3 is not None and dx_fp8) or (q5 is not None and dw_fp8):
        amax = backend_for(dy_NC).largest_magnitude(dy_NC)
    if q3 is None or q5 is None or dx_fp8 is dw_fp8:
        fp8 = dx_fp8 if q3 is not None else dw_fp8
        return _backward_operands(dy_NC, q3, q5, key, plan, fp8, amax, needs_db)
    dy_rows_NC, _, _ = _backward_operands(dy_NC, q3, None, key, plan, dx_fp8, amax)
    _, dy_columns_CN, db_C = _backward_operands(dy_NC, None, q5, key, plan, dw_fp8, amax, needs_db)
    return dy_rows_NC, dy_columns_CN, db_C


def _dense(source: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    if isinstance(source, Tensor):
        return source
    codes_RB, scales_RG, length, q = source
    return backend_for(codes_RB, dtype).dequantize(codes_RB, scales_RG, length, q.element, dtype)


class _MXLinear(torch.autograd.Function):
    """The three matmuls of the layer, in three kinds of arithmetic.

    Under autocast and for bf16 input, operands are bf16, or, with FP8, E5M2 and E4M3 numbers over one power of two per
    tensor. For other fp32 input they are fp32, and float64 for float64. Sums are accumulated in fp32 (float64 for
    float64).
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight_CD: Tensor,
        bias_C: Tensor | None,
        ema_CD: Tensor | None,
        ema_active: Tensor | None,
        underflowed: Tensor | None,
        underflowed_backward: Tensor | None,
        recipe: Recipe,
        use_fp8: bool,
        save: bool,
        cache: WeightCache | None,
    ) -> Tensor:
        """Y = Q1(X) Q2(W)^T + b, in the dtype that `nn.Linear` would return.

        With `use_fp8`, `underflowed` counts the groups that underflow here. `underflowed_backward` is not read; it only
        receives the backward pass's count (see `backward`). `save` keeps what the backward pass needs.
        """
        dtype = matmul_dtype(x)
        plan = _Plan(recipe, dtype, use_fp8 and dtype == torch.bfloat16, underflowed)
        q1, q2 = recipe.q1, recipe.q2
        x_ND = x.reshape(-1, x.shape[-1])
        keys = (None, None)
        if Rounding.STOCHASTIC in (q1.rounding, q2.rounding):
            keys = fresh_keys(2, x.device)
        x_fp8, w_fp8 = plan.fp8_of(q1, q2)
        keep_x_amax = save and plan.fp8_of(recipe.q5, recipe.q6)[0] is not None
        keep_w_amax = save and plan.fp8_of(recipe.q3, recipe.q4)[0] is not None
        pack = recipe.double and save
        x_operand_ND, kept_x, saved_x = _forward_operand(x_ND, q1, plan, x_fp8, keep_x_amax, pack, keys[0])
        how = plan, w_fp8, keep_w_amax, pack
        made = cache.get(*how) if cache is not None else None
        if made is None:
            made = _forward_operand(weight_CD, q2, *how, keys[1], ema_CD, ema_active)
            if cache is not None:
                cache.put(made, *how)
        w_operand_CD, kept_w, saved_w = made
        # Y [N, C] = Q1(X) [N, D] @ Q2(W) [C, D].T + b [C]. Operands: bf16 x bf16, E5M2 x E4M3 or fp32 x fp32.
        # Result: bf16 under autocast, else the dtype of X.
        y_NC = multiply(x_operand_ND, w_operand_CD, output_dtype(x), bias_C)

        # Codes and scales are tensors of the graph like any other, so activation checkpointing and saved-tensor hooks
        # see them.
        ctx.save_for_backward(*(*saved_x, *saved_w) if save else ())
        ctx.plan, ctx.kept_x, ctx.kept_w = plan, kept_x, kept_w
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight_CD.dtype
        ctx.bias_dtype = None if bias_C is None else bias_C.dtype
        # A view of y_NC would be protected from users who add to the result in place, as some models of timm do. No one
        # else holds y_NC, so the result may pass for a tensor of its own.
        return torch.ops.aten._unsafe_view(y_NC, (*x.shape[:-1], weight_CD.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        """dX = Q3(dY) Q4(Q2(W)), dW = Q5(dY)^T Q6(Q1(X)) and db, in the dtypes of X, W and b, as far as needed.

        The number of underflowed groups is returned as the gradient of the input `underflowed_backward`. A compiled
        backward pass cannot add to a buffer, but autograd adds the gradient that it returns to the tensor's `.grad`,
        where `take_lost_groups` reads it. The tensor takes no part in Y, so it has no other gradient.
        """
        dy_NC = dy.reshape(-1, dy.shape[-1])
        underflowed = torch.zeros(1, dtype=torch.int64, device=dy.device) if ctx.plan.fp8 else None
        plan = replace(ctx.plan, underflowed=underflowed)
        recipe = plan.recipe
        saved = list(ctx.saved_tensors)  # read once, because checkpointing recomputes the forward pass for it
        x_source, x_amax = ctx.kept_x.read(saved)
        w_source, w_amax = ctx.kept_w.read(saved)
        # The keys are new for every layer, tensor and backward pass, so micro-batches and ranks round independently.
        key_dy, key_w, key_x = fresh_keys(3, dy.device).split(1)
        needs_dx, needs_dw, has_bias_gradient = ctx.needs_input_grad[:3]
        needs_db = ctx.bias_dtype is not None and has_bias_gradient
        dy_rows_NC, dy_columns_CN, db_C = _gradient_operands(dy_NC, plan, (needs_dx, needs_dw, needs_db), key_dy)
        dx = dw_CD = None
        if needs_dx:
            _, w_fp8 = plan.fp8_of(recipe.q3, recipe.q4)
            _, w_operand_DC, _ = _backward_operands(w_source, None, recipe.q4, key_w, plan, w_fp8, w_amax)
            # dX [N, D] = Q3(dY) [N, C] @ Q4(Q2(W)) [D, C].T. Operands: bf16 x bf16, E5M2 x E4M3 or fp32 x fp32.
            # Result: the dtype of X.
            dx = multiply(dy_rows_NC, w_operand_DC, ctx.x_dtype).reshape(ctx.x_shape)
        if needs_dw:
            _, x_fp8 = plan.fp8_of(recipe.q5, recipe.q6)
            _, x_operand_DN, _ = _backward_operands(x_source, None, recipe.q6, key_x, plan, x_fp8, x_amax)
            # dW [C, D] = Q5(dY)^T [C, N] @ Q6(Q1(X)) [D, N].T. Operands: bf16 x bf16, E5M2 x E4M3 or fp32 x fp32.
            # Result: the dtype of W, which is fp32 for a master weight.
            dw_CD = multiply(dy_columns_CN, x_operand_DN, ctx.weight_dtype)
        db_C = db_C.to(ctx.bias_dtype) if needs_db else None
        # Input 6 is `underflowed_backward`.
        count = underflowed.to(torch.float32) if plan.fp8 and ctx.needs_input_grad[6] else None
        return dx, dw_CD, db_C, None, None, None, count, None, None, None, None


@layer_for(Recipe)
class QuantLinear(nn.Linear):
    """A drop-in for `nn.Linear` whose matmuls run in MX by `recipe`, which is TetraJet's if none is given.

    `weight` and `bias` are the fp32 master parameters under their usual names. With Q-EMA the layer also owns
    `weight_ema` (fp32, the shape of `weight`) and `ema_updates` (int64 scalar), which `QEma` advances; a checkpoint
    without them, such as a stock DeiT's, loads and starts the average at the loaded weight.

    Raises TypeError for a recipe of another class.
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
        if not isinstance(recipe, Recipe):
            raise TypeError(f"QuantLinear needs a Recipe, got {recipe!r}; RECIPES holds the named ones")
        self.use_q_ema = recipe.q_ema_beta is not None
        """Off during Q-Ramping's detection, which studies plain rounding."""
        self.high_precision = False
        """Multiply X and W themselves, as `nn.Linear` does; the recipe stays for when it is off again (healing)."""
        self.weight_cache: WeightCache | None = None
        """Keeps Q2(W) between forward passes within `weights_quantized_once`."""
        self._matmul = Matmul.AUTO
        if self.use_q_ema:
            self._register_ema()
        self._make_counters()

    @property
    def matmul(self) -> Matmul:
        """The arithmetic of the matmuls under bf16: speed, not results. `set_matmul` sets it for a whole model."""
        return self._matmul

    @matmul.setter
    def matmul(self, matmul: Matmul | str) -> None:
        self._matmul = Matmul(matmul)
        self._make_counters()

    @property
    def _uses_fp8(self) -> bool:
        return self._matmul is Matmul.FP8 or (self._matmul is Matmul.AUTO and has_fp8(self.weight.device))

    def _make_counters(self) -> None:
        """Make the counters of this device before the forward pass, because a graph of torch.compile cannot."""
        if self._uses_fp8 and not self.weight.is_meta:
            underflow_counters(self.weight.device)

    def _apply(self, fn, recurse: bool = True) -> QuantLinear:
        average = getattr(self, "weight_ema", None)
        moved = super()._apply(fn, recurse)
        if (
            average is not None and self.weight_ema.dtype != average.dtype
        ):  # after `model.half()`, which it must not follow
            self.weight_ema = average.to(self.weight_ema.device)
        self._make_counters()
        return moved

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe) -> QuantLinear:
        """Make a layer that shares the parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", recipe=recipe)
        layer.weight, layer.bias = linear.weight, linear.bias
        if layer.use_q_ema:
            layer._register_ema()
        layer._make_counters()
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
        # The comparison stays on the device, so asking if the average is in use never costs a synchronisation.
        return (self.weight_ema, self.ema_updates >= Q_EMA_START) if self.use_q_ema else (None, None)

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            raise TypeError(f"QuantLinear needs a floating-point tensor, got {input.dtype}")
        if input.shape[-1] != self.in_features:
            raise ValueError(f"the last axis must have {self.in_features} channels, got {tuple(input.shape)}")
        if self.high_precision:
            return super().forward(input)
        use_fp8 = self._uses_fp8
        underflowed, underflowed_backward = underflow_counters(input.device) if use_fp8 else (None, None)
        trains = input.requires_grad or self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return _MXLinear.apply(
            input,
            self.weight,
            self.bias,
            *self._ema_arguments(),
            underflowed,
            # This tensor requires a gradient, so passing it would make the output of a frozen layer require one, too.
            underflowed_backward if trains else None,
            self.recipe,
            use_fp8,
            torch.is_grad_enabled(),
            # A compiled graph contains the quantization of the weight.
            None if torch.compiler.is_compiling() else self.weight_cache,
        )

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """Q2(W) in fp32, [C, D], by the quantizer that the forward pass uses; W itself where Q2 is off.

        It holds this process's rows if the weight is sharded.
        """
        q2 = self.recipe.q2
        key = fresh_keys(1, self.weight.device) if q2.rounding is Rounding.STOCHASTIC else None
        ema_CD, ema_active = self._ema_arguments()
        ema_CD = None if ema_CD is None else local(ema_CD)
        plan = _Plan(self.recipe, torch.float32, fp8=False)
        operand, _, _ = _forward_operand(local(self.weight), q2, plan, None, False, False, key, ema_CD, ema_active)
        return operand.values_RL.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        weight = state_dict.get(prefix + "weight")
        if self.recipe.q_ema_beta is not None and weight is not None and prefix + "weight_ema" not in state_dict:
            state_dict[prefix + "weight_ema"] = weight.detach().to(torch.float32, copy=True)
            state_dict[prefix + "ema_updates"] = torch.zeros((), dtype=torch.int64, device=weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._make_counters()  # with assign=True a layer on the meta device becomes one of a real device

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe.describe()}"


_MOVED = {
    "BLOCK_LINEARS": "swap",
    "plain_weight_linears": "swap",
    "quant_linears": "swap",
    "set_matmul": "swap",
    "swap_linears": "swap",
    "weights_quantized_once": "weight_cache",
}


def __getattr__(name: str) -> object:
    """Names that were once defined here can still be imported from here in this release, with a DeprecationWarning."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_MOVED[name]}", __package__)
    warnings.warn(
        f"{__name__}.{name} will be removed in the next release; import {name} from {module.__name__}",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(module, name)
