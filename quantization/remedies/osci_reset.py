"""OsciReset sets weights that oscillate to their quantized values (TetraJet-v2, arXiv 2510.27527).

After a share of the run, it measures at regular intervals the oscillation ratio of every weight over a window of steps,

    r = (path length of Q2(w)) / (path length of w),    0 if w did not move

If r reaches the threshold, w <- Q2(w), the middle of its rounding cell. Optimizer states stay as they are.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from ..measures.oscillation import OSCILLATION_THRESHOLD, PathLengths
from ..optim.step_count import StepCount
from ..option_fields import option, real, switch, whole
from ..swap import plain_weight_linears
from .base import Remedy, RunLength, remedy

START = 0.6  # TetraJet-v2's runs begin between 59 % and 69 %
RESET_WINDOW = 50  # steps that are measured
INTERVAL = 1000  # steps from the start of one window to the start of the next


def share_or_steps(text: str) -> float:
    """An argparse type: a share of the run in [0, 1], or a whole number of steps above 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 <= value <= 1 or (1 < value <= 2**31 - 1 and value.is_integer()):
        return value
    raise argparse.ArgumentTypeError(f"needs a share of the run from 0 to 1, or a whole number of steps, got {text!r}")


@dataclass(frozen=True)
class OsciResetOptions:
    osci_reset: bool | None = switch("set oscillating weights to their rounded values (TetraJet-v2)", default=None)
    osci_reset_interval: int | None = option(
        None,
        "steps from the start of one window to the start of the next "
        f"(default: --osci-reset-window if that is given; else {INTERVAL}, but at most a tenth of the run)",
        whole(1),
        needs="osci_reset",
    )
    osci_reset_window: int | None = option(
        None,
        f"steps that are measured before a reset (default: {RESET_WINDOW}, but at most the interval)",
        whole(1),
        needs="osci_reset",
    )
    osci_reset_threshold: float | None = option(
        OSCILLATION_THRESHOLD,
        "oscillation ratio from which a weight is reset (default: {default})",
        real(1e-6),
        needs="osci_reset",
    )
    osci_reset_start: float | None = option(
        START,
        "share of the run before the first window, or a number of steps above 1 (default: {default})",
        share_or_steps,
        needs="osci_reset",
    )


@remedy("osci_reset", OsciResetOptions)
class OsciReset(StepCount, Remedy):
    """Measures in windows and resets at the end of each.

    The first window begins at the share `start` of the run, or after `start` steps if that is more than 1, and another
    one every `interval` steps from there. Each lasts `window` steps. The defaults are TetraJet-v2's window of 50 steps,
    at most the interval, and its interval of 1000 steps, but at most a tenth of the run, so that runs shorter than
    theirs (12,505 steps and more) have resets, too. If only `window` is given, windows lie back to back: AMD's Primus
    takes a window of 200 steps, a threshold of 3 and a start of 1500 (`optimizer/weight_deosc.py`). TetraJet-v2
    resets one step after the last step of a window; here it is directly after it. The state of an open window is part
    of `state_dict`.

    `model` is attached at once, unless it is None. Raises ValueError for a start that is neither a share nor a number
    of steps or leaves no window in the run, for an interval, a window or a run of less than one step, for a window
    longer than the interval, and for a threshold that is not positive.
    """

    can_shard = False

    def __init__(
        self,
        model: nn.Module | None,
        total_steps: int,
        start: float = START,
        interval: int | None = None,
        threshold: float = OSCILLATION_THRESHOLD,
        window: int | None = None,
    ) -> None:
        if interval is None:
            interval = max(1, min(INTERVAL, total_steps // 10)) if window is None else window
        window = min(RESET_WINDOW, interval) if window is None else window
        if start < 0 or (start > 1 and start % 1) or min(interval, window, total_steps) < 1 or threshold <= 0:
            raise ValueError(
                "need a start that is a share or a number of steps, interval, window and total_steps of at least 1 and "
                f"a positive threshold; got {start}, {interval}, {window}, {total_steps} and {threshold}"
            )
        if window > interval:
            raise ValueError(
                f"--osci-reset-window must be at most --osci-reset-interval, {interval}, got {window}; lower it"
            )
        if start > 1 and start + window > total_steps:
            raise ValueError(
                f"--osci-reset-start must leave the window of {window} steps within the run's {total_steps}, "
                f"got {start:g}; lower it"
            )
        super().__init__()
        self.threshold, self.interval, self.window = threshold, interval, window
        self.start = max(1, ceil(start * total_steps if start <= 1 else start))
        """The number of optimizer steps before the first window."""
        self._paths: PathLengths | None = None
        self._next: tuple[int, PathLengths | None] | None = None
        """(n, window): `window` replaces `_paths` once n optimizer steps have been counted."""
        if model is not None:
            self.attach(model)

    @classmethod
    def from_options(cls, options: OsciResetOptions, length: RunLength) -> OsciReset:
        return cls(
            None,
            length.steps,
            options.osci_reset_start,
            options.osci_reset_interval,
            options.osci_reset_threshold,
            options.osci_reset_window,
        )

    def attach(self, model: nn.Module) -> None:
        """Raises ValueError for a model without weights that Q2 quantizes without Q-EMA."""
        self.model, self._layers = model, plain_weight_linears(model)
        self.resets = torch.zeros((), dtype=torch.int64, device=self._layers[0].weight.device)
        """The number of resets so far, of all weights together."""

    @torch.no_grad()
    def after_step(self, skip: Tensor | None = None) -> None:
        """No weight moves in a skipped step, so recording it adds nothing to the paths."""
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
            resets_now = ratios[layer.weight] >= self.threshold
            if skip is not None:
                resets_now &= skip == 0
            layer.weight.copy_(torch.where(resets_now, layer.quantized_weight(), layer.weight))
            self.resets += resets_now.sum()

    def log_numbers(self) -> dict[str, float]:
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
