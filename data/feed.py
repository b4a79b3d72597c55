"""Brings the batches of a loader to the device and finishes them there, while the device works on the step before."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = tuple[Tensor, ...]


class Feed:
    """Serves (images, labels) on `device`, and measures for how long a GPU waited for them.

    On a GPU, copies and augmentation run in a stream of their own. The caller asks for the next batch when it has
    launched a step, so both overlap with that step; a batch's memory is used by two steps in turn.
    """

    def __init__(self, loader: DataLoader, device: torch.device, finish: Callable[..., Tensor] | None = None) -> None:
        self.loader, self.device = loader, device
        self.finish = finish
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pauses: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @classmethod
    def of(cls, loader: DataLoader | Feed, device: torch.device) -> Feed:
        """The loader itself if it is a feed, else one of its batches as they are."""
        return loader if isinstance(loader, Feed) else cls(loader, device)

    @property
    def dataset(self) -> Dataset:
        return self.loader.dataset

    @property
    def batch_sampler(self) -> Sampler:
        return self.loader.batch_sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self.loader)
        self._pauses.clear()  # those of an evaluation, which nobody asked for
        while True:
            asked = self._mark()
            batch = next(batches, None)
            if batch is None:
                return
            served = self._serve(batch)
            if asked is not None:
                self._pauses.append((asked, self._mark()))
            yield served

    def take_waited(self) -> float:
        """Seconds, since the last call, between the end of a step's work on the GPU and the arrival of the next batch.

        The GPU's own clock measures them. Pauses that have not ended count in the next call. 0 on a CPU.
        """
        done = [pause for pause in self._pauses if pause[1].query()]
        self._pauses = self._pauses[len(done) :]
        return sum(start.elapsed_time(end) for start, end in done) / 1000

    def _mark(self) -> torch.cuda.Event | None:
        """A point in time of the GPU's work on steps."""
        if self._stream is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _serve(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self._stream is None:
            return self._finished(batch)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            served = self._finished(batch)
        current.wait_stream(self._stream)
        for tensor in served:
            tensor.record_stream(current)  # its memory is free for another batch when the step has read it
        return served

    def _finished(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels, *rest = batch
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
        return images if self.finish is None else self.finish(images, *rest), labels
