"""SIGTERM, SIGUSR1 and ctrl-C end a run after its next step, the same one in all processes."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

import torch

from runtime import processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_SIGNAL = 1.0
"""Seconds within which signals count as one: a scheduler signals every process, and torchrun passes its own on."""
AGREE_EVERY = 10
"""Steps between two agreements of several processes, each of which waits for all of them and for the device."""


class Interrupts:
    """A context that remembers the first signal. A second one, over a second later, ends the process at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.received: signal.Signals | None = None

    def __enter__(self) -> Interrupts:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def agreed(self, step: int | None = None) -> bool:
        """Return True if any process has received a signal. Every process must call it at the same step.

        Several processes communicate only at every `AGREE_EVERY`th `step`, or if no step is given.
        """
        if processes.world_size() == 1:
            return self.received is not None
        if step is not None and step % AGREE_EVERY:
            return False
        asked = torch.tensor(float(self.received is not None), device=self.device)
        return processes.all_reduce_sum(asked).item() > 0


def leave_to_parent(worker: int) -> None:
    """Make a loader process ignore the signals that a scheduler sends to all processes: its parent ends first."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
