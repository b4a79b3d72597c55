"""The linear layer in INT4, per tensor (Xi et al. 2023, *Training Transformers with 4-bit Integers*, arXiv 2306.11987).

    X^ = sX int4(X H / sX)      W^ = sW int4(W H / sW)      Y = X^ W^^T + b          section 3, Hadamard quantizer
    dX = ([dY^] W^ where X was not clipped) H^T                                      section 4, bit splitting and
    dW = ([dY^]^T X^ where W was not clipped) H^T                                    leverage-score sampling

H is a block-diagonal, orthonormal Hadamard matrix of Sylvester's kind; it spreads outliers over their block. The step
sizes sX and sW are learned (LSQ, Esser et al. 2020). dY^ is dY split into two INT4 halves, an upper and a lower one,
which makes 2N rows. [.] keeps N of them on average, preferably those with large products, and divides each by its
probability. Both steps are unbiased: E[dX] and E[dW] are the straight-through gradients of the quantized forward pass.

This file simulates INT4's accuracy, not its speed. Integers are multiplied in the precision of the model (bf16 holds
each of them exactly, but not a sampled row over its probability). Rows that are not sampled are multiplied as zeros,
because gathering the others would make every step wait for the host.

It differs from the official code in three points:

- The official code chooses the size of the Hadamard blocks for every layer by the error on the first batch, among
  1, 2, ..., 1024. Here a block is 32, their default, or the largest power of two below it that divides D.
- The official code clips the halves to +-6, which biases values whose lower half rounds to +-7 and the largest
  gradients. Here both reach +-7, so nothing is clipped and the split is unbiased, as in the paper.
- The official simulation of dW gives every non-zero row the probability 1, which is no sampling. Here dW is sampled
  like dX.

Shape suffixes: N tokens (all leading axes folded), D input channels, C output channels.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..matmul import matmul_dtype, multiply, output_dtype
from ..recipe import Int4Recipe, layer_for
from ..reference import Operand

LOWEST, HIGHEST = -8, 7  # INT4
UNIT_NORMAL_STEP = 2 * (2 / torch.pi) ** 0.5 / HIGHEST**0.5
"""LSQ's first step size for an input of unit variance."""
SPLIT_BASE = 14  # lower units in an upper one, so that both halves lie in [-7, 7]


def hadamard_transform(x: Tensor, block: int) -> Tensor:
    """x H over the last axis, whose length is a multiple of `block`. H is symmetric and its own inverse."""
    shape = x.shape
    half = 1
    while half < block:
        first, second = x.reshape(*shape[:-1], -1, 2, half).unbind(-2)
        x = torch.stack((first + second, first - second), dim=-2)
        half *= 2
    return x.reshape(shape) * block**-0.5


def first_step_size(x: Tensor) -> Tensor:
    """LSQ's step size for a tensor seen for the first time, 2 E|x| / sqrt(7), a scalar."""
    return 2 * x.abs().mean() / HIGHEST**0.5


def split_bits(dy_NC: Tensor) -> tuple[Tensor, Tensor]:
    """dY as an upper and a lower half (section 4): integers in [-7, 7], fp32 [2, N, C], and their units, [2, 1, 1].

    The lower unit is the amax of dY over 98. The upper half is rounded to nearest, the rest stochastically.
    """
    dy_NC = dy_NC.float()
    unit = dy_NC.abs().amax().clamp_min(1e-30) * 2 / SPLIT_BASE**2
    scaled_NC = dy_NC / unit
    upper_NC = (scaled_NC / SPLIT_BASE).round()
    rest_NC = scaled_NC - SPLIT_BASE * upper_NC
    lower_NC = rest_NC.floor()
    lower_NC += torch.rand_like(rest_NC) < rest_NC - lower_NC
    half = SPLIT_BASE // 2  # the rounding error of the quotients must not lead beyond
    return torch.stack((upper_NC, lower_NC)).clamp_(-half, half), torch.stack((SPLIT_BASE * unit, unit)).view(2, 1, 1)


def sampling_probabilities(scores: Tensor, budget: int) -> Tensor:
    """p = min(1, t * score) with t such that p sums to `budget` (section 4); fp32, in the shape of `scores`.

    If no more than `budget` scores are positive, those get 1. A score of 0 gets 0.
    """
    shares = (scores / scores.amax()).flatten().double()
    # The sum of whole numbers in fp64 does not depend on its order, so that a step can be repeated bit for bit.
    descending = (shares * 2**30).round().sort(descending=True).values
    rest = descending.flip(0).cumsum(0).flip(0)
    left = budget - torch.arange(len(rest), device=rest.device)
    certain = (left * descending > rest).sum(dim=0, keepdim=True)  # how many of the largest get 1
    factor = left.gather(0, certain) / rest.gather(0, certain) * 2**30
    return torch.where(shares > 0, shares * factor, 0).clamp_(max=1).float().view(scores.shape)


def sample_rows(halves_2NC: Tensor, units: Tensor, weights_N: Tensor | None) -> Tensor:
    """An unbiased estimate of dY, [N, C], from N of the 2N rows of its halves on average (section 4).

    A row's probability is proportional to its norm times `weights_N`, the norm of the row that it will be multiplied
    by; `weights_N` is None if one matrix multiplies all rows. No row is gathered; those left out are multiplied by 0.
    """
    scores_2N = halves_2NC.norm(dim=-1) * units.squeeze(-1)
    if weights_N is not None:
        scores_2N = scores_2N * weights_N
    probability_2N = sampling_probabilities(scores_2N, budget=halves_2NC.shape[1])
    kept_2N = torch.rand_like(probability_2N) < probability_2N
    factor_2N = torch.where(kept_2N, 1 / probability_2N, 0)
    return (halves_2NC * (factor_2N.unsqueeze(-1) * units)).sum(dim=0)


class _Int4Matmul(torch.autograd.Function):
    """X^ W^^T in fp32 from X H, W H and the step sizes, for which the backward pass returns LSQ's gradient."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, w_CD: Tensor, x_step: Tensor, w_step: Tensor, dtype: torch.dtype, sampling: bool):
        scaled_x_ND, scaled_w_CD = x_ND / x_step, w_CD / w_step
        ctx.save_for_backward(scaled_x_ND, scaled_w_CD, x_step, w_step)
        ctx.dtype, ctx.sampling = dtype, sampling
        x_operand_ND, w_operand_CD = (_to_int4(t).to(dtype) for t in (scaled_x_ND, scaled_w_CD))
        return multiply(Operand(x_operand_ND), Operand(w_operand_CD), torch.float32) * (x_step * w_step)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NC: Tensor):
        scaled_x_ND, scaled_w_CD, x_step, w_step = ctx.saved_tensors
        integers_x_ND, integers_w_CD = _to_int4(scaled_x_ND), _to_int4(scaled_w_CD)
        halves_2NC, units = split_bits(dy_NC)

        def estimate(weights_N: Tensor | None) -> Tensor:
            if ctx.sampling:
                return sample_rows(halves_2NC, units, weights_N)
            return (halves_2NC * units).sum(dim=0)

        def product(a: Tensor, b: Tensor, step: Tensor) -> Tensor:
            return multiply(Operand(a.to(ctx.dtype)), Operand(b.to(ctx.dtype)), torch.float32) * step

        dx_ND = product(estimate(None), integers_w_CD.T, w_step)
        dw_CD = product(estimate(integers_x_ND.norm(dim=1)).T, integers_x_ND.T, x_step)
        dx_ND, dx_step = _through_lsq(dx_ND, scaled_x_ND, integers_x_ND)
        dw_CD, dw_step = _through_lsq(dw_CD, scaled_w_CD, integers_w_CD)
        return dx_ND, dw_CD, dx_step, dw_step, None, None


def _to_int4(scaled: Tensor) -> Tensor:
    return scaled.round().clamp_(LOWEST, HIGHEST)


def _through_lsq(gradient: Tensor, scaled: Tensor, integers: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the tensor and of its step size from the quantized tensor's (LSQ, Esser et al. 2020)."""
    inside = (scaled >= LOWEST) & (scaled <= HIGHEST)
    per_step = torch.where(inside, integers - scaled, integers)
    return torch.where(inside, gradient, 0), (gradient * per_step).sum() * (HIGHEST * scaled.numel()) ** -0.5


@layer_for(Int4Recipe)
class Int4Linear(nn.Linear):
    """A drop-in for `nn.Linear` whose matmuls run in simulated INT4.

    `weight` and `bias` keep their names; `input_step` and `weight_step` are fp32 scalar parameters, whose absolute
    values are the step sizes. `weight_step` starts from the weight, also if a checkpoint without step sizes is loaded;
    `input_step` suits an input of unit variance until `initialise_steps` has seen a batch.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Int4Recipe | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = Int4Recipe() if recipe is None else recipe
        if not isinstance(self.recipe, Int4Recipe):
            raise TypeError(f"Int4Linear needs an Int4Recipe, got {recipe!r}")
        self.block = gcd(in_features, self.recipe.hadamard_size)
        self._start_steps()

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Int4Recipe) -> Int4Linear:
        """Make a layer that shares the parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", recipe=recipe)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._start_steps()
        return layer.train(linear.training)

    @torch.no_grad()
    def _start_steps(self) -> None:
        self.input_step = nn.Parameter(torch.full((), UNIT_NORMAL_STEP, device=self.weight.device))
        self.weight_step = nn.Parameter(first_step_size(self.transformed(self.weight)))

    def transformed(self, input: Tensor) -> Tensor:
        """The input times H in fp32, over the last axis: what is quantized of an input or of the weight."""
        return hadamard_transform(input.float(), self.block)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1] != self.in_features:
            raise ValueError(f"the last axis must have {self.in_features} channels, got {tuple(input.shape)}")
        steps = (step.abs().clamp_min(1e-10) for step in (self.input_step, self.weight_step))
        y_NC = _Int4Matmul.apply(
            self.transformed(input).reshape(-1, self.in_features),
            self.transformed(self.weight),
            *steps,
            matmul_dtype(input),
            self.recipe.sampling,
        )
        if self.bias is not None:
            y_NC = y_NC + self.bias
        return y_NC.reshape(*input.shape[:-1], self.out_features).to(output_dtype(input))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.shape == self.weight.shape and prefix + "weight_step" not in state_dict:
            state_dict[prefix + "weight_step"] = first_step_size(self.transformed(weight))
            step = self.input_step.detach()
            unknown = torch.full((), UNIT_NORMAL_STEP, device=weight.device)
            state_dict[prefix + "input_step"] = unknown if step.is_meta else step.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe.describe()}"


@torch.no_grad()
def initialise_steps(model: nn.Module, *inputs: Tensor) -> None:
    """Set every step size from one forward pass of `model(*inputs)`, layer after layer, in eval mode.

    Call it once before training, and before DistributedDataParallel, which then gives all processes the same sizes.
    """

    def start(layer: Int4Linear, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        layer.input_step.copy_(first_step_size(layer.transformed(*args, **named)))
        layer.weight_step.copy_(first_step_size(layer.transformed(layer.weight)))

    layers = [module for module in model.modules() if isinstance(module, Int4Linear)]
    hooks = [layer.register_forward_pre_hook(start, with_kwargs=True) for layer in layers]
    training = model.training
    try:
        model.eval().forward(*inputs)  # `forward`, because the graph of a compiled model has no hooks
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
