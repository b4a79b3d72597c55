"""Counter-based random bits: the bits of an element are a function of a 64-bit key and of the element's place alone.

The generator is Philox-4x32 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), with 7 rounds,
the fewest with which they saw it pass BigCrush. No state is kept, so a kernel, this file, a recomputation and a resumed
run agree if they have the same key.

One counter serves four rows by two columns of a matrix. Each of its four 32-bit words serves one row: its low bits the
even column, its high bits the odd one. An element format leaves 22 or 23 bits of an fp32 mantissa, so the two draws of
a word overlap in 12 or 14 bits. Each draw is uniform, which is what unbiased rounding needs. The two are not
independent, but nearly so: the bits that overlap are the last ones of the high draw, so the covariance of the two
roundings is at most 2**-12 (E2M1) or 2**-11 (E3M0) of their grid spacings' product (tested; independent draws have 0,
equal draws up to 2**-2).

Shapes: R rows, C columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

try:
    from torch._functorch.compile_utils import rand_ops
except ImportError:  # the list is private, and newer releases may not need it
    rand_ops = []

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7  # the kernels take it from here
WORD_BITS = 32
WORD_MASK = 0xFFFFFFFF
COUNTER_ROWS, COUNTER_COLUMNS = 4, 2  # the elements that one counter serves

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
    """Philox-4x32-7. Tensors, numpy arrays or integers hold the words, 32-bit values in int64."""
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


def element_draws(key: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """`bits` random bits, 16 to 31, for each element of a matrix, as int32 [R, C].

    `key` is one int64. The element (r, c) has the counter (c // 2, r // 4, 0, 0) and of its four words the word r % 4:
    the low `bits` of it if c is even, the high ones if c is odd. So an element's draw does not depend on R and C.
    """
    counter_rows, counter_columns = -(-rows // COUNTER_ROWS), -(-columns // COUNTER_COLUMNS)
    c0 = torch.arange(counter_columns, device=key.device)[None, :]
    c1 = torch.arange(counter_rows, device=key.device)[:, None]
    key = key.reshape(())
    use_numpy = key.device.type == "cpu" and not torch.compiler.is_compiling()
    if use_numpy:  # numpy takes a fifth of PyTorch's time for small integer operations
        c0, c1, key = c0.numpy(), c1.numpy(), key.item()
    words = philox((c0, c1, 0 * c0, 0 * c0), (key & WORD_MASK, (key >> 32) & WORD_MASK))
    words = torch.stack([torch.from_numpy(word) if use_numpy else word for word in words], dim=1)
    words = words.view(counter_rows * COUNTER_ROWS, counter_columns)
    draws = torch.stack((words & ((1 << bits) - 1), words >> (WORD_BITS - bits)), dim=-1)
    return draws.to(torch.int32).flatten(1)[:rows, :columns]
