"""Iterative freezing keeps a weight that oscillates too often at its average.

It is the iterative weight freezing of Nagel et al. 2022, *Overcoming Oscillations in Quantization-Aware Training*
(arXiv 2203.11086), Algorithm 1, with which the paper compares in Table 4. After every optimizer step it computes, for
the code c of every weight, an integer from -7 to 7:

    o = 1 if c changed, and in the direction opposite to its last change, else 0
    f <- m o + (1 - m) f,    c_mean <- m c + (1 - m) c_mean
    where f > threshold(t): freeze for good at round(c_mean)

Freezing tracks codes, like Nagel et al., but it freezes a *value*: round(c_mean) times the group's scale of that
moment. In MX a scale follows from the amax of its group, so a weight with a frozen code would still move: its value
doubles or halves with the scale, and a group whose largest weight is frozen at less than its present code would shrink
its own scale. The frozen value is a point of the grid, and of every finer one. If the group's scale grows later,
because a weight that is not frozen grew, the forward pass rounds the frozen value to the coarser grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..averages import lerp_unless
from ..formats import GROUP_SIZE, MAX_MAGNITUDE_CODE, SIGN_CODE
from ..linear import QuantLinear
from ..mx import quantize_mx
from ..optim.step_count import StepCount
from ..option_fields import option, real
from ..swap import plain_weight_linears
from .base import Remedy, RunLength, remedy
from .nagel_schedule import cosine

MOMENTUM = 0.001  # Nagel et al.'s default
FIRST_THRESHOLD = 0.1  # where the threshold's cosine starts


@dataclass(frozen=True)
class FreezeOptions:
    freeze: float | None = option(
        None,
        "freeze weights that oscillate more often than this at the end of training, such as 0.01 (Nagel et al. 2022)",
        real(2 * MOMENTUM, FIRST_THRESHOLD),
        metavar="THRESHOLD",
    )


@dataclass
class _Track:
    """The state of one weight [C, D]; all tensors but the last have its shape and are written in place."""

    layer: QuantLinear
    codes: Tensor  # int8
    direction: Tensor  # int8, sign of the last change of the code
    frequency: Tensor  # fp32, f
    mean_code: Tensor  # fp32, c_mean
    frozen: Tensor  # fp32, the value, NaN while the weight is free
    magnitudes: Tensor  # fp32 [8], values of the element format's magnitude codes

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("codes", "direction", "frequency", "mean_code", "frozen")}


@remedy("freeze", FreezeOptions)
class Freeze(StepCount, Remedy):
    """Tracks every quantized weight and freezes those that oscillate, by writing their value after every step.

    This acts like a gradient of 0, and the layer needs no other forward pass: a model with frozen weights is an
    ordinary one. In the first quarter of the run nothing freezes; then the threshold follows a cosine from 0.1 to
    `threshold`.

    `model` is attached at once, unless it is None. Raises ValueError for a threshold above 0.1, for one below twice the
    momentum (a single oscillation would freeze a weight), and for fewer than one step.
    """

    can_shard = False

    def __init__(self, model: nn.Module | None, total_steps: int, threshold: float, momentum: float = MOMENTUM) -> None:
        if not 2 * momentum <= threshold <= FIRST_THRESHOLD or total_steps < 1:
            raise ValueError(
                f"threshold must lie between twice the momentum, {2 * momentum}, and {FIRST_THRESHOLD}, and "
                f"total_steps be at least 1; got {threshold} and {total_steps}"
            )
        super().__init__()
        self.threshold, self.momentum, self.total_steps = threshold, momentum, total_steps
        if model is not None:
            self.attach(model)

    @classmethod
    def from_options(cls, options: FreezeOptions, length: RunLength) -> Freeze:
        return cls(None, length.steps, options.freeze)

    @torch.no_grad()
    def attach(self, model: nn.Module) -> None:
        """Raises ValueError for a model without weights that Q2 quantizes without Q-EMA."""
        self._tracks = []
        for layer in plain_weight_linears(model):
            codes, _ = _codes_and_scales(layer)
            zeros = torch.zeros_like(codes, dtype=torch.float32)
            magnitudes = zeros.new_tensor(layer.recipe.q2.element.format.magnitudes)
            self._tracks.append(
                _Track(layer, codes, torch.zeros_like(codes), zeros, codes.float(), zeros + torch.nan, magnitudes)
            )

    def threshold_after(self, step: int) -> float:
        """The threshold after so many steps; it is infinite in the first quarter of the run."""
        threshold = cosine(step, self.total_steps, FIRST_THRESHOLD, self.threshold)
        return float("inf") if threshold is None else threshold

    @torch.no_grad()
    def after_step(self, skip: Tensor | None = None) -> None:
        threshold = self.threshold_after(self.step + 1)
        self.count(skip)
        for track in self._tracks:
            weight, frozen = track.layer.weight, track.frozen
            weight.copy_(torch.where(frozen.isnan(), weight, frozen))  # undo what the optimizer did to frozen weights
            codes, scales = _codes_and_scales(track.layer)
            if skip is not None:
                codes = torch.where(skip > 0, track.codes, codes)  # freezing after the last step may have changed codes
            change = (codes - track.codes).sign()
            turned = (change != 0) & (change == -track.direction)
            lerp_unless(skip, [track.frequency, track.mean_code], [turned.float(), codes.float()], self.momentum)
            track.direction.copy_(torch.where(change != 0, change, track.direction))
            track.codes.copy_(codes)

            mean_code = track.mean_code.round()
            values = mean_code.sign() * track.magnitudes[mean_code.abs().int()] * scales
            freezes = frozen.isnan() & (track.frequency > threshold)
            if skip is not None:
                freezes &= skip == 0
            frozen.copy_(torch.where(freezes, values, frozen))
            weight.copy_(torch.where(freezes, values, weight))

    def log_numbers(self) -> dict[str, float]:
        """The share of frozen weights in percent."""
        total = sum(track.frozen.numel() for track in self._tracks)
        return {"frozen": 100 * float(sum((~track.frozen.isnan()).sum() for track in self._tracks)) / total}

    def state_dict(self) -> dict:
        return {"step": self.step, "tracks": [track.tensors() for track in self._tracks]}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        for track, saved in zip(self._tracks, state["tracks"], strict=True):
            for name, tensor in track.tensors().items():
                tensor.copy_(saved[name])


def _codes_and_scales(layer: QuantLinear) -> tuple[Tensor, Tensor]:
    """Signed codes of Q2(W), int8 from -7 to 7, and the scale of every weight, fp32, both [C, D]."""
    q2, length = layer.recipe.q2, layer.in_features
    quantized = quantize_mx(layer.weight, -1, q2.element, q2.scaling, q2.rounding)
    packed = quantized.codes
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)[:, :length].to(torch.int8)
    magnitudes = codes & MAX_MAGNITUDE_CODE
    signed = torch.where(codes & SIGN_CODE != 0, -magnitudes, magnitudes)
    return signed, quantized.scales.float().repeat_interleave(GROUP_SIZE, dim=1)[:, :length]
