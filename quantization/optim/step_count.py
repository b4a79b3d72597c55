"""Counts optimizer steps without a host sync: the skip flag is decided on the GPU and read one step later."""

from __future__ import annotations

import torch
from torch import Tensor


def count_steps(counters: list[Tensor], skip: Tensor | None) -> None:
    """Add one to every counter, in place, unless `skip`, a scalar of 0 or 1 beside them, is 1."""
    if skip is None:
        torch._foreach_add_(counters, 1)
    else:  # a list, because PyTorch would read a single tensor as a number, and the host would wait for it
        torch._foreach_add_(counters, [(1 - skip).to(counters[0].dtype)] * len(counters))


class Flag:
    """A scalar of 0 or 1 on the device, which the host can read without waiting for the device's later work."""

    def __init__(self, flag: Tensor) -> None:
        self._on_host, self._known = flag.to("cpu", non_blocking=True, copy=True), None
        if flag.is_cuda:
            self._known = torch.cuda.Event()
            self._known.record()

    def __bool__(self) -> bool:
        if self._known is not None:
            self._known.synchronize()
        return bool(self._on_host)


class StepCount:
    """Counts the optimizer steps that were not skipped. The flag of the newest one is read when the count is read."""

    def __init__(self) -> None:
        self.step = 0

    @property
    def step(self) -> int:
        """The number of optimizer steps done."""
        if self._newest is not None:
            self._step += not self._newest
            self._newest = None
        return self._step

    @step.setter
    def step(self, done: int) -> None:
        self._step, self._newest = done, None

    def count(self, skip: Tensor | None) -> None:
        """Count one more step, unless `skip`, a scalar on the device, is 1."""
        done = self.step
        self.step = done + (skip is None)
        self._newest = None if skip is None else Flag(skip)
