"""Philox in Triton: the draws of `quantization/philox.py`, bit for bit, in registers."""

from __future__ import annotations

import os

import triton
import triton.language as tl

from ..philox import COUNTER_COLUMNS, COUNTER_ROWS, KEY_INCREMENTS, MULTIPLIERS, ROUNDS, WORD_BITS, WORD_MASK

ROWS_OF_COUNTER, COLUMNS_OF_COUNTER = tl.constexpr(COUNTER_ROWS), tl.constexpr(COUNTER_COLUMNS)

_M0, _M1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
_K0, _K1 = tl.constexpr(KEY_INCREMENTS[0]), tl.constexpr(KEY_INCREMENTS[1])
_ROUNDS = tl.constexpr(ROUNDS)
_WORD_BITS = tl.constexpr(WORD_BITS)
_WORD_MASK = tl.constexpr(WORD_MASK)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_ONE = tl.constexpr(1)  # what stands to the left of a constexpr must be one


def _rounds_ptx() -> str:
    """The rounds of Philox, from words $4 to $7 and key $8, $9 to words $0 to $3: one wide product, not two halves."""
    lines = ["mov.u32 a, $4; mov.u32 b, $5; mov.u32 c, $6; mov.u32 d, $7; mov.u32 k, $8; mov.u32 l, $9;"]
    for _ in range(ROUNDS):
        lines += [f"mul.wide.u32 p, a, {MULTIPLIERS[0]}; mul.wide.u32 q, c, {MULTIPLIERS[1]};"]
        lines += ["mov.b64 {lp, hp}, p; mov.b64 {lq, hq}, q;"]
        lines += ["xor.b32 a, hq, b; xor.b32 a, a, k; xor.b32 c, hp, d; xor.b32 c, c, l; mov.u32 b, lq; mov.u32 d, lp;"]
        lines += [f"add.u32 k, k, {KEY_INCREMENTS[0]}; add.u32 l, l, {KEY_INCREMENTS[1]};"]
    lines += ["mov.u32 $0, a; mov.u32 $1, b; mov.u32 $2, c; mov.u32 $3, d;"]
    registers = ".reg .u32 a, b, c, d, k, l, lp, hp, lq, hq; .reg .u64 p, q;"
    return "{" + registers + "\n" + "\n".join(lines) + "}"


_ROUNDS_PTX = tl.constexpr(_rounds_ptx())


@triton.jit
def _philox(c0, c1, key):
    """Philox-4x32 of the counters (c0, c1, 0, 0), int32 of one shape, and an int64 key: four uint32 words."""
    c0 = c0.to(tl.uint32, bitcast=True)
    c1 = c1.to(tl.uint32, bitcast=True)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    key = key.to(tl.uint64, bitcast=True)
    k0 = (key & _WORD_MASK).to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    if not _INTERPRETED:
        return tl.inline_asm_elementwise(
            _ROUNDS_PTX,
            "=r,=r,=r,=r,r,r,r,r,r,r",
            [c0, c1, c2, c3, k0, k1],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    m0 = tl.full(c0.shape, _M0, tl.uint32)
    m1 = tl.full(c0.shape, _M1, tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high0 = tl.umulhi(m0, c0)
        high1 = tl.umulhi(m1, c2)
        low0 = m0 * c0
        low1 = m1 * c2
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = (k0 + _K0).to(tl.uint32)
        k1 = (k1 + _K1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def tile_draws(key, c1, c0, BITS: tl.constexpr, LANES: tl.constexpr):
    """The draws of a tile from an int64 key, int32 [4 I, 2 J], whose counters are (c0, c1), int32 [I, J].

    Counter (i, j) of the tile serves the columns 2 j and 2 j + 1, and four rows: with k = i // LANES and l = i % LANES,
    the rows (4 k + 0 .. 3) * LANES + l. They are neighbours if LANES is 1. Where as many lanes as LANES share a column
    they are the rows of one thread, which so needs no other thread's draws.
    """
    I: tl.constexpr = c1.shape[0]  # noqa: E741
    J: tl.constexpr = c0.shape[1]
    w0, w1, w2, w3 = _philox(tl.broadcast_to(c0, (I, J)), tl.broadcast_to(c1, (I, J)), key)
    # Joining (w0, w2) with (w1, w3) lays the words out in the order w0 w1 w2 w3.
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    low = word & ((_ONE << BITS) - 1)
    high = word >> (_WORD_BITS - BITS)
    both = tl.join(low, high).to(tl.int32, bitcast=True)  # [I, J, 2, 2, 2]: word, word, column
    both = both.reshape(I // LANES, LANES, J, 2, 2, 2)
    return both.permute(0, 3, 4, 1, 2, 5).reshape(4 * I, 2 * J)
