"""Dampening adds a loss that pulls every weight towards its quantized value.

It is the oscillation dampening of Nagel et al. 2022, *Overcoming Oscillations in Quantization-Aware Training* (arXiv
2203.11086), with which the paper compares in Tables 3 and 4:

    L = L_task + lambda(t) * sum over layers of R(W - Q2(W)),    Q2(W) without gradient
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from ..optim.step_count import StepCount
from ..option_fields import choice, option, real
from ..swap import plain_weight_linears
from .base import Remedy, RunLength, remedy, renamed
from .nagel_schedule import cosine


class Reduction(str, Enum):
    """The function R of a layer's difference E_CD = W - Q2(W)."""

    SUM = "sum"
    """||E||_F^2, as in TetraJet's paper."""
    KERNEL_MEAN = "kernel_mean"
    """||E||_F^2 divided by the number of input channels, which sums the means of the output channels (Nagel et al.)."""


@dataclass(frozen=True)
class DampenOptions:
    dampen: float | None = option(
        None, "pull weights to their rounded values with this weight in the loss (Nagel et al. 2022)", real(0),
        metavar="WEIGHT",
    )  # fmt: skip
    dampen_reduction: str | None = choice(
        Reduction.SUM.value,
        "the loss of a layer: the sum over all weights, or Nagel et al.'s mean over the input channels (default: sum)",
        [r.value for r in Reduction],
        needs="dampen",
    )


@remedy("dampen", DampenOptions)
class Dampen(StepCount, Remedy):
    """Adds the gradient of the dampening loss, 2 lambda (W - Q2(W)), to the weights' gradients.

    With `kernel_mean` the gradient is divided by the number of input channels.

    It adds this gradient after the backward pass, instead of adding the loss before it. The update is the same, needs
    no second graph, and is equal on all processes. The loss that a run reports is the loss of the task alone. lambda
    is 0 for a quarter of the run and then follows a cosine to `weight`.
    Nagel et al. clip W to the range of the grid first. Truncation-free scaling leaves nothing to clip; with floor
    scaling, weights beyond the grid are pulled into it.

    `model` is attached at once, unless it is None. Raises ValueError for a negative weight, fewer than one step, and an
    unknown reduction.
    """

    can_shard = False

    def __init__(
        self, model: nn.Module | None, total_steps: int, weight: float, reduction: Reduction | str = Reduction.SUM
    ) -> None:
        if weight < 0 or total_steps < 1:
            raise ValueError(f"need weight >= 0 and total_steps >= 1, got {weight} and {total_steps}")
        super().__init__()
        self.strength, self.total_steps, self.reduction = weight, total_steps, Reduction(reduction)
        if model is not None:
            self.attach(model)

    @classmethod
    def from_options(cls, options: DampenOptions, length: RunLength) -> Dampen:
        return cls(None, length.steps, options.dampen, options.dampen_reduction)

    def attach(self, model: nn.Module) -> None:
        """Raises ValueError for a model without weights that Q2 quantizes without Q-EMA."""
        self.layers = plain_weight_linears(model)

    @property
    def present_weight(self) -> float:
        """lambda(t) of the next step."""
        return cosine(self.step, self.total_steps, 0.0, self.strength) or 0.0

    @torch.no_grad()
    def before_update(self) -> None:
        factor = 2 * self.present_weight
        if factor == 0:
            return
        for layer in self.layers:
            if layer.weight.grad is not None:
                share = factor if self.reduction is Reduction.SUM else factor / layer.in_features
                # Two operations, because `add_` with an alpha rounds once or twice, depending on the processor.
                layer.weight.grad.add_((layer.weight - layer.quantized_weight()).mul_(share))

    def after_step(self, skip: Tensor | None = None) -> None:
        """Count the step, unless it was skipped."""
        self.count(skip)

    def log_numbers(self) -> dict[str, float]:
        return {"dampen_weight": self.present_weight}

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]

    def add_gradients(self) -> None:
        """The older name of `before_update`, which works until the next release."""
        renamed(type(self), "add_gradients", "before_update")
        self.before_update()
