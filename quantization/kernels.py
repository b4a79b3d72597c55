"""MX quantization in Triton: the two functions of `reference.py`, bit for bit.

One program reads a tile of rows x groups once and writes whatever was asked for: values, packed codes, scales. No
noise tensor exists; the random bits are computed in registers. Arithmetic on scales and steps is done on fp32 bit
patterns, so that no rounding, flushing or reordering by a compiler can change a decision.

Shapes are those of `reference.py`: R rows, L elements in a row, G groups in a row, B bytes of codes in a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formats import (
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
    Rounding,
    Scaling,
)
from .philox import COUNTERS_PER_GROUP, KEY_INCREMENTS, MULTIPLIERS, ROUNDS, WORD_MASK
from .reference import Quantized

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
_SIGN_CODE = tl.constexpr(SIGN_CODE)
_ZERO_GROUP = tl.constexpr(ZERO_GROUP_BITS)
_COUNTERS = tl.constexpr(COUNTERS_PER_GROUP)
_M0, _M1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
_K0, _K1 = tl.constexpr(KEY_INCREMENTS[0]), tl.constexpr(KEY_INCREMENTS[1])
_ROUNDS = tl.constexpr(ROUNDS)
_WORD_MASK = tl.constexpr(WORD_MASK)
_DRAWS = tl.constexpr(float(2**RANDOM_BITS))

_NEAREST = tl.constexpr(0)
_STOCHASTIC = tl.constexpr(1)
_EMA = tl.constexpr(2)
_ROUNDING_INDEX = {Rounding.NEAREST: 0, Rounding.STOCHASTIC: 1, Rounding.EMA: 2}

# Elements in a tile. 4096 keeps four warps at 32 elements a thread; rows and columns are split by the layout.
_TILE = 4096


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
def _scale_of(byte):
    """fp32 2**(byte - 127); NaN for 0xFF."""
    bits = tl.where(byte == 0, _SUBNORMAL_HALF, byte << _MANTISSA_BITS)
    bits = tl.where(byte == _SCALE_NAN, _NAN, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _load_fp32(ptrs, mask):
    """fp32 of any input. bf16 is the upper half of an fp32, subnormals included."""
    x = tl.load(ptrs, mask=mask, other=0.0)
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _store_values(ptrs, magnitude, sign_bits, scale, mask, LIMIT: tl.constexpr):
    """Store +-magnitude * scale, saturated at the largest number LIMIT of the destination; NaN stays NaN."""
    product = magnitude * scale
    product = tl.where(product > LIMIT, LIMIT, product)
    bits = product.to(tl.int32, bitcast=True) | sign_bits
    if ptrs.dtype.element_ty == tl.bfloat16:  # two significant bits: the lower half is zero
        values = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        values = bits.to(tl.float32, bitcast=True).to(ptrs.dtype.element_ty)
    tl.store(ptrs, values, mask=mask)


@triton.jit
def _grid_magnitude(code, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """fp32 value of a magnitude code 0..7, built from its exponent and mantissa fields."""
    LEAST: tl.constexpr = _BIAS + MIN_EXPONENT
    spacing_exponent = tl.maximum((code >> MANTISSA) - 1, 0) + LEAST - MANTISSA
    spacing = (spacing_exponent << _MANTISSA_BITS).to(tl.float32, bitcast=True)
    steps = tl.where((code >> MANTISSA) > 0, (code & ((1 << MANTISSA) - 1)) + (1 << MANTISSA), code)
    return steps.to(tl.float32) * spacing


@triton.jit
def _quantize_kernel(
    x_ptr,
    ema_ptr,
    ema_active_ptr,
    key_ptr,
    values_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    length,
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
    bits = x.to(tl.int32, bitcast=True).reshape(BLOCK_R, BLOCK_G, _GROUP)
    magnitude_bits = bits & _MAGNITUDE_MASK

    largest_bits = tl.max(magnitude_bits, axis=2)
    broken = largest_bits >= _EXPONENT_MASK
    if ROUNDING == _EMA:
        ema_ptrs = ema_ptr + r[:, None] * ema_stride_r + col[None, :] * ema_stride_l
        ema = _load_fp32(ema_ptrs, mask).reshape(BLOCK_R, BLOCK_G, _GROUP)
        ema_bits = ema.to(tl.int32, bitcast=True) & _MAGNITUDE_MASK
        broken = broken | (tl.max(ema_bits, axis=2) >= _EXPONENT_MASK)
    largest_bits = tl.where(largest_bits == 0, _ZERO_GROUP, largest_bits)
    scale_byte = (largest_bits >> _MANTISSA_BITS) - MAX_EXPONENT
    if TRUNCATION_FREE:
        scale_byte += ((largest_bits & _MANTISSA_MASK) > MAX_MANTISSA).to(tl.int32)
    scale_byte = tl.maximum(scale_byte, 0)

    inverse_scale = ((-scale_byte + 2 * _BIAS) << _MANTISSA_BITS).to(tl.float32, bitcast=True)[:, :, None]
    y = magnitude_bits.to(tl.float32, bitcast=True) * inverse_scale
    LEAST_BINADE: tl.constexpr = (_BIAS + MIN_EXPONENT) << _MANTISSA_BITS
    binade_bits = tl.maximum(y.to(tl.int32, bitcast=True) & _EXPONENT_MASK, LEAST_BINADE)
    inverse_spacing_bits = -binade_bits + ((2 * _BIAS + MANTISSA) << _MANTISSA_BITS)
    inverse_spacing = inverse_spacing_bits.to(tl.float32, bitcast=True)
    t = y * inverse_spacing
    t_floor = tl.floor(t)
    fraction = t - t_floor
    code = t_floor.to(tl.int32) + ((binade_bits - LEAST_BINADE) >> (_MANTISSA_BITS - MANTISSA))

    if ROUNDING == _STOCHASTIC:
        counter_col = tl.program_id(1).to(tl.int64) * (BLOCK_G * _COUNTERS) + tl.arange(0, BLOCK_G * _COUNTERS)
        counter = r[:, None] * num_groups * _COUNTERS + counter_col[None, :]
        w0, w1, w2, w3 = _philox(counter.to(tl.uint64), tl.load(key_ptr))
        # Joining (w0, w2) with (w1, w3) lays the words out in the order w0 w1 w2 w3.
        word = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        draw = tl.join(word & 0xFFFF, word >> 16).reshape(BLOCK_R, BLOCK_G, _GROUP).to(tl.int32)
        upper = draw.to(tl.float32) + 0.5 < fraction * _DRAWS
    else:
        upper = (fraction > 0.5) | ((fraction == 0.5) & ((code & 1) == 1))
        if ROUNDING == _EMA:
            negative = bits < 0
            ema_t = ema * inverse_scale * inverse_spacing
            ema_t = tl.where(negative, -ema_t, ema_t)
            midpoint = t_floor + 0.5
            by_ema = (ema_t > midpoint) | ((ema_t == midpoint) & (negative == 0))
            by_ema = by_ema & (fraction > 0)
            if HAS_EMA_ACTIVE:
                active = tl.load(ema_active_ptr) != 0
                upper = (by_ema & active) | (upper & (active == 0))
            else:
                upper = by_ema
    code = tl.minimum(code + upper.to(tl.int32), _MAX_CODE)
    code = tl.where(broken[:, :, None], 0, code)
    scale_byte = tl.where(broken, _SCALE_NAN, scale_byte)

    if VALUES:
        # Keep the zeros that fill up a group, and the sign of a value that rounds to zero.
        sign_bits = bits & ~_MAGNITUDE_MASK
        magnitude = _grid_magnitude(code, MANTISSA, MIN_EXPONENT)
        scale = _scale_of(scale_byte)[:, :, None].broadcast_to(BLOCK_R, BLOCK_G, _GROUP)
        values_ptrs = values_ptr + r[:, None] * length + col[None, :]
        _store_values(
            values_ptrs,
            magnitude.reshape(BLOCK_R, BLOCK_L),
            sign_bits.reshape(BLOCK_R, BLOCK_L),
            scale.reshape(BLOCK_R, BLOCK_L),
            mask,
            LIMIT,
        )
    if PACK:
        code = tl.where((bits < 0) & (broken[:, :, None] == 0), code + _SIGN_CODE, code)
        low, high = tl.split(code.reshape(BLOCK_R, BLOCK_L // 2, 2))
        num_bytes = tl.cdiv(length, 2)
        byte_col = tl.program_id(1).to(tl.int64) * (BLOCK_L // 2) + tl.arange(0, BLOCK_L // 2)
        byte_mask = (r[:, None] < rows) & (byte_col[None, :] < num_bytes)
        packed = (low | (high << 4)).to(tl.uint8)
        tl.store(codes_ptr + r[:, None] * num_bytes + byte_col[None, :], packed, mask=byte_mask)
        group_mask = (r[:, None] < rows) & (g[None, :] < num_groups)
        tl.store(scales_ptr + r[:, None] * num_groups + g[None, :], scale_byte.to(tl.uint8), mask=group_mask)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scales_ptr,
    values_ptr,
    rows,
    length,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    BLOCK_L: tl.constexpr = BLOCK_G * _GROUP
    num_groups = tl.cdiv(length, _GROUP)
    num_bytes = tl.cdiv(length, 2)
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    g = tl.program_id(1).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    col = tl.program_id(1).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    byte_col = tl.program_id(1).to(tl.int64) * (BLOCK_L // 2) + tl.arange(0, BLOCK_L // 2)
    byte_mask = (r[:, None] < rows) & (byte_col[None, :] < num_bytes)
    packed = tl.load(codes_ptr + r[:, None] * num_bytes + byte_col[None, :], mask=byte_mask, other=0).to(tl.int32)
    group_mask = (r[:, None] < rows) & (g[None, :] < num_groups)
    scale_byte = tl.load(scales_ptr + r[:, None] * num_groups + g[None, :], mask=group_mask, other=0).to(tl.int32)

    code = tl.join(packed & 0xF, packed >> 4).reshape(BLOCK_R, BLOCK_L)
    magnitude = _grid_magnitude(code & _MAX_CODE, MANTISSA, MIN_EXPONENT)
    scale = _scale_of(scale_byte)[:, :, None].broadcast_to(BLOCK_R, BLOCK_G, _GROUP).reshape(BLOCK_R, BLOCK_L)
    mask = (r[:, None] < rows) & (col[None, :] < length)
    sign_bits = (code >> 3) << 31
    _store_values(values_ptr + r[:, None] * length + col[None, :], magnitude, sign_bits, scale, mask, LIMIT)


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
    pack: bool = True,
) -> Quantized:
    """`reference.quantize`, bit for bit. `x_RL` and `ema_RL` may have any strides; the results are contiguous."""
    fmt = element.format
    rows, length = x_RL.shape
    device = x_RL.device
    groups = triton.cdiv(length, GROUP_SIZE)
    values_RL = codes_RB = scales_RG = None
    if values_dtype is not None:
        values_RL = torch.empty(rows, length, dtype=values_dtype, device=device)
    if pack:
        codes_RB = torch.empty(rows, triton.cdiv(length, 2), dtype=torch.uint8, device=device)
        scales_RG = torch.empty(rows, groups, dtype=torch.uint8, device=device)
    if x_RL.numel():
        ema = x_RL if ema_RL is None else ema_RL
        block_r, block_g = _blocks(x_RL, groups)
        grid = (triton.cdiv(rows, block_r), triton.cdiv(groups, block_g))
        _quantize_kernel[grid](
            x_RL,
            ema,
            ema_active,
            key,
            values_RL,
            codes_RB,
            scales_RG,
            rows,
            length,
            *x_RL.stride(),
            *ema.stride(),
            MANTISSA=fmt.mantissa_bits,
            MIN_EXPONENT=fmt.min_exponent,
            MAX_EXPONENT=fmt.max_exponent,
            MAX_MANTISSA=fmt.max_mantissa,
            TRUNCATION_FREE=scaling is Scaling.TRUNCATION_FREE,
            ROUNDING=_ROUNDING_INDEX[rounding],
            HAS_EMA_ACTIVE=ema_active is not None,
            VALUES=values_dtype is not None,
            LIMIT=torch.finfo(values_dtype or torch.float32).max,
            PACK=pack,
            BLOCK_R=block_r,
            BLOCK_G=block_g,
        )
    return Quantized(values_RL, codes_RB, scales_RG)


def dequantize(codes_RB: Tensor, scales_RG: Tensor, length: int, element: Element, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize`, bit for bit."""
    fmt = element.format
    rows, groups = scales_RG.shape
    values_RL = torch.empty(rows, length, dtype=dtype, device=codes_RB.device)
    if values_RL.numel():
        block_r, block_g = _blocks(values_RL, groups)
        grid = (triton.cdiv(rows, block_r), triton.cdiv(groups, block_g))
        _dequantize_kernel[grid](
            codes_RB.contiguous(),
            scales_RG.contiguous(),
            values_RL,
            rows,
            length,
            MANTISSA=fmt.mantissa_bits,
            MIN_EXPONENT=fmt.min_exponent,
            LIMIT=torch.finfo(dtype).max,
            BLOCK_R=block_r,
            BLOCK_G=block_g,
        )
    return values_RL


def _blocks(x_RL: Tensor, groups: int) -> tuple[int, int]:
    """Rows and groups of a tile: long in the direction in which memory is contiguous."""
    along_rows = x_RL.stride(1) == 1
    block_g = min(8 if along_rows else 2, triton.next_power_of_2(groups))
    return max(_TILE // (block_g * GROUP_SIZE), 1), block_g
