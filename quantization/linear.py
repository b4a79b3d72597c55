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

Every operand comes with its reduction axis last, so each matmul is `a @ b.T` of two row-major matrices; Q4 and Q6 read
the packed codes that the forward pass kept. An E2M1 value times a power of two is exact in bf16 and, with one power of
two taken out of the whole tensor, in FP8: multiplying such operands, accumulated in fp32, is multiplying the codes.
`matmul.py` says which it is.

Shape suffixes: N tokens (all leading axes folded), D input channels, C output channels, B bytes of codes, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .baselines.int4 import Int4Linear
from .formats import Fp8, Rounding
from .matmul import Matmul, has_fp8, lost_counters, matmul_dtype, multiply, output_dtype
from .mx import backend_for
from .philox import fresh_keys
from .recipe import Int4Recipe, Quantizer, Recipe
from .reference import Operand, Packed
from .shards import is_sharded, local

BLOCK_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The linears of a transformer block, the layers that the paper quantizes."""

Q_EMA_START = 10
"""Q-EMA decides roundings from this update of the moving average on (paper Algorithm 1)."""


@dataclass(frozen=True)
class _Plan:
    """What does not depend on the numbers: the recipe, and the arithmetic of the three matmuls."""

    recipe: Recipe
    dtype: torch.dtype
    fp8: bool
    lost: Tensor | None = field(default=None, compare=False)
    """Where groups out of FP8's range are counted."""

    def fp8_of(self, first: Quantizer, second: Quantizer) -> tuple[Fp8, Fp8] | tuple[None, None]:
        """FP8 formats of a matmul's operands: only what both quantizers have made fits. Gradients and, in the forward
        pass, activations come first, since their scales span more binades than those of weights."""
        return (Fp8.E5M2, Fp8.E4M3) if self.fp8 and first.enabled and second.enabled else (None, None)


@dataclass(frozen=True)
class _Kept:
    """What the forward pass keeps of X or of W, as positions in the tensors saved for the backward pass.

    Codes and scales where double quantization reads them, 4.25 bits a value, else the tensor as it came; and the
    largest magnitude for FP8.
    """

    quantizer: Quantizer
    length: int
    packed: bool
    has_largest: bool

    def read(self, saved: list[Tensor]) -> tuple[Tensor | Packed, Tensor | None]:
        """Takes its tensors from the front of `saved`."""
        source = saved.pop(0)
        if self.packed:
            source = Packed(source, saved.pop(0), self.length, self.quantizer)
        return source, saved.pop(0) if self.has_largest else None


def _forward_operand(
    x_RL: Tensor,
    q: Quantizer,
    plan: _Plan,
    fp8: Fp8 | None,
    keep_largest: bool,
    keep_packed: bool,
    key: Tensor | None = None,
    ema_RL: Tensor | None = None,
    ema_active: Tensor | None = None,
) -> tuple[Operand, _Kept, tuple[Tensor, ...]]:
    """Q1 or Q2: the operand of the forward matmul, and what the backward pass keeps."""
    backend = backend_for(x_RL, plan.dtype)
    largest = backend.largest_magnitude(x_RL) if keep_largest or fp8 is not None else None
    kept = _Kept(q, x_RL.shape[1], keep_packed and q.enabled, keep_largest)
    if not q.enabled:
        return Operand(x_RL.to(plan.dtype)), kept, (x_RL, largest) if keep_largest else (x_RL,)
    values_RL, codes_RB, scales_RG, operand_scale = backend.quantize(
        x_RL,
        q.element,
        q.scaling,
        q.rounding if ema_RL is None else Rounding.EMA,
        key=key,
        ema_RL=ema_RL,
        ema_active=ema_active,
        values_dtype=plan.dtype if fp8 is None else None,
        fp8=fp8,
        largest=largest,
        lost=plan.lost,
        pack=keep_packed,
    )
    tensors = (codes_RB, scales_RG) if keep_packed else (x_RL,)
    return Operand(values_RL, operand_scale), kept, (*tensors, largest) if keep_largest else tensors


def _backward_operands(
    source: Tensor | Packed,
    rows: Quantizer | None,
    columns: Quantizer | None,
    keys: tuple[Tensor | None, Tensor | None],
    plan: _Plan,
    fp8: Fp8 | None,
    largest: Tensor | None,
    with_sum: bool = False,
) -> tuple[Operand | None, Operand | None, Tensor | None]:
    """Q3 and Q5, or Q4, or Q6: operands from the rows and the columns of `source`; None where not asked for."""
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
            keys=keys,
            dtype=plan.dtype,
            fp8=fp8,
            largest=largest,
            lost=plan.lost,
            with_sum=with_sum,
        )
        operands = [q if q is not None else o for q, o in zip(quantized, operands)]
    elif with_sum:
        total = _dense(source, plan.dtype).sum(dim=0, dtype=torch.float32)
    return *operands, total


def _dense(source: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    if isinstance(source, Tensor):
        return source
    codes_RB, scales_RG, length, q = source
    return backend_for(codes_RB, dtype).dequantize(codes_RB, scales_RG, length, q.element, dtype)


class _WeightCache:
    """Q2(W) of one layer for as long as nothing that it was made of changes.

    Every in-place write to a tensor raises its version; a tensor put into another's place has another identity. What
    goes round both (`tensor.data`, a CUDA graph) goes unnoticed, hence `weights_quantized_once` limits its life.
    """

    def __init__(self, layer: QuantLinear) -> None:
        self._layer = layer
        self._made: tuple | None = None
        self._key: tuple | None = None

    def _key_of(self, *how) -> tuple:
        layer = self._layer
        tensors = [layer.weight, *((layer.weight_ema, layer.ema_updates) if layer.use_q_ema else ())]
        return (layer.recipe, *how, *((id(t), t.data_ptr(), t._version) for t in tensors))

    def get(self, *how):
        return self._made if self._made is not None and self._key == self._key_of(*how) else None

    def put(self, made, *how) -> None:
        self._made, self._key = made, self._key_of(*how)


class _MXLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight_CD: Tensor,
        bias_C: Tensor | None,
        ema_CD: Tensor | None,
        ema_active: Tensor | None,
        lost: Tensor | None,
        lost_backward: Tensor | None,
        recipe: Recipe,
        save: bool,
        cache: _WeightCache | None,
    ) -> Tensor:
        dtype = matmul_dtype(x)
        plan = _Plan(recipe, dtype, lost is not None and dtype == torch.bfloat16, lost)
        q1, q2 = recipe.q1, recipe.q2
        x_ND = x.reshape(-1, x.shape[-1])
        keys = (None, None)
        if Rounding.STOCHASTIC in (q1.rounding, q2.rounding):
            keys = fresh_keys(2, x.device)
        x_fp8, w_fp8 = plan.fp8_of(q1, q2)
        keep_x_largest = save and plan.fp8_of(recipe.q5, recipe.q6)[0] is not None
        keep_w_largest = save and plan.fp8_of(recipe.q3, recipe.q4)[0] is not None
        pack = recipe.double and save
        x_operand_ND, kept_x, saved_x = _forward_operand(x_ND, q1, plan, x_fp8, keep_x_largest, pack, keys[0])
        made = cache.get(plan, w_fp8, keep_w_largest, pack) if cache is not None else None
        if made is None:
            made = _forward_operand(weight_CD, q2, plan, w_fp8, keep_w_largest, pack, keys[1], ema_CD, ema_active)
            if cache is not None:
                cache.put(made, plan, w_fp8, keep_w_largest, pack)
        w_operand_CD, kept_w, saved_w = made
        y_NC = multiply(x_operand_ND, w_operand_CD, output_dtype(x), bias_C)

        # Codes and scales are tensors of the graph like any other, so activation checkpointing and saved-tensor hooks
        # see them.
        ctx.save_for_backward(*(*saved_x, *saved_w) if save else ())
        ctx.plan, ctx.kept_x, ctx.kept_w = plan, kept_x, kept_w
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight_CD.dtype
        ctx.bias_dtype = None if bias_C is None else bias_C.dtype
        return y_NC.reshape(*x.shape[:-1], weight_CD.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        dy_NC = dy.reshape(-1, dy.shape[-1])
        plan, recipe = ctx.plan, ctx.plan.recipe
        lost = torch.zeros(1, dtype=torch.int64, device=dy.device) if plan.fp8 else None
        plan = replace(plan, lost=lost)
        saved = list(ctx.saved_tensors)  # read once: checkpointing recomputes the forward pass for it
        x_source, x_largest = ctx.kept_x.read(saved)
        w_source, w_largest = ctx.kept_w.read(saved)
        # Fresh for every layer, operand and backward pass: micro-batches and ranks round independently.
        key3, key4, key5, key6 = fresh_keys(4, dy.device).split(1)
        needs_dx, needs_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        needs_db = ctx.bias_dtype is not None and ctx.needs_input_grad[2]
        q3 = recipe.q3 if needs_dx else None
        q5 = recipe.q5 if needs_dw else None
        dx_fp8, w_fp8 = plan.fp8_of(recipe.q3, recipe.q4)
        dw_fp8, x_fp8 = plan.fp8_of(recipe.q5, recipe.q6)

        together = q3 is None or q5 is None or dx_fp8 is dw_fp8
        largest = None
        if (q3 is not None and dx_fp8) or (q5 is not None and dw_fp8):
            largest = backend_for(dy_NC).largest_magnitude(dy_NC)
        if together:
            fp8 = dx_fp8 if q3 is not None else dw_fp8
            dy_rows_NC, dy_columns_CN, db_C = _backward_operands(
                dy_NC, q3, q5, (key3, key5), plan, fp8, largest, needs_db
            )
        else:  # one of the two matmuls has an operand that is not quantized
            dy_rows_NC, _, _ = _backward_operands(dy_NC, q3, None, (key3, None), plan, dx_fp8, largest)
            _, dy_columns_CN, db_C = _backward_operands(dy_NC, None, q5, (None, key5), plan, dw_fp8, largest, needs_db)
        dx = dw_CD = None
        if needs_dx:
            _, w_operand_DC, _ = _backward_operands(w_source, None, recipe.q4, (None, key4), plan, w_fp8, w_largest)
            dx = multiply(dy_rows_NC, w_operand_DC, ctx.x_dtype).reshape(ctx.x_shape)
        if needs_dw:
            _, x_operand_DN, _ = _backward_operands(x_source, None, recipe.q6, (None, key6), plan, x_fp8, x_largest)
            dw_CD = multiply(dy_columns_CN, x_operand_DN, ctx.weight_dtype)
        db_C = db_C.to(ctx.bias_dtype) if needs_db else None
        lost = lost.to(torch.float32) if plan.fp8 and ctx.needs_input_grad[6] else None
        return dx, dw_CD, db_C, None, None, None, lost, None, None, None


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
        self._matmul = Matmul.AUTO
        self._cache: _WeightCache | None = None
        if self.use_q_ema:
            self._register_ema()
        self._make_counters()

    @property
    def matmul(self) -> Matmul:
        """Arithmetic of the matmuls under bf16: speed, not results. `set_matmul` sets it for a model."""
        return self._matmul

    @matmul.setter
    def matmul(self, matmul: Matmul | str) -> None:
        self._matmul = Matmul(matmul)
        self._make_counters()

    @property
    def _uses_fp8(self) -> bool:
        return self._matmul is Matmul.FP8 or (self._matmul is Matmul.AUTO and has_fp8(self.weight.device))

    def _make_counters(self) -> None:
        """Now, because a graph of torch.compile cannot."""
        if self._uses_fp8 and not self.weight.is_meta:
            lost_counters(self.weight.device)

    def _apply(self, fn, recurse: bool = True) -> QuantLinear:
        moved = super()._apply(fn, recurse)
        self._make_counters()
        return moved

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe) -> QuantLinear:
        """A layer that shares the parameters of `linear`."""
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
        # The comparison stays on the device: whether the average is in use never costs a synchronisation.
        return (self.weight_ema, self.ema_updates >= Q_EMA_START) if self.use_q_ema else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"QuantLinear needs a floating-point tensor, got {x.dtype}")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the last axis must have {self.in_features} channels, got {tuple(x.shape)}")
        lost = lost_counters(x.device) if self._uses_fp8 else (None, None)
        trains = x.requires_grad or self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        # A compiled graph quantizes the weight as a part of itself.
        cache = None if torch.compiler.is_compiling() else self._cache
        return _MXLinear.apply(
            x,
            self.weight,
            self.bias,
            *self._ema_arguments(),
            lost[0],
            lost[1] if trains else None,
            self.recipe,
            torch.is_grad_enabled(),
            cache,
        )

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """Q2(W) in fp32, [C, D], by the quantizer that the forward pass uses; W itself where Q2 is off.

        Of a weight that is sharded, this process's rows.
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
            state_dict[prefix + "ema_updates"] = torch.zeros_like(self.ema_updates)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe.describe()}"


def swap_linears(model: nn.Module, recipe: Recipe | Int4Recipe, names: Sequence[str] = BLOCK_LINEARS) -> nn.Module:
    """Replace, in place, every `nn.Linear` whose qualified name ends in one of `names`; parameters are shared.

    The replacement is a `QuantLinear`, or an `Int4Linear` for an `Int4Recipe`. A recipe that quantizes nothing leaves
    the model as it is. Returns `model`. Raises ValueError if no layer matches.
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
    layer_class = Int4Linear if isinstance(recipe, Int4Recipe) else QuantLinear
    replacements = {module: layer_class.from_linear(module, recipe) for module in map(model.get_submodule, found)}
    for name in found:
        parent, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, leaf, replacements[getattr(parent, leaf)])
    return model


def set_matmul(model: nn.Module, matmul: Matmul | str) -> None:
    """Choose the arithmetic of every quantized linear of `model`."""
    for layer in quant_linears(model).values():
        layer.matmul = matmul


@contextmanager
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Within, Q2(W) is computed once for as long as the weight stays the same: around the micro-batches of a step, or
    an evaluation. Q4 is drawn afresh in every backward pass all the same.

    Optimizer steps, in-place edits, `load_state_dict`, averages that move and parameters that are replaced are
    noticed; an edit through `.data`, which PyTorch does not count, is not until the block ends. Layers whose Q2 is
    stochastic, and compiled ones, quantize in every forward pass; so do sharded ones, whose weights must not stay
    whole.
    """
    layers = [
        layer
        for layer in quant_linears(model).values()
        if layer.recipe.q2.rounding is not Rounding.STOCHASTIC and not is_sharded(layer.weight)
    ]
    before = [layer._cache for layer in layers]
    for layer in layers:
        if layer._cache is None:
            layer._cache = _WeightCache(layer)
    try:
        yield
    finally:
        for layer, cache in zip(layers, before):
            layer._cache = cache


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized linears of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def plain_weight_linears(model: nn.Module) -> list[QuantLinear]:
    """The layers of `model` whose Q2 is the plain quantizer, for what acts on W and Q2(W).

    Raises ValueError if there is none, or if Q-EMA rounds the weights.
    """
    layers = [layer for layer in quant_linears(model).values() if layer.recipe.q2.enabled]
    if not layers or any(layer.recipe.q_ema_beta is not None for layer in layers):
        raise ValueError("the model must round its weights plainly; build it with a recipe with q2 and without Q-EMA")
    return layers
