"""Batches of an epoch by position, and what their augmentation draws."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from data.epoch_order import EpochBatches, PlannedBatches, drawing_from


class Draws(Dataset):
    """Every sample is its index and a number from each generator."""

    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()).item(), np.random.rand(), random.random()])


def batches(order: int, rank: int = 0, first: int = 0, workers: int = 0) -> list[torch.Tensor]:
    sampler = EpochBatches(DistributedSampler(Draws(), num_replicas=1, rank=0), 3, drop_last=True)
    sampler.set_epoch(order, rank, first)
    assert len(sampler) == 4
    return list(DataLoader(PlannedBatches(Draws()), batch_sampler=sampler, collate_fn=torch.clone, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_an_epoch_can_be_entered_anywhere_by_any_number_of_workers(first, workers):
    whole, part = batches(5), batches(5, first=first, workers=workers)
    assert len(whole) == 4 and len(part) == 4 - first
    assert all(torch.equal(a, b) for a, b in zip(whole[first:], part))


def test_other_epochs_ranks_and_positions_draw_other_numbers():
    drawn = [batch[:, 1:] for order, rank in ((5, 0), (6, 0), (5, 1)) for batch in batches(order, rank)]
    assert torch.cat(drawn).unique().numel() == 3 * 4 * 3 * 3


def test_the_generators_are_left_as_they_were():
    def draw() -> list[float]:
        return [torch.rand(()).item(), np.random.rand(), random.random()]

    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    wanted = draw()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    with pytest.raises(KeyError), drawing_from((1, 2, 3)):
        assert draw() != wanted
        raise KeyError
    assert draw() == wanted
