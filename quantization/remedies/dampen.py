"""Dampening adds a loss that pulls every weight towards its quantized value.

It is the oscillation dampening of Nagel et al. 2022, *Overcoming Oscillations in Quantization-Aware Training* (arXiv
2203.11086), with which the paper compares in Tables 3 and 4:

    L = L_task + lambda(t) * sum over layers of R(W - Q2(W)),    Q2(W) without gradient
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from ..optim.step_count import StepCount
from ..swap import plain_weight_linears
from .schedule import cosine


class Reduction(str, Enum):
    """The function R of a layer's difference E_CD = W - Q2(W)."""

    SUM = "sum"
    """||E||_F^2, as in TetraJet's paper."""
    KERNEL_MEAN = "kernel_mean"
    """||E||_F^2 divided by the number of input channels, which sums the means of the output channels (Nagel et al.)."""


class Dampen(StepCount):
    """Adds the gradient of the dampening loss, 2 lambda (W - Q2(W)), to the weights' gradients.

    With `kernel_mean` the gradient is divided by the number of input channels.

    It adds this gradient after the backward pass, instead of adding the loss before it. The update is the same, needs
    no second graph, and is equal on all processes. The loss that a run reports is the loss of the task alone. lambda
    is 0 for a quarter of the run and then follows a cosine to `weight`.
    Nagel et al. clip W to the range of the grid first. Truncation-free scaling leaves nothing to clip; with floor
    scaling, weights beyond the grid are pulled into it.

    Raises ValueError for a negative weight, fewer than one step, an unknown reduction, and a model without weights
    that Q2 quantizes without Q-EMA.
    """

    def __init__(
        self, model: nn.Module, total_steps: int, weight: float, reduction: Reduction | str = Reduction.SUM
    ) -> None:
        if weight < 0 or total_steps < 1:
            raise ValueError(f"need weight >= 0 and total_steps >= 1, got {weight} and {total_steps}")
        super().__init__()
        self.weight, self.total_steps, self.reduction = weight, total_steps, Reduction(reduction)
        self.layers = plain_weight_linears(model)

    @property
    def present_weight(self) -> float:
        """lambda(t) of the next step."""
        return cosine(self.step, self.total_steps, 0.0, self.weight) or 0.0

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Call between the backward pass and the optimizer step."""
        factor = 2 * self.present_weight
        if factor == 0:
            return
        for layer in self.layers:
            if layer.weight.grad is not None:
                share = factor if self.reduction is Reduction.SUM else factor / layer.in_features
                # Two operations, because `add_` with an alpha rounds once or twice, depending on the processor.
                layer.weight.grad.add_((layer.weight - layer.quantized_weight()).mul_(share))

    def update(self, skip: Tensor | None = None) -> None:
        """Call once after every optimizer step. A skipped one, for which `skip` is 1 on the device, does not count."""
        self.count(skip)

    def numbers(self) -> dict[str, float]:
        """The numbers for the log."""
        return {"dampen_weight": self.present_weight}

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
