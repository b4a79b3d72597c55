"""OsciReset: weights that oscillate are put where they are rounded to (TetraJet-v2, arXiv 2510.27527).

From a share of the run on, at regular intervals: measure the oscillation ratio of every weight over a window of steps,

    r = (path length of Q2(w)) / (path length of w),    0 where w did not move

and where r reaches the threshold, w <- Q2(w), the middle of its rounding cell. Optimizer states stay as they are.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from ..linear import plain_weight_linears
from ..measures.oscillation import OSCILLATION_THRESHOLD, PathLengths
from ..optim.step_count import StepCount

START = 0.6  # TetraJet-v2's runs begin between 59 % and 69 %
WINDOW = 50  # steps that are measured
INTERVAL = 1000  # steps between the beginnings of two windows


class OsciReset(StepCount):
    """Measures in windows and resets at the end of each.

    A window begins at the share `start` of the run and every `interval` steps from there, and lasts 50 steps or, if
    that is shorter, the interval. `interval` is TetraJet-v2's 1000 steps if none is given, but at most a tenth of the
    run, so that short runs (theirs have 12,505 steps and more) see resets too. They reset one step after a
    window's last, here it is right after it. The state of an open window is part of `state_dict`.

    Raises ValueError for a start outside [0, 1], an interval or a run of less than one step, a threshold that is not
    positive, and a model that does not round weights plainly.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        start: float = START,
        interval: int | None = None,
        threshold: float = OSCILLATION_THRESHOLD,
    ) -> None:
        if interval is None:
            interval = max(1, min(INTERVAL, total_steps // 10))
        if not 0 <= start <= 1 or min(interval, total_steps) < 1 or threshold <= 0:
            raise ValueError(
                "need start in [0, 1], interval and total_steps of at least 1 and a positive threshold; "
                f"got {start}, {interval}, {total_steps} and {threshold}"
            )
        super().__init__()
        self.model, self.threshold, self.interval = model, threshold, interval
        self.start = max(1, ceil(start * total_steps))
        """Optimizer steps before the first window."""
        self.window = min(WINDOW, interval)
        self._layers = plain_weight_linears(model)
        self._paths: PathLengths | None = None
        self._then: tuple[int, PathLengths | None] | None = None
        """The window that is open as soon as so many steps are done; `_paths` until then."""
        self.resets = torch.zeros((), dtype=torch.int64, device=self._layers[0].weight.device)
        """How often a weight was reset so far, all weights together."""

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Call once after every optimizer step. One that was skipped, `skip` 1 on the device, leaves all as it is.

        In such a step no weight has moved, which makes the paths no longer.
        """
        paths = then = self._window()
        step = self.step + 1
        in_interval = (step - self.start) % self.interval
        if paths is not None:
            paths.record()
            if in_interval == self.window % self.interval:
                self._reset(paths, skip)
                then = None
        if step >= self.start and in_interval == 0:
            then = PathLengths(self.model)
        self.count(skip)
        self._then = step, then

    def _window(self) -> PathLengths | None:
        """The open one."""
        if self._then is not None:
            step, paths = self._then
            if step == self.step:
                self._paths = paths
            self._then = None
        return self._paths

    def _reset(self, paths: PathLengths, skip: Tensor | None) -> None:
        ratios = paths.ratios()
        for layer in self._layers:
            oscillates = ratios[layer.weight] >= self.threshold
            if skip is not None:
                oscillates &= skip == 0
            layer.weight.copy_(torch.where(oscillates, layer.quantized_weight(), layer.weight))
            self.resets += oscillates.sum()

    def numbers(self) -> dict[str, float]:
        """For the log."""
        return {"resets": int(self.resets)}

    def state_dict(self) -> dict:
        paths = self._window()
        return {"step": self.step, "resets": self.resets, "paths": None if paths is None else paths.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.resets.copy_(state["resets"])
        self._paths = self._then = None
        if state["paths"] is not None:
            self._paths = PathLengths(self.model)
            self._paths.load_state_dict(state["paths"])
