"""Q-Ramping updates oscillating weights less often, by larger steps (paper section 6, Algorithm 2).

Before each epoch but the first, it measures the oscillation ratio R_w of every weight over some steps, which are then
undone, and gives the weight the period N_w = min(k2 floor(R_w / k1) + 1, steps per epoch). `RampingAdamW` updates it
at every N_w-th step with the mean of N_w gradients and N_w times the learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..measures.oscillation import oscillates
from ..optim.ramping import RampingAdamW, update_periods
from ..option_fields import option, real, switch, whole
from .base import Remedy, RunLength, TrainingRun, remedy


@dataclass(frozen=True)
class QRampingOptions:
    free_on_resume = ("q_ramping",)  # a checkpoint's identity has it as its optimizer

    q_ramping: bool = switch("update oscillating weights less often")
    q_ramping_k1: float = option(
        16.0, "oscillation ratio for which the period grows by k2 (default: {default})", real(1e-6), needs="q_ramping"
    )
    q_ramping_k2: int = option(
        5, "steps by which the period grows for each k1 (default: {default})", whole(0), needs="q_ramping"
    )
    q_ramping_steps: int = option(30, "steps of a detection (default: {default})", whole(1), needs="q_ramping")


@remedy("q_ramping", QRampingOptions)
class QRamping(Remedy):
    """Sets the periods of the run's `RampingAdamW`, which are a part of that optimizer's state."""

    optimizer_class = RampingAdamW

    def __init__(self, k1: float, k2: int, steps: int) -> None:
        self.k1, self.k2, self.steps = k1, k2, steps

    @classmethod
    def from_options(cls, options: QRampingOptions, length: RunLength) -> QRamping:
        return cls(options.q_ramping_k1, options.q_ramping_k2, options.q_ramping_steps)

    def connect(self, run: TrainingRun) -> None:
        self.run = run

    def before_epoch(self, epoch: int) -> dict[str, float]:
        """Measures, and sets the periods. The first detection comes after T_update = one epoch of steps."""
        if epoch == 0:
            return {}
        ratios = self.run.measure_ratios(epoch, self.steps)
        periods = update_periods(ratios, self.k1, self.k2, max_period=self.run.steps_per_epoch)
        self.run.optimizer.set_periods(periods)
        oscillating = sum(oscillates(ratio).sum() for ratio in ratios.values())
        sums = torch.stack((oscillating.double(), sum(period.double().sum() for period in periods.values())))
        total = sum(p.numel() for p in ratios)  # over all processes, even if each has only a part
        oscillating, mean_period = (self.run.sum_over_shards(sums) / total).tolist()
        return {"oscillating": 100 * oscillating, "mean_period": mean_period}
