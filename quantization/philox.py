"""Counter-based random bits: the bits of an element are a function of a 64-bit key and of its index alone.

The generator is Philox-4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). One counter
gives four 32-bit words, here eight 16-bit draws. No state is kept, so a kernel, this file, a recomputation and a
resumed run agree if they have the same key.

Shapes: R rows, G groups in a row, E = 32 elements in a group.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

try:
    from torch._functorch.compile_utils import rand_ops
except ImportError:  # the list is private, and newer releases may not need it
    rand_ops = []

from .formats import GROUP_SIZE, RANDOM_BITS

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10  # the kernels take it from here
WORD_MASK = 0xFFFFFFFF
DRAWS_PER_COUNTER = 4 * 32 // RANDOM_BITS
COUNTERS_PER_GROUP = GROUP_SIZE // DRAWS_PER_COUNTER

Integers = Tensor | np.ndarray | int
Words = tuple[Integers, Integers, Integers, Integers]


def fresh_keys(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draw `count` independent 64-bit keys, as int64 on `device`.

    They come from `generator`, or from PyTorch's default generator of `device`. Drawing on the device itself needs
    no host synchronisation. Code that saves and restores that generator (activation checkpointing, a training
    checkpoint) repeats the keys, and with them every rounding.
    """
    if generator is None:
        return torch.ops.mxfp4.draw_keys(count, device) if torch.compiler.is_compiling() else _randint(count, device)
    return _randint(count, generator.device, generator).to(device, non_blocking=True)


def _randint(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device, generator=generator)


# A graph of torch.compile would replace `randint` by a generator of its own. Inside an operator of ours, the keys come
# from PyTorch's generator there, too. The tag keeps the compiler from merging two draws into one; PyTorch 2.11 needs
# the entry in its list for that, or all layers would get the same keys in the backward pass. This low-level interface
# takes a fifth of the time per call of `torch.library.custom_op`.
_LIBRARY = torch.library.Library("mxfp4", "DEF")
_LIBRARY.define("draw_keys(int count, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_LIBRARY.impl("draw_keys", _randint, "CompositeExplicitAutograd")
rand_ops.append(torch.ops.mxfp4.draw_keys)


@torch.library.register_fake("mxfp4::draw_keys")
def _fake_keys(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=device)


def philox(counter: Words, key: tuple[Integers, Integers]) -> Words:
    """Philox-4x32-10. Tensors, numpy arrays or integers hold the words, 32-bit values in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps modulo 2**64, which leaves both 32-bit halves of the unsigned product intact.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) & WORD_MASK) ^ c1 ^ k0
        c2 = ((product0 >> 32) & WORD_MASK) ^ c3 ^ k1
        c1, c3 = product1 & WORD_MASK, product0 & WORD_MASK
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & WORD_MASK, (k1 + KEY_INCREMENTS[1]) & WORD_MASK
    return c0, c1, c2, c3


def group_bits(key: Tensor, rows: int, groups: int) -> Tensor:
    """16 random bits for every element of R x G groups, as int32 [R, G, E] in [0, 65536).

    `key` is one int64. Group i = row * G + group uses counters 4 i .. 4 i + 3; counter j serves the group's elements
    8 j .. 8 j + 7, two from each word, the low half first.
    """
    index, key = torch.arange(rows * groups * COUNTERS_PER_GROUP, device=key.device), key.reshape(())
    use_numpy = key.device.type == "cpu" and not torch.compiler.is_compiling()
    if use_numpy:  # numpy takes a fifth of PyTorch's time for small integer operations
        index, key = index.numpy(), key.item()
    zero = index & 0
    words = philox((index & WORD_MASK, index >> 32, zero, zero), (key & WORD_MASK, (key >> 32) & WORD_MASK))
    if use_numpy:
        words = tuple(map(torch.from_numpy, words))
    halves = torch.stack(words, dim=-1).to(torch.int32).view(torch.int16)  # little-endian: the low half first
    return (halves.to(torch.int32) & 0xFFFF).view(rows, groups, GROUP_SIZE)
