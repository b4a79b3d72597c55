"""OsciReset sets weights that oscillate to their quantized values (TetraJet-v2, arXiv 2510.27527).

After a share of the run, it measures at regular intervals the oscillation ratio of every weight over a window of steps,

    r = (path length of Q2(w)) / (path length of w),    0 if w did not move

If r reaches the threshold, w <- Q2(w), the middle of its rounding cell. Optimizer states stay as they are.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from ..measures.oscillation import OSCILLATION_THRESHOLD, PathLengths
from ..optim.step_count import StepCount
from ..swap import plain_weight_linears

START = 0.6  # TetraJet-v2's runs begin between 59 % and 69 %
WINDOW = 50  # steps that are measured
INTERVAL = 1000  # steps from the start of one window to the start of the next


class OsciReset(StepCount):
    """Measures in windows and resets at the end of each.

    The first window begins at the share `start` of the run, and another one every `interval` steps from there. Each
    lasts 50 steps, or the interval if that is shorter. `interval` is TetraJet-v2's 1000 steps if none is given, but at
    most a tenth of the run, so that runs shorter than theirs (12,505 steps and more) have resets, too. TetraJet-v2
    resets one step after the last step of a window; here it is directly after it. The state of an open window is part
    of `state_dict`.

    Raises ValueError for a start outside [0, 1], an interval or a run of less than one step, a threshold that is not
    positive, and a model without weights that Q2 quantizes without Q-EMA.
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
        """The number of optimizer steps before the first window."""
        self.window = min(WINDOW, interval)
        self._layers = plain_weight_linears(model)
        self._paths: PathLengths | None = None
        self._next: tuple[int, PathLengths | None] | None = None
        """(n, window): `window` replaces `_paths` once n optimizer steps have been counted."""
        self.resets = torch.zeros((), dtype=torch.int64, device=self._layers[0].weight.device)
        """The number of resets so far, of all weights together."""

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Call once after every optimizer step. A skipped one, for which `skip` is 1 on the device, changes nothing.

        No weight moves in a skipped step, so recording it adds nothing to the paths.
        """
        paths = following = self._window()
        step = self.step + 1
        in_interval = (step - self.start) % self.interval
        if paths is not None:
            paths.record()
            if in_interval == self.window % self.interval:
                self._reset(paths, skip)
                following = None
        if step >= self.start and in_interval == 0:
            following = PathLengths(self.model)
        self.count(skip)
        self._next = step, following

    def _window(self) -> PathLengths | None:
        """The open window, or None."""
        if self._next is not None:
            step, paths = self._next
            if step == self.step:
                self._paths = paths
            self._next = None
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
        """The number for the log."""
        return {"resets": int(self.resets)}

    def state_dict(self) -> dict:
        paths = self._window()
        return {"step": self.step, "resets": self.resets, "paths": None if paths is None else paths.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.resets.copy_(state["resets"])
        self._paths = self._next = None
        if state["paths"] is not None:
            self._paths = PathLengths(self.model)
            self._paths.load_state_dict(state["paths"])
