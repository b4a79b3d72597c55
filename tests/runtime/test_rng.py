"""States of the random generators: what is drawn after restoring one is what was drawn after saving it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from quantization.optim.rewound import rewound
from runtime.rng import rng_state, set_rng_state

FIRST_AFTER_SEED_0 = (0.8444218515250481, 0.5488135039273248)
"""The first numbers that the Mersenne Twisters of Python and numpy draw after seed 0."""


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def draws() -> tuple[float, float]:
    return random.random(), np.random.rand()


def test_a_state_that_was_in_a_file_repeats_the_draws(tmp_path, device):
    """Also the second of a pair of normal numbers, which numpy keeps between two calls."""
    seed(0)
    np.random.randn()
    torch.save(rng_state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    expected = np.random.randn(), random.random(), torch.rand(3), torch.rand(3, device=device)
    seed(1)
    set_rng_state(state)
    got = np.random.randn(), random.random(), torch.rand(3), torch.rand(3, device=device)
    assert got[:2] == expected[:2]
    assert all(torch.equal(a, b) for a, b in zip(got[2:], expected[2:]))


def test_a_restored_state_draws_the_known_first_numbers_of_its_seed():
    seed(0)
    state = rng_state()
    seed(1)
    set_rng_state(state)
    assert draws() == FIRST_AFTER_SEED_0


@pytest.mark.parametrize("fails", [False, True])
def test_rewinding_a_model_rewinds_the_generators(fails, device):
    """The body of `rewound` draws from every generator; afterwards each one draws what it would have drawn."""
    model = nn.Linear(2, 2)
    seed(0)
    tensors = torch.rand(3), torch.rand(3, device=device)
    seed(0)
    try:
        with rewound(model, torch.optim.SGD(model.parameters())):
            draws(), torch.rand(3), torch.rand(3, device=device)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert draws() == FIRST_AFTER_SEED_0
    assert all(torch.equal(a, b) for a, b in zip((torch.rand(3), torch.rand(3, device=device)), tensors))
