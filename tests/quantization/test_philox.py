"""Random bits: known answers, and what stochastic rounding needs of them."""

from __future__ import annotations

import pytest
import torch

from quantization.philox import fresh_keys, group_bits, philox

# The three test vectors that Random123 (Salmon et al. 2011) publishes for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words, device):
    tensors = [torch.tensor([word], device=device) for word in counter]
    result = philox(tuple(tensors), tuple(torch.tensor(k, device=device) for k in key))
    assert [word.item() for word in result] == words
    assert philox(tuple(counter), tuple(key)) == tuple(words)  # plain integers too


def test_group_bits_are_uniform_and_depend_on_every_bit_of_the_key(device):
    key = torch.tensor([0x0123456789ABCDEF], device=device)
    bits = group_bits(key, rows=256, groups=8)
    assert bits.shape == (256, 8, 32) and bits.min() >= 0 and bits.max() < 2**16
    # 65,536 draws: the mean of a 16-bit draw has a standard error of 2**16 / sqrt(12 * 65536) = 73.9.
    assert abs(bits.double().mean() - 32767.5) < 4 * 73.9
    counts = torch.bincount((bits >> 12).flatten(), minlength=16).double()
    assert ((counts - 4096) ** 2 / 4096).sum() < 45  # chi-square of 15 degrees of freedom: P < 1e-4
    for flipped in range(0, 64, 7):
        mask = torch.tensor([1 << flipped if flipped < 63 else -(2**63)], device=device)
        assert (group_bits(key ^ mask, 256, 8) == bits).double().mean() < 1e-3


def test_group_bits_are_the_words_of_their_counters(device):
    """Group i has counters 4 i to 4 i + 3 in the lowest word; the four words of each give eight halves, low first."""
    key = 0x0123456789ABCDEF
    bits = group_bits(torch.tensor([key], device=device), rows=3, groups=5).view(-1, 8).tolist()
    for counter, halves in enumerate(bits):
        words = philox((counter, 0, 0, 0), (key & 0xFFFFFFFF, key >> 32))
        assert halves == [half for word in words for half in (word & 0xFFFF, word >> 16)]


def test_bits_of_an_element_do_not_depend_on_the_number_of_rows(device):
    key = torch.tensor([7], device=device)
    assert torch.equal(group_bits(key, 3, 5), group_bits(key, 9, 5)[:3])


def test_no_two_groups_share_their_bits(device):
    bits = group_bits(torch.tensor([7], device=device), 40, 5).view(-1, 32)
    assert len(bits.unique(dim=0)) == 200 and bits.view(-1, 8).unique(dim=0).shape[0] == 800


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
