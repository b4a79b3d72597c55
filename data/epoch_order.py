"""The batches of an epoch: which images each one has, and where its augmentation's random numbers come from.

Both follow from the seed, the epoch, the rank and the batch's position in the epoch alone. They depend neither on what
happened before nor on which worker serves the batch or how many workers there are, so a run can resume at any batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset, default_collate


class BatchPlan(NamedTuple):
    """A batch before it is loaded."""

    key: tuple[int, ...]
    """The random numbers of the batch's augmentation follow from it."""
    indices: list[int]


class EpochBatches(BatchSampler):
    """Batches in the order of `sampler`, from batch `first` on. The length is that of the whole epoch."""

    first, key = 0, (0,)

    def set_epoch(self, order: int, rank: int, first: int = 0) -> None:
        self.sampler.set_epoch(order)
        self.key, self.first = (order, rank), first

    def __iter__(self) -> Iterator[BatchPlan]:
        for position, indices in enumerate(super().__iter__()):
            if position >= self.first:
                yield BatchPlan((*self.key, position), indices)


class PlannedBatches(Dataset):
    """Serves a whole batch of `dataset` for a `BatchPlan`. Its augmentation draws from the plan's key."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, plan: BatchPlan) -> object:
        with drawing_from(plan.key):
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(plan.indices)
            return default_collate([self.dataset[i] for i in plan.indices])


@contextmanager
def drawing_from(key: tuple[int, ...]) -> Iterator[None]:
    """Inside the `with` block, the CPU's global generators of torch, numpy and Python start from `key`.

    On leaving, they are as before. Entering and leaving take a tenth of a millisecond together. Generators of GPUs stay
    untouched, because a loader's worker process must not use a GPU.
    """
    saved = torch.get_rng_state(), np.random.get_state(), random.getstate()
    words = np.random.SeedSequence(key).generate_state(4)
    torch.default_generator.manual_seed(int.from_bytes(words[:2].tobytes(), "little"))
    np.random.seed(words)
    random.seed(words.tobytes())
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        np.random.set_state(saved[1])
        random.setstate(saved[2])
