"""MX quantization in Triton: the four functions of `reference.py`, bit for bit.

A program reads a tile once and writes whatever was asked for: values, packed codes, scales. No noise tensor exists;
the random bits are computed in registers. Arithmetic on scales and steps is done on fp32 bit patterns, so that no
rounding, flushing or reordering by a compiler can change a decision.

Shapes are those of `reference.py`: R rows, L elements in a row, G groups in a row, B bytes of codes in a row; N x C is
a matrix that is quantized along both axes.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import (
    FP8_ROW_MULTIPLE,
    FP32_EXPONENT_BIAS,
    FP32_EXPONENT_MASK,
    FP32_MAGNITUDE_MASK,
    FP32_MANTISSA_BITS,
    FP32_MANTISSA_MASK,
    FP32_NAN,
    FP32_SUBNORMAL_HALF,
    GROUP_SIZE,
    MAX_MAGNITUDE_CODE,
    RANDOM_BITS,
    SCALE_NAN,
    SIGN_CODE,
    ZERO_GROUP_BITS,
    Element,
    Fp8,
    Rounding,
    Scaling,
    fp8_range,
)
from ..philox import COUNTERS_PER_GROUP, KEY_INCREMENTS, MULTIPLIERS, ROUNDS, WORD_MASK
from ..recipe import Quantizer
from ..reference import TORCH_FP8, Operand, Packed, Quantized, largest_quantized

_BIAS = tl.constexpr(FP32_EXPONENT_BIAS)
_EXPONENT_MASK = tl.constexpr(FP32_EXPONENT_MASK)
_MAGNITUDE_MASK = tl.constexpr(FP32_MAGNITUDE_MASK)
_MANTISSA_BITS = tl.constexpr(FP32_MANTISSA_BITS)
_MANTISSA_MASK = tl.constexpr(FP32_MANTISSA_MASK)
_NAN = tl.constexpr(FP32_NAN)
_SUBNORMAL_HALF = tl.constexpr(FP32_SUBNORMAL_HALF)
_GROUP = tl.constexpr(GROUP_SIZE)
_MAX_CODE = tl.constexpr(MAX_MAGNITUDE_CODE)
_SCALE_NAN = tl.constexpr(SCALE_NAN)
_CODE_BITS = tl.constexpr(MAX_MAGNITUDE_CODE * 0x11)  # of the two codes in a byte
_SIGN_BITS = tl.constexpr(SIGN_CODE * 0x11)
_ZERO_GROUP = tl.constexpr(ZERO_GROUP_BITS)
_COUNTERS = tl.constexpr(COUNTERS_PER_GROUP)
_M0, _M1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
_K0, _K1 = tl.constexpr(KEY_INCREMENTS[0]), tl.constexpr(KEY_INCREMENTS[1])
_ROUNDS = tl.constexpr(ROUNDS)
_WORD_MASK = tl.constexpr(WORD_MASK)
_RANDOM_BITS = tl.constexpr(RANDOM_BITS)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_ONE, _TWO = tl.constexpr(1), tl.constexpr(2.0)  # what stands to the left of a constexpr must be one

# Which axis of a tile neighbouring threads run along where neither is contiguous; see `_quantize_columns_kernel`.
_FIRST_AXIS_FASTEST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))

_STOCHASTIC = tl.constexpr(1)
_EMA = tl.constexpr(2)
_ROUNDING_INDEX = {Rounding.NEAREST: 0, Rounding.STOCHASTIC: 1, Rounding.EMA: 2}

# Elements in a tile: 32 a thread of one warp. On an H200, 25,216 x 3,072 elements of bf16 took 77 us (Q3) and 85 us
# (Q1) so, 86 us each in tiles of 4,096 and four warps. The interpreter likes few tiles.
_TILE = 4096 if os.environ.get("TRITON_INTERPRET") == "1" else 1024
# Columns of a tile of `_quantize_columns_kernel`, and columns times groups: two columns of 32 elements a thread.
_COLUMN_BLOCK, _COLUMN_TILE = 64, 256


def _philox_ptx() -> str:
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


_PHILOX_PTX = tl.constexpr(_philox_ptx())


@triton.jit
def _philox(counter, key):
    """Philox-4x32-10 of a uint64 counter and an int64 key: four uint32 words."""
    c0 = (counter & _WORD_MASK).to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    key = key.to(tl.uint64, bitcast=True)
    k0 = (key & _WORD_MASK).to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    if not _INTERPRETED:
        return tl.inline_asm_elementwise(
            _PHILOX_PTX,
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
def _draws(counter, key, MANTISSA: tl.constexpr):
    """Random bits just below the last bit of a mantissa, int32 [..., 2, 2, 2] for the eight elements of a counter."""
    w0, w1, w2, w3 = _philox(counter.to(tl.uint64), key)
    # Joining (w0, w2) with (w1, w3) lays the words out in the order w0 w1 w2 w3; each serves two elements.
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    KEPT: tl.constexpr = _MANTISSA_BITS - MANTISSA
    low = (word & 0xFFFF) << (KEPT - _RANDOM_BITS)
    high = (word & 0xFFFF0000) >> (32 - KEPT)
    return tl.join(low, high).to(tl.int32)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest_bits(magnitude, AXIS: tl.constexpr):
    """Bits of the largest of some magnitudes; those of Inf, or more, if there is an Inf or NaN among them."""
    if _INTERPRETED:  # which knows the maximum of integers, and runs any other reduction element by element
        return tl.max(magnitude.to(tl.int32, bitcast=True), axis=AXIS)
    else:
        return tl.reduce(magnitude, AXIS, _larger).to(tl.int32, bitcast=True) & _MAGNITUDE_MASK


@triton.jit
def _largest_finite(bits):
    """Bits of the largest finite magnitude in a tile of fp32 bits; 0 if there is none."""
    magnitude_bits = tl.ravel(bits & _MAGNITUDE_MASK)
    return tl.max(tl.where(magnitude_bits < _EXPONENT_MASK, magnitude_bits, 0), axis=0)


@triton.jit
def _scale_byte(largest_bits, MAX_EXPONENT: tl.constexpr, MAX_MANTISSA: tl.constexpr, TRUNCATION_FREE: tl.constexpr):
    """The scale of groups from the bits of their largest magnitudes."""
    bits = tl.where(largest_bits == 0, _ZERO_GROUP, largest_bits)
    byte = (bits >> _MANTISSA_BITS) - MAX_EXPONENT
    if TRUNCATION_FREE:
        byte += ((bits & _MANTISSA_MASK) > MAX_MANTISSA).to(tl.int32)
    return tl.maximum(byte, 0)


@triton.jit
def _scale_of(byte):
    """fp32 2**(byte - 127); NaN for 0xFF."""
    bits = tl.where(byte == 0, _SUBNORMAL_HALF, byte << _MANTISSA_BITS)
    bits = tl.where(byte == _SCALE_NAN, _NAN, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _inverse_scale_of(byte):
    """fp32 2**(127 - byte) for a finite scale."""
    return ((-byte + 2 * _BIAS) << _MANTISSA_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _load_fp32(ptrs, mask):
    """fp32 of any input. bf16 is the upper half of an fp32, subnormals included."""
    x = tl.load(ptrs, mask=mask, other=0.0)
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _signed(magnitude, sign_bits):
    return (magnitude.to(tl.int32, bitcast=True) | sign_bits).to(tl.float32, bitcast=True)


@triton.jit
def _stored(value, scale, DTYPE: tl.constexpr, LIMIT: tl.constexpr):
    """value * scale in DTYPE, saturated at its largest numbers +-LIMIT; NaN stays NaN."""
    product = value * scale
    if LIMIT > 0:
        product = tl.where(product > LIMIT, LIMIT, product)
        product = tl.where(product < -LIMIT, -LIMIT, product)
    if DTYPE == tl.bfloat16:  # two significant bits: the lower half is zero
        return (product.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    converted = product.to(DTYPE)
    if _INTERPRETED and DTYPE == tl.float8e4nv:  # Triton's interpreter knows no NaN there
        fp8_bits = tl.where(product != product, 0x7F, converted.to(tl.uint8, bitcast=True))
        converted = fp8_bits.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return converted


@triton.jit
def _grid_value(bits, MIN_EXPONENT: tl.constexpr):
    """fp32 value of a code and a sign that stand in the bits of an fp32: codes are small floats, hence rebiased."""
    FROM_SMALLEST: tl.constexpr = _TWO ** (_BIAS - 1 + MIN_EXPONENT)
    return bits.to(tl.float32, bitcast=True) * FROM_SMALLEST


@triton.jit
def _grid_bits(value, MIN_EXPONENT: tl.constexpr):
    """The reverse of `_grid_value`, rounded to the nearest bit."""
    TO_SMALLEST: tl.constexpr = _TWO ** (1 - _BIAS - MIN_EXPONENT)
    return (value * TO_SMALLEST).to(tl.int32, bitcast=True)


@triton.jit
def _code_value(bits, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """fp32 value of the code and sign in the upper four bits of an int32."""
    KEPT: tl.constexpr = _MANTISSA_BITS - MANTISSA
    SIGN_AND_CODE: tl.constexpr = ~_MAGNITUDE_MASK | (_MAX_CODE << KEPT)
    return _grid_value((bits >> (28 - KEPT)) & SIGN_AND_CODE, MIN_EXPONENT)


@triton.jit
def _round_stochastic(y, draw, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """Value on the grid of any y.

    Over the right power of two the grid is that of the smallest fp32 numbers, subnormals included: what is left of the
    bits after adding random ones and cutting is the code.
    """
    KEPT: tl.constexpr = _MANTISSA_BITS - MANTISSA
    UNIT: tl.constexpr = _ONE << (KEPT - _RANDOM_BITS)
    HIGHEST: tl.constexpr = (_ONE << KEPT) - UNIT + UNIT // 2 - 1  # what a draw of zero adds: all bits, rounded
    bits = _grid_bits(y, MIN_EXPONENT) + HIGHEST - draw
    return _grid_value(bits & -(_ONE << KEPT), MIN_EXPONENT)


@triton.jit
def _round_nearest(y, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """Value on the grid of y >= 0; ties to the even code."""
    LEAST_BINADE: tl.constexpr = (_BIAS + MIN_EXPONENT) << _MANTISSA_BITS
    binade_bits = tl.maximum(y.to(tl.int32, bitcast=True) & _EXPONENT_MASK, LEAST_BINADE)
    if MANTISSA > 0:
        # Beside a power of two whose last bit is worth the spacing, fp32 addition rounds to the grid, ties to even.
        unit_bits = binade_bits + ((_MANTISSA_BITS - MANTISSA) << _MANTISSA_BITS)
        unit = unit_bits.to(tl.float32, bitcast=True)
        value = (y + unit) - unit
    else:
        t = y * ((-binade_bits + ((2 * _BIAS) << _MANTISSA_BITS)).to(tl.float32, bitcast=True))
        t_floor = tl.floor(t)
        fraction = t - t_floor
        code = t_floor.to(tl.int32) + ((binade_bits - LEAST_BINADE) >> (_MANTISSA_BITS - MANTISSA))
        code += ((fraction > 0.5) | ((fraction == 0.5) & ((code & 1) == 1))).to(tl.int32)
        value = _grid_value(code << (_MANTISSA_BITS - MANTISSA), MIN_EXPONENT)
    return value


@triton.jit
def _saturate(value, MAX_EXPONENT: tl.constexpr, MAX_MANTISSA: tl.constexpr):
    QP: tl.constexpr = (MAX_MANTISSA / _TWO**_MANTISSA_BITS + 1.0) * _TWO**MAX_EXPONENT
    return tl.maximum(tl.minimum(value, QP), -QP)


@triton.jit
def _round_to_ema(y, ema, negative, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """Value on the grid of y >= 0: the neighbour nearer to `ema`, which is scaled like y and has a sign."""
    LEAST_BINADE: tl.constexpr = (_BIAS + MIN_EXPONENT) << _MANTISSA_BITS
    binade_bits = tl.maximum(y.to(tl.int32, bitcast=True) & _EXPONENT_MASK, LEAST_BINADE)
    inverse_spacing = (-binade_bits + ((2 * _BIAS + MANTISSA) << _MANTISSA_BITS)).to(tl.float32, bitcast=True)
    t = y * inverse_spacing
    t_floor = tl.floor(t)
    ema_t = ema * inverse_spacing
    ema_t = tl.where(negative, -ema_t, ema_t)
    midpoint = t_floor + 0.5
    upper = ((ema_t > midpoint) | ((ema_t == midpoint) & (negative == 0))) & (t > t_floor)
    code = t_floor.to(tl.int32) + ((binade_bits - LEAST_BINADE) >> (_MANTISSA_BITS - MANTISSA)) + upper.to(tl.int32)
    return _grid_value(code << (_MANTISSA_BITS - MANTISSA), MIN_EXPONENT)


@triton.jit
def _fp8_exponent_byte(
    largest_bits,
    MAX_EXPONENT: tl.constexpr,
    MAX_MANTISSA: tl.constexpr,
    TRUNCATION_FREE: tl.constexpr,
    FP8_TOP: tl.constexpr,
):
    """e + 127 of the power of two 2**e that FP8 values are multiplied by."""
    return tl.maximum(_scale_byte(largest_bits, MAX_EXPONENT, MAX_MANTISSA, TRUNCATION_FREE) - FP8_TOP, 1)


@triton.jit
def _fp8_factor(scale_byte, exponent_byte, broken, FP8_BOTTOM: tl.constexpr):
    """fp32 scale of a group over 2**e: 0 for a group out of FP8's range."""
    bits = tl.where(scale_byte < exponent_byte + FP8_BOTTOM, 0, (scale_byte - exponent_byte + _BIAS) << _MANTISSA_BITS)
    return tl.where(broken, _NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def _count_lost(lost_ptr, lost):
    """One by one: adding them up first would take more time in all the tiles that have none."""
    tl.atomic_add(lost_ptr + tl.zeros_like(lost).to(tl.int32), lost.to(tl.int64), mask=lost, sem="relaxed")


@triton.jit
def _quantize_kernel(
    x_ptr,
    ema_ptr,
    ema_active_ptr,
    key_ptr,
    values_ptr,
    codes_ptr,
    scales_ptr,
    largest_ptr,
    operand_scale_ptr,
    lost_ptr,
    rows,
    length,
    num_bytes,
    values_length,
    x_stride_r,
    x_stride_l,
    ema_stride_r,
    ema_stride_l,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MAX_MANTISSA: tl.constexpr,
    TRUNCATION_FREE: tl.constexpr,
    ROUNDING: tl.constexpr,
    HAS_EMA_ACTIVE: tl.constexpr,
    VALUES: tl.constexpr,
    LIMIT: tl.constexpr,
    FP8: tl.constexpr,
    FP8_TOP: tl.constexpr,
    FP8_BOTTOM: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    BLOCK_L: tl.constexpr = BLOCK_G * _GROUP
    num_groups = tl.cdiv(length, _GROUP)
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    g = tl.program_id(1).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    col = tl.program_id(1).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask = (r[:, None] < rows) & (col[None, :] < length)
    x = _load_fp32(x_ptr + r[:, None] * x_stride_r + col[None, :] * x_stride_l, mask)
    x = x.reshape(BLOCK_R, BLOCK_G, _GROUP)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.abs(x)

    largest_bits = _largest_bits(magnitude, 2)
    broken = largest_bits >= _EXPONENT_MASK
    if ROUNDING == _EMA:
        ema_ptrs = ema_ptr + r[:, None] * ema_stride_r + col[None, :] * ema_stride_l
        ema = _load_fp32(ema_ptrs, mask).reshape(BLOCK_R, BLOCK_G, _GROUP)
        ema_bits = ema.to(tl.int32, bitcast=True) & _MAGNITUDE_MASK
        broken = broken | (tl.max(ema_bits, axis=2) >= _EXPONENT_MASK)
    scale_byte = _scale_byte(largest_bits, MAX_EXPONENT, MAX_MANTISSA, TRUNCATION_FREE)
    inverse_scale = _inverse_scale_of(scale_byte)[:, :, None]
    sign_bits = bits & ~_MAGNITUDE_MASK
    if ROUNDING == _STOCHASTIC:
        j = tl.arange(0, _COUNTERS)
        counter = (r[:, None, None] * num_groups + g[None, :, None]) * _COUNTERS + j[None, None, :]
        draw = _draws(counter, tl.load(key_ptr), MANTISSA).reshape(BLOCK_R, BLOCK_G, _GROUP)
        value = _round_stochastic(x * inverse_scale, draw, MANTISSA, MIN_EXPONENT)
    else:
        y = magnitude * inverse_scale
        value = _round_nearest(y, MANTISSA, MIN_EXPONENT)
        if ROUNDING == _EMA:
            by_ema = _round_to_ema(y, ema * inverse_scale, bits < 0, MANTISSA, MIN_EXPONENT)
            if HAS_EMA_ACTIVE:
                active = tl.load(ema_active_ptr) != 0
                by_ema = tl.where(active, by_ema, value)
            value = by_ema
        value = _signed(value, sign_bits)  # also of zero
    if not TRUNCATION_FREE:
        value = _saturate(value, MAX_EXPONENT, MAX_MANTISSA)

    if VALUES:
        if FP8:
            exponent_byte = _fp8_exponent_byte(
                tl.load(largest_ptr), MAX_EXPONENT, MAX_MANTISSA, TRUNCATION_FREE, FP8_TOP
            )
            if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
                tl.store(operand_scale_ptr, _scale_of(exponent_byte))
            factor = _fp8_factor(scale_byte, exponent_byte, broken, FP8_BOTTOM)
            low = (scale_byte < exponent_byte + FP8_BOTTOM) & (largest_bits > 0) & (broken == 0)
            _count_lost(lost_ptr, low)
        else:
            factor = _scale_of(tl.where(broken, _SCALE_NAN, scale_byte))
        values = _stored(value, factor[:, :, None], values_ptr.dtype.element_ty, LIMIT)  # with zeros that fill up a row
        values_mask = (r[:, None] < rows) & (col[None, :] < values_length)
        values_ptrs = values_ptr + r[:, None] * values_length + col[None, :]
        tl.store(values_ptrs, values.reshape(BLOCK_R, BLOCK_L), mask=values_mask)
    if PACK:
        KEPT: tl.constexpr = _MANTISSA_BITS - MANTISSA
        # Sign and code of an element, a few bits apart; then of two, in the places of their nibbles.
        apart = _grid_bits(value, MIN_EXPONENT).to(tl.uint32, bitcast=True) >> KEPT
        low, high = tl.split(apart.reshape(BLOCK_R, BLOCK_G, _GROUP // 2, 2))
        both = low | (high << 4)
        packed = (both & _CODE_BITS) | ((both >> (28 - KEPT)) & _SIGN_BITS)
        packed = packed & tl.where(broken, 0, 0xFF)[:, :, None]
        byte_col = tl.program_id(1).to(tl.int64) * (BLOCK_L // 2) + tl.arange(0, BLOCK_L // 2)
        byte_mask = (r[:, None] < rows) & (byte_col[None, :] < num_bytes)
        code_ptrs = codes_ptr + r[:, None] * num_bytes + byte_col[None, :]
        tl.store(code_ptrs, packed.to(tl.uint8).reshape(BLOCK_R, BLOCK_L // 2), mask=byte_mask)
        scale_byte = tl.where(broken, _SCALE_NAN, scale_byte)
        group_mask = (r[:, None] < rows) & (g[None, :] < num_groups)
        tl.store(scales_ptr + r[:, None] * num_groups + g[None, :], scale_byte.to(tl.uint8), mask=group_mask)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scales_ptr,
    values_ptr,
    rows,
    length,
    num_bytes,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    BLOCK_L: tl.constexpr = BLOCK_G * _GROUP
    num_groups = tl.cdiv(length, _GROUP)
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    g = tl.program_id(1).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    col = tl.program_id(1).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    byte_col = tl.program_id(1).to(tl.int64) * (BLOCK_L // 2) + tl.arange(0, BLOCK_L // 2)
    byte_mask = (r[:, None] < rows) & (byte_col[None, :] < num_bytes)
    packed = tl.load(codes_ptr + r[:, None] * num_bytes + byte_col[None, :], mask=byte_mask, other=0).to(tl.int32)
    group_mask = (r[:, None] < rows) & (g[None, :] < num_groups)
    scale_byte = tl.load(scales_ptr + r[:, None] * num_groups + g[None, :], mask=group_mask, other=0).to(tl.int32)

    value = _code_value(tl.join(packed << 28, packed << 24), MANTISSA, MIN_EXPONENT).reshape(BLOCK_R, BLOCK_L)
    scale = _scale_of(scale_byte)[:, :, None].broadcast_to(BLOCK_R, BLOCK_G, _GROUP).reshape(BLOCK_R, BLOCK_L)
    values = _stored(value, scale, values_ptr.dtype.element_ty, LIMIT)
    mask = (r[:, None] < rows) & (col[None, :] < length)
    tl.store(values_ptr + r[:, None] * length + col[None, :], values, mask=mask)


@triton.jit
def _quantize_columns_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    key_ptr,
    largest_ptr,
    values_ptr,
    operand_scale_ptr,
    sum_ptr,
    lost_ptr,
    rows,
    length,
    num_bytes,
    x_stride_n,
    values_length,
    PACKED: tl.constexpr,
    SOURCE_MANTISSA: tl.constexpr,
    SOURCE_MIN_EXPONENT: tl.constexpr,
    SOURCE_MAX_EXPONENT: tl.constexpr,
    SOURCE_MAX_MANTISSA: tl.constexpr,
    SOURCE_TRUNCATION_FREE: tl.constexpr,
    SOURCE_LIMIT: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MAX_MANTISSA: tl.constexpr,
    TRUNCATION_FREE: tl.constexpr,
    ROUNDING: tl.constexpr,
    FP8: tl.constexpr,
    FP8_TOP: tl.constexpr,
    FP8_BOTTOM: tl.constexpr,
    LIMIT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Groups along the columns of an N x C matrix, written as C x N.

    A tile is E x T x C: the E = 32 elements of a group come first, so that one thread holds all of them and warps are
    spread over columns and over T groups, which lie side by side in the result.
    """
    first_t = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = first_t + tl.arange(0, BLOCK_T)
    n = t[None, :, None] * _GROUP + tl.arange(0, _GROUP)[:, None, None]
    first_c = tl.program_id(1).to(tl.int64) * BLOCK_C
    c = first_c + tl.arange(0, BLOCK_C)
    if PACKED:
        # One byte, two columns, a thread, as below. With no contiguous axis left the compiler takes one by its
        # position, and older releases the other one.
        byte = tl.max_contiguous(first_c // 2 + tl.arange(0, BLOCK_C // 2), 1)
        if _FIRST_AXIS_FASTEST:
            mask = (byte[:, None, None] < num_bytes) & (tl.permute(n, 2, 1, 0) < rows)
            code_ptrs = codes_ptr + byte[:, None, None] + tl.permute(n, 2, 1, 0) * num_bytes
            packed = tl.permute(tl.load(code_ptrs, mask=mask, other=0), 2, 1, 0)
        else:
            mask = (n < rows) & (byte[None, None, :] < num_bytes)
            packed = tl.load(codes_ptr + n * num_bytes + byte[None, None, :], mask=mask, other=0)
        BLOCK_G: tl.constexpr = BLOCK_C // _GROUP
        g = first_c // _GROUP + tl.arange(0, BLOCK_G)
        num_groups = tl.cdiv(length, _GROUP)
        mask = (n < rows) & (g[None, None, :] < num_groups)
        source_byte = tl.load(scales_ptr + n * num_groups + g[None, None, :], mask=mask, other=0).to(tl.int32)
        # 0 becomes 2**-127; a group of NaNs, whose codes are 0, gets the factor Inf.
        scale = tl.maximum(source_byte << _MANTISSA_BITS, _SUBNORMAL_HALF).to(tl.float32, bitcast=True)
        scale = scale[:, :, :, None].broadcast_to(_GROUP, BLOCK_T, BLOCK_G, _GROUP // 2)
        scale = scale.reshape(_GROUP, BLOCK_T, BLOCK_C // 2)
        packed = packed.to(tl.int32)
        low = _code_value(packed << 28, SOURCE_MANTISSA, SOURCE_MIN_EXPONENT) * scale
        high = _code_value(packed << 24, SOURCE_MANTISSA, SOURCE_MIN_EXPONENT) * scale
        x = tl.join(low, high).reshape(_GROUP, BLOCK_T, BLOCK_C)
        if FP8:
            largest_source = _scale_byte(
                tl.load(largest_ptr), SOURCE_MAX_EXPONENT, SOURCE_MAX_MANTISSA, SOURCE_TRUNCATION_FREE
            )
            overflows = largest_source + SOURCE_MAX_EXPONENT > 2 * _BIAS
        else:
            overflows = True
        if overflows:
            x = tl.where(x > SOURCE_LIMIT, SOURCE_LIMIT, tl.where(x < -SOURCE_LIMIT, -SOURCE_LIMIT, x))
    else:
        # Two columns a thread: with all 32 rows in its registers, a group along a column needs no other thread.
        load_c = tl.max_contiguous(first_c.to(tl.int32) + tl.arange(0, BLOCK_C), 2)
        load_n = tl.permute(n, 1, 0, 2) if _FIRST_AXIS_FASTEST else n
        mask = (load_n < rows) & (load_c[None, None, :] < length)
        x = _load_fp32(x_ptr + load_n * x_stride_n + load_c[None, None, :], mask)
        if _FIRST_AXIS_FASTEST:
            x = tl.permute(x, 1, 0, 2)
    if SUM:
        total = tl.sum(tl.sum(x, axis=0), axis=0)
        tl.store(sum_ptr + tl.program_id(0).to(tl.int64) * length + c, total, mask=c < length)

    magnitude = tl.abs(x)
    largest_bits = _largest_bits(magnitude, 0)
    broken = largest_bits >= _EXPONENT_MASK
    scale_byte = _scale_byte(largest_bits, MAX_EXPONENT, MAX_MANTISSA, TRUNCATION_FREE)
    inverse_scale = _inverse_scale_of(scale_byte)[None, :, :]
    if ROUNDING == _STOCHASTIC:
        j = tl.arange(0, _COUNTERS)
        group = c[None, :] * tl.cdiv(rows, _GROUP) + t[:, None]
        draw = _draws(group[None, :, :] * _COUNTERS + j[:, None, None], tl.load(key_ptr), MANTISSA)
        draw = draw.permute(0, 3, 4, 5, 1, 2).reshape(_GROUP, BLOCK_T, BLOCK_C)
        value = _round_stochastic(x * inverse_scale, draw, MANTISSA, MIN_EXPONENT)
    else:
        value = _round_nearest(magnitude * inverse_scale, MANTISSA, MIN_EXPONENT)
        value = _signed(value, x.to(tl.int32, bitcast=True) & ~_MAGNITUDE_MASK)
    if not TRUNCATION_FREE:
        value = _saturate(value, MAX_EXPONENT, MAX_MANTISSA)
    if FP8:
        bound = tl.load(largest_ptr)
        if PACKED:  # Qp times the largest scale that the source's quantizer gave
            bound = ((largest_source + SOURCE_MAX_EXPONENT) << _MANTISSA_BITS) | SOURCE_MAX_MANTISSA
            bound = tl.where(overflows, _EXPONENT_MASK - 1, bound)
        exponent_byte = _fp8_exponent_byte(bound, MAX_EXPONENT, MAX_MANTISSA, TRUNCATION_FREE, FP8_TOP)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(operand_scale_ptr, _scale_of(exponent_byte))
        factor = _fp8_factor(scale_byte, exponent_byte, broken, FP8_BOTTOM)
        _count_lost(lost_ptr, (scale_byte < exponent_byte + FP8_BOTTOM) & (largest_bits > 0) & (broken == 0))
    else:
        factor = _scale_of(tl.where(broken, _SCALE_NAN, scale_byte))
    values = _stored(value, factor[None, :, :], values_ptr.dtype.element_ty, LIMIT)
    values = tl.permute(values, 2, 1, 0).reshape(BLOCK_C, BLOCK_T * _GROUP)
    column_n = first_t * _GROUP + tl.arange(0, BLOCK_T * _GROUP)
    mask = (c[:, None] < length) & (column_n[None, :] < values_length)
    tl.store(values_ptr + c[:, None] * values_length + column_n[None, :], values, mask=mask)


@triton.jit
def _largest_kernel(x_ptr, largest_ptr, rows, length, x_stride_r, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask = (r[:, None] < rows) & (col[None, :] < length)
    x = _load_fp32(x_ptr + r[:, None] * x_stride_r + col[None, :], mask)
    tl.atomic_max(largest_ptr, _largest_finite(x.to(tl.int32, bitcast=True)), sem="relaxed")


def quantize(
    x_RL: Tensor,
    element: Element,
    scaling: Scaling,
    rounding: Rounding,
    *,
    key: Tensor | None = None,
    ema_RL: Tensor | None = None,
    ema_active: Tensor | None = None,
    values_dtype: torch.dtype | None = None,
    fp8: Fp8 | None = None,
    largest: Tensor | None = None,
    lost: Tensor | None = None,
    pack: bool = True,
) -> Quantized:
    """`reference.quantize`, bit for bit. `x_RL` and `ema_RL` may have any strides; the results are contiguous."""
    fmt = element.format
    rows, length = x_RL.shape
    device = x_RL.device
    groups = triton.cdiv(length, GROUP_SIZE)
    values_RL = codes_RB = scales_RG = operand_scale = None
    values_length, (bottom, top) = length, (0, 0)
    if fp8 is not None:
        values_dtype, values_length = TORCH_FP8[fp8], _filled(length)
        bottom, top = fp8_range(fp8, fmt)
        operand_scale = torch.empty(1, dtype=torch.float32, device=device)
    if values_dtype is not None:
        values_RL = torch.empty(rows, values_length, dtype=values_dtype, device=device)
    if pack:
        codes_RB = torch.empty(rows, _num_bytes(length), dtype=torch.uint8, device=device)
        scales_RG = torch.empty(rows, groups, dtype=torch.uint8, device=device)
    ema = x_RL if ema_RL is None else ema_RL
    block_r, block_g = _blocks(x_RL.stride(1) == 1, groups)
    # An empty tensor has a scale, too, which one program writes.
    grid = (max(triton.cdiv(rows, block_r), 1), max(triton.cdiv(groups, block_g), 1))
    _quantize_kernel[grid](
        x_RL,
        ema,
        ema_active,
        key,
        values_RL,
        codes_RB,
        scales_RG,
        largest,
        operand_scale,
        lost,
        rows,
        length,
        _num_bytes(length),
        values_length,
        *x_RL.stride(),
        *ema.stride(),
        MANTISSA=fmt.mantissa_bits,
        MIN_EXPONENT=fmt.min_exponent,
        MAX_EXPONENT=fmt.max_exponent,
        MAX_MANTISSA=fmt.max_mantissa,
        TRUNCATION_FREE=scaling.rounds_up,
        ROUNDING=_ROUNDING_INDEX[rounding],
        HAS_EMA_ACTIVE=ema_active is not None,
        VALUES=values_dtype is not None,
        LIMIT=0.0 if fp8 is not None else torch.finfo(values_dtype or torch.float32).max,
        FP8=fp8 is not None,
        FP8_TOP=top,
        FP8_BOTTOM=bottom,
        PACK=pack,
        BLOCK_R=block_r,
        BLOCK_G=block_g,
        num_warps=1,
    )
    return Quantized(values_RL, codes_RB, scales_RG, operand_scale)


def dequantize(codes_RB: Tensor, scales_RG: Tensor, length: int, element: Element, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize`, bit for bit."""
    fmt = element.format
    rows, groups = scales_RG.shape
    values_RL = torch.empty(rows, length, dtype=dtype, device=codes_RB.device)
    if values_RL.numel():
        block_r, block_g = _blocks(True, groups)
        grid = (triton.cdiv(rows, block_r), triton.cdiv(groups, block_g))
        _dequantize_kernel[grid](
            codes_RB.contiguous(),
            scales_RG.contiguous(),
            values_RL,
            rows,
            length,
            _num_bytes(length),
            MANTISSA=fmt.mantissa_bits,
            MIN_EXPONENT=fmt.min_exponent,
            LIMIT=torch.finfo(dtype).max,
            BLOCK_R=block_r,
            BLOCK_G=block_g,
            num_warps=1,
        )
    return values_RL


def largest_magnitude(x_RL: Tensor) -> Tensor:
    """`reference.largest_magnitude`, bit for bit."""
    if x_RL.stride(1) != 1:
        x_RL = x_RL.contiguous()
    largest = torch.zeros(1, dtype=torch.int32, device=x_RL.device)
    if x_RL.numel():
        rows, length = x_RL.shape
        block_l = min(triton.next_power_of_2(length), 512)
        block_r = 8 * _TILE // block_l
        grid = (triton.cdiv(rows, block_r), triton.cdiv(length, block_l))
        _largest_kernel[grid](x_RL, largest, rows, length, x_RL.stride(0), BLOCK_R=block_r, BLOCK_L=block_l)
    return largest


def quantize_both(
    source: Tensor | Packed,
    rows: Quantizer | None,
    columns: Quantizer | None,
    *,
    keys: tuple[Tensor | None, Tensor | None] = (None, None),
    dtype: torch.dtype | None = None,
    fp8: Fp8 | None = None,
    largest: Tensor | None = None,
    lost: Tensor | None = None,
    with_sum: bool = False,
) -> tuple[Operand | None, Operand | None, Tensor | None]:
    """`reference.quantize_both`, bit for bit but for the order in which a column is summed up."""
    row_operand = column_operand = total = None
    if rows is not None or (with_sum and columns is None):
        x_NC, bound = source, largest
        if isinstance(source, Packed):  # whose rows no layer needs, hence no kernel of its own
            x_NC = dequantize(source.codes_RB, source.scales_RG, source.length, source.quantizer.element, torch.float32)
            bound = None if largest is None else largest_quantized(largest, source.quantizer)
        if rows is not None:
            how = {"values_dtype": dtype} if fp8 is None else {"fp8": fp8, "largest": bound, "lost": lost}
            made = quantize(x_NC, rows.element, rows.scaling, rows.rounding, key=keys[0], pack=False, **how)
            row_operand = Operand(made.values_RL, made.operand_scale)
        if with_sum and columns is None:
            total = x_NC.sum(dim=0, dtype=torch.float32)
    if columns is not None:
        column_operand, total = _quantize_columns(source, columns, keys[1], dtype, fp8, largest, lost, with_sum)
    return row_operand, column_operand, total


def _quantize_columns(
    source: Tensor | Packed,
    q: Quantizer,
    key: Tensor | None,
    dtype: torch.dtype | None,
    fp8: Fp8 | None,
    largest: Tensor | None,
    lost: Tensor | None,
    with_sum: bool,
) -> tuple[Operand, Tensor | None]:
    x = codes = scales = scale = sums = None
    stride, source_q = 0, Quantizer()
    if isinstance(source, Packed):
        codes, scales = source.codes_RB.contiguous(), source.scales_RG.contiguous()
        num_rows, length, device, source_q = scales.shape[0], source.length, codes.device, source.quantizer
    else:
        x = source if source.stride(1) == 1 else source.contiguous()
        (num_rows, length), device, stride = x.shape, x.device, x.stride(0)
    values_length = num_rows
    if fp8 is not None:
        dtype, values_length = TORCH_FP8[fp8], _filled(num_rows)
        scale = torch.empty(1, dtype=torch.float32, device=device)
    values_CN = torch.empty(length, values_length, dtype=dtype, device=device)
    groups = triton.cdiv(num_rows, GROUP_SIZE)
    block_c = min(max(triton.next_power_of_2(length), GROUP_SIZE), _COLUMN_BLOCK)
    block_t = min(_COLUMN_TILE // block_c, triton.next_power_of_2(max(groups, 1)))
    tiles = max(triton.cdiv(groups, block_t), 1)  # an empty matrix has a scale, and sums of zero
    if with_sum:  # one row of partial sums a tile
        sums = torch.empty(tiles, length, dtype=torch.float32, device=device)
    fmt, source_fmt = q.element.format, source_q.element.format
    bottom, top = (0, 0) if fp8 is None else fp8_range(fp8, fmt)
    _quantize_columns_kernel[(tiles, max(triton.cdiv(length, block_c), 1))](
        x,
        codes,
        scales,
        key,
        largest,
        values_CN,
        scale,
        sums,
        lost,
        num_rows,
        length,
        _num_bytes(length),
        stride,
        values_length,
        PACKED=codes is not None,
        SOURCE_MANTISSA=source_fmt.mantissa_bits,
        SOURCE_MIN_EXPONENT=source_fmt.min_exponent,
        SOURCE_MAX_EXPONENT=source_fmt.max_exponent,
        SOURCE_MAX_MANTISSA=source_fmt.max_mantissa,
        SOURCE_TRUNCATION_FREE=source_q.scaling.rounds_up,
        SOURCE_LIMIT=torch.finfo(torch.float32).max,
        MANTISSA=fmt.mantissa_bits,
        MIN_EXPONENT=fmt.min_exponent,
        MAX_EXPONENT=fmt.max_exponent,
        MAX_MANTISSA=fmt.max_mantissa,
        TRUNCATION_FREE=q.scaling.rounds_up,
        ROUNDING=_ROUNDING_INDEX[q.rounding],
        FP8=fp8 is not None,
        FP8_TOP=top,
        FP8_BOTTOM=bottom,
        LIMIT=0.0 if fp8 is not None else torch.finfo(dtype).max,
        SUM=with_sum,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=max(block_t * block_c // 64, 1),
    )
    return Operand(values_CN, scale), sums.sum(dim=0) if with_sum else None


def _num_bytes(length: int) -> int:
    """Bytes of a row's codes. Kernels take it as an argument: they store many at once if they know its divisors."""
    return triton.cdiv(length, 2)


def _filled(length: int) -> int:
    return triton.cdiv(length, FP8_ROW_MULTIPLE) * FP8_ROW_MULTIPLE


def _blocks(along_rows: bool, groups: int) -> tuple[int, int]:
    """Rows and groups of a tile: long in the direction in which memory is contiguous."""
    block_g = min(8 if along_rows else 2, triton.next_power_of_2(max(groups, 1)))
    return max(_TILE // (block_g * GROUP_SIZE), 1), block_g
