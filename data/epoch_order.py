"""Which images make which batch of an epoch, and where the random numbers of a batch's augmentation come from.

Both are functions of seed, epoch, rank and the batch's position in the epoch, and of nothing that happened before: not
of the worker that serves the batch, nor of how many there are. So an epoch can be entered at any batch.
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
    """What its augmentation's random numbers follow from."""
    indices: list[int]


class EpochBatches(BatchSampler):
    """The batches of `sampler`'s order from `first` on; the length is that of the whole epoch."""

    first, key = 0, (0,)

    def set_epoch(self, order: int, rank: int, first: int = 0) -> None:
        self.sampler.set_epoch(order)
        self.key, self.first = (order, rank), first

    def __iter__(self) -> Iterator[BatchPlan]:
        for position, indices in enumerate(super().__iter__()):
            if position >= self.first:
                yield BatchPlan((*self.key, position), indices)


class PlannedBatches(Dataset):
    """`dataset` by `BatchPlan`: whole batches, whose augmentation draws from the plan's key."""

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
    """Within, the CPU's global generators of torch, numpy and Python start from `key`; on leaving they are as before.

    Takes a tenth of a millisecond. Generators of GPUs, which a loader's process must not touch, are left alone.
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
