"""Random bits: known answers, and what stochastic rounding needs of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantization import Element
from quantization.philox import element_draws, fresh_keys, philox

# What Random123 (Salmon et al. 2011) publishes for philox4x32-7 in its file kat_vectors: counter, key, words.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
    ),
]
BITS = [element.format.random_bits for element in Element]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words, device):
    tensors = [torch.tensor([word], device=device) for word in counter]
    result = philox(tuple(tensors), tuple(torch.tensor(k, device=device) for k in key))
    assert [word.item() for word in result] == words
    assert philox(tuple(counter), tuple(key)) == tuple(words)  # plain integers too


def test_draws_are_uniform_and_depend_on_every_bit_of_the_key(device):
    key, bits = torch.tensor([0x0123456789ABCDEF], device=device), 22
    draws = element_draws(key, 256, 256, bits)
    assert draws.shape == (256, 256) and draws.min() >= 0 and draws.max() < 2**bits
    # 65,536 draws: the mean of a draw has a standard error of 2**22 / sqrt(12 * 65536) = 4730.
    assert abs(draws.double().mean() - (2**bits - 1) / 2) < 4 * 4730
    for shift in (0, 9, 18):  # four of the lowest, middle and highest bits
        counts = torch.bincount((draws >> shift & 15).flatten(), minlength=16).double()
        assert ((counts - 4096) ** 2 / 4096).sum() < 45  # chi-square of 15 degrees of freedom: P < 1e-4
    for flipped in range(0, 64, 7):
        mask = torch.tensor([1 << flipped if flipped < 63 else -(2**63)], device=device)
        assert (element_draws(key ^ mask, 256, 256, bits) == draws).double().mean() < 1e-3


@pytest.mark.parametrize("bits", BITS)
def test_draws_are_the_low_and_high_bits_of_the_counters_words(bits, device):
    """Element (r, c): counter (c // 2, r // 4, 0, 0), word r % 4, its low bits for an even c and its high ones else."""
    key = 0x0123456789ABCDEF
    draws = element_draws(torch.tensor([key], device=device), 7, 5, bits).tolist()
    for r, row in enumerate(draws):
        for c, draw in enumerate(row):
            word = philox((c // 2, r // 4, 0, 0), (key & 0xFFFFFFFF, key >> 32))[r % 4]
            assert draw == (word >> (32 - bits) if c % 2 else word % 2**bits)


def test_a_draw_depends_on_the_place_of_its_element_alone(device):
    key = torch.tensor([7], device=device)
    assert torch.equal(element_draws(key, 3, 5, 22), element_draws(key, 9, 66, 22)[:3, :5])
    assert element_draws(key, 0, 5, 22).shape == (0, 5) and element_draws(key, 5, 0, 22).shape == (5, 0)


def test_no_two_counters_share_their_draws(device):
    draws = element_draws(torch.tensor([7], device=device), 40, 160, 22)
    counters = draws.view(10, 4, 80, 2).permute(0, 2, 1, 3).reshape(800, 8)
    assert len(counters.unique(dim=0)) == 800


@pytest.mark.parametrize(("bits", "bound"), list(zip(BITS, (2**-12, 2**-11))))
def test_the_two_draws_of_a_word_are_nearly_independent(bits, bound):
    """Cov[low >= a, high >= b] over all 2**32 words is within the bound that philox.py states, and not zero.

    The last bits of the high draw are the first of the low one, the middle of the word. Given those, the two draws
    are independent, so each middle gives one product of two counts. All thresholds are tried near multiples of a
    32nd, where the bound is nearly reached, and random ones.
    """
    overlap = 2 * bits - 32
    middle, free = np.arange(2**overlap), 2.0 ** (32 - bits)
    rng = np.random.default_rng(0)
    near = [k * 2**bits // 32 + d for k in range(1, 32) for d in (0, 2 ** (overlap - 1))]
    thresholds = [*near, *rng.integers(1, 2**bits, 40)]
    # low = middle * 2**(32 - bits) + others, and high = others * 2**overlap + middle.
    low = {a: np.clip((middle + 1) * free - a, 0, free) / free for a in thresholds}
    high = {b: np.clip(free - np.ceil((b - middle) / 2**overlap), 0, free) / free for b in thresholds}
    covariances = [(low[a] * high[b]).mean() - low[a].mean() * high[b].mean() for a in thresholds for b in thresholds]
    assert bound / 8 < max(map(abs, covariances)) <= bound


def test_fresh_keys_have_64_bits(device):
    keys = fresh_keys(200, device).tolist()
    for bit in range(64):
        assert 50 < sum(key >> bit & 1 for key in keys) < 150


def test_fresh_keys_follow_the_generator(device):
    torch.manual_seed(3)
    first, second = fresh_keys(4, device), fresh_keys(4, device)
    assert first.unique().numel() == 4 and not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(fresh_keys(4, device), first)
    generator = torch.Generator().manual_seed(5)
    own = fresh_keys(2, device, generator)
    assert own.device.type == device.type
    assert torch.equal(own, fresh_keys(2, device, generator.manual_seed(5)))
