"""Groups along the rows in Triton: quantized values, packed codes and scales from one read, and back.

Shapes: R rows, L elements in a row, G groups in a row, B bytes of codes in a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import GROUP_SIZE, MAX_MAGNITUDE_CODE, SIGN_CODE, Element, Fp8
from ..recipe import Quantizer
from ..reference import TORCH_FP8, Quantized
from .philox import COLUMNS_OF_COUNTER, ROWS_OF_COUNTER, tile_draws
from .rounding import (
    EMA,
    EXPONENT_MASK,
    INTERPRETED,
    MANTISSA_BITS,
    STOCHASTIC,
    Constants,
    code_value,
    fp8_exponent_bits,
    fp8_factor,
    grid_bits,
    inverse_scale_of,
    larger_along,
    load,
    magnitude_bits,
    nonzero,
    plain_factor,
    round_nearest,
    round_stochastic,
    round_to_ema,
    scale_bits_of,
    scale_of,
    signed,
    store,
    stored,
    to_fp32,
)
from .tiles import is_wide, num_bytes, num_groups, padded

_GROUP = tl.constexpr(GROUP_SIZE)
_CODE_BITS = tl.constexpr(MAX_MAGNITUDE_CODE * 0x11)  # of the two codes in a byte
_SIGN_BITS = tl.constexpr(SIGN_CODE * 0x11)

# Elements in a tile: 32 per thread of one warp. On an H200, 25,216 x 3,072 elements of bf16 took 77 us (Q3) and 85 us
# (Q1) so, 86 us each in tiles of 4,096 and four warps. The interpreter likes few tiles.
_TILE = 4096 if INTERPRETED.value else 1024


@triton.jit
def _quantize_kernel(
    x_ptr,  # bf16, fp16 or fp32 [R, L] of any strides
    ema_ptr,  # like x, or None
    ema_active_ptr,  # bool [], or None: always active
    key_ptr,  # int64 [1], or None
    values_ptr,  # any of those dtypes or FP8 [R, values_length], or None
    codes_ptr,  # uint8 [R, B], or None
    scales_ptr,  # uint8 [R, G], or None
    largest_ptr,  # int32 [1], or None: the bits of the tensor's amax
    operand_scale_ptr,  # fp32 [1], or None
    lost_ptr,  # int64 [1], or None
    rows,
    length,
    code_bytes,  # B: the compiler finds out that many can be stored at once
    values_length,
    x_stride_r,
    x_stride_l,
    ema_stride_r,
    ema_stride_l,
    Q: tl.constexpr,  # Constants
    FP8: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A tile is BLOCK_R rows by BLOCK_G groups. With eight groups, each of 32 threads holds 8 columns of 4 rows:

              thread 0   thread 1         thread 3   thread 4         thread 31
    row 0   | 8 columns | 8 columns | ... 8 columns | 8 columns | ... 8 columns |
    ...     |-------------- group 0 --------------- |---------- group 1 ...
    row 3
    """
    BLOCK_L: tl.constexpr = BLOCK_G * _GROUP
    groups = tl.cdiv(length, _GROUP)
    first_r, first_g = tl.program_id(0), tl.program_id(1)
    if WIDE:
        first_r, first_g = first_r.to(tl.int64), first_g.to(tl.int64)
    first_r, first_g = first_r * BLOCK_R, first_g * BLOCK_G
    r, g = first_r + tl.arange(0, BLOCK_R), first_g + tl.arange(0, BLOCK_G)
    col = first_g * _GROUP + tl.arange(0, BLOCK_L)
    mask = (r[:, None] < rows) & (col[None, :] < length)
    x = to_fp32(load(x_ptr + r[:, None] * x_stride_r + col[None, :] * x_stride_l, mask, WHOLE))
    x = x.reshape(BLOCK_R, BLOCK_G, _GROUP)
    magnitude = tl.abs(x)

    largest = larger_along(magnitude, 2)
    if Q.rounding == EMA:
        ema_ptrs = ema_ptr + r[:, None] * ema_stride_r + col[None, :] * ema_stride_l
        ema = to_fp32(load(ema_ptrs, mask, WHOLE)).reshape(BLOCK_R, BLOCK_G, _GROUP)
        largest = tl.where(larger_along(tl.abs(ema), 2) < float("inf"), largest, float("inf"))
    largest_bits = magnitude_bits(largest)
    scale_bits = scale_bits_of(nonzero(largest_bits), Q)
    inverse_scale = inverse_scale_of(scale_bits)[:, :, None]
    if Q.rounding == STOCHASTIC:
        c1 = (first_r // ROWS_OF_COUNTER).to(tl.int32) + tl.arange(0, BLOCK_R // ROWS_OF_COUNTER)
        c0 = (first_g * (_GROUP // COLUMNS_OF_COUNTER)).to(tl.int32) + tl.arange(0, BLOCK_L // COLUMNS_OF_COUNTER)
        draw = tile_draws(tl.load(key_ptr), c1[:, None], c0[None, :], Q.random_bits, 1)
        value = round_stochastic(x * inverse_scale, draw.reshape(BLOCK_R, BLOCK_G, _GROUP), Q)
    else:
        y = magnitude * inverse_scale
        value = round_nearest(y, Q)
        if Q.rounding == EMA:
            by_ema = round_to_ema(y, ema * inverse_scale, x.to(tl.int32, bitcast=True) < 0, Q)
            if ema_active_ptr is not None:
                by_ema = tl.where(tl.load(ema_active_ptr) != 0, by_ema, value)
            value = by_ema
        value = signed(value, x)

    if values_ptr is not None:
        if FP8:
            exponent_bits = fp8_exponent_bits(tl.load(largest_ptr), Q)
            if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
                tl.store(operand_scale_ptr, scale_of(exponent_bits))
            factor = fp8_factor(scale_bits, exponent_bits, largest, lost_ptr, Q)
        else:
            factor = plain_factor(scale_bits, largest)
        values = stored(value * factor[:, :, None], values_ptr.dtype.element_ty, Q).reshape(BLOCK_R, BLOCK_L)
        values_mask = (r[:, None] < rows) & (col[None, :] < values_length)  # with zeros that fill up a row
        store(values_ptr + r[:, None] * values_length + col[None, :], values, values_mask, WHOLE)
    if codes_ptr is not None:
        non_finite = largest_bits >= EXPONENT_MASK
        # Sign and code of an element, a few bits apart; then of two, in the places of their nibbles.
        apart = grid_bits(value, Q).to(tl.uint32, bitcast=True) >> Q.random_bits
        low, high = tl.split(apart.reshape(BLOCK_R, BLOCK_G, _GROUP // 2, 2))
        both = low | (high << 4)
        packed = (both & _CODE_BITS) | ((both >> (28 - Q.random_bits)) & _SIGN_BITS)
        packed = (packed & tl.where(non_finite, 0, 0xFF)[:, :, None]).to(tl.uint8).reshape(BLOCK_R, BLOCK_L // 2)
        byte = first_g * (_GROUP // 2) + tl.arange(0, BLOCK_L // 2)
        byte_mask = (r[:, None] < rows) & (byte[None, :] < code_bytes)
        store(codes_ptr + r[:, None] * code_bytes + byte[None, :], packed, byte_mask, WHOLE)
        scale_byte = (tl.where(non_finite, EXPONENT_MASK, scale_bits) >> MANTISSA_BITS).to(tl.uint8)
        group_mask = (r[:, None] < rows) & (g[None, :] < groups)
        store(scales_ptr + r[:, None] * groups + g[None, :], scale_byte, group_mask, WHOLE)


@triton.jit
def _dequantize_kernel(
    codes_ptr,  # uint8 [R, B]
    scales_ptr,  # uint8 [R, G]
    values_ptr,  # bf16, fp16 or fp32 [R, L]
    rows,
    length,
    code_bytes,  # B
    Q: tl.constexpr,  # Constants
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A tile is BLOCK_R rows by BLOCK_G groups."""
    BLOCK_L: tl.constexpr = BLOCK_G * _GROUP
    groups = tl.cdiv(length, _GROUP)
    first_r, first_g = tl.program_id(0), tl.program_id(1)
    if WIDE:
        first_r, first_g = first_r.to(tl.int64), first_g.to(tl.int64)
    first_r, first_g = first_r * BLOCK_R, first_g * BLOCK_G
    r, g = first_r + tl.arange(0, BLOCK_R), first_g + tl.arange(0, BLOCK_G)
    col = first_g * _GROUP + tl.arange(0, BLOCK_L)
    byte = first_g * (_GROUP // 2) + tl.arange(0, BLOCK_L // 2)
    byte_mask = (r[:, None] < rows) & (byte[None, :] < code_bytes)
    packed = load(codes_ptr + r[:, None] * code_bytes + byte[None, :], byte_mask, WHOLE).to(tl.int32)
    group_mask = (r[:, None] < rows) & (g[None, :] < groups)
    scale_bits = load(scales_ptr + r[:, None] * groups + g[None, :], group_mask, WHOLE).to(tl.int32) << MANTISSA_BITS

    value = code_value(tl.join(packed << 28, packed << 24), Q).reshape(BLOCK_R, BLOCK_L)
    scale = scale_of(scale_bits)[:, :, None].broadcast_to(BLOCK_R, BLOCK_G, _GROUP).reshape(BLOCK_R, BLOCK_L)
    values = stored(value * scale, values_ptr.dtype.element_ty, Q)
    mask = (r[:, None] < rows) & (col[None, :] < length)
    store(values_ptr + r[:, None] * length + col[None, :], values, mask, WHOLE)


def quantize(
    x_RL: Tensor,
    quantizer: Quantizer,
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
    rows, length = x_RL.shape
    device = x_RL.device
    values_RL = codes_RB = scales_RG = operand_scale = None
    values_length = length
    if fp8 is not None:
        values_dtype, values_length = TORCH_FP8[fp8], padded(length)
        operand_scale = torch.empty(1, dtype=torch.float32, device=device)
    if values_dtype is not None:
        values_RL = torch.empty(rows, values_length, dtype=values_dtype, device=device)
    if pack:
        codes_RB = torch.empty(rows, num_bytes(length), dtype=torch.uint8, device=device)
        scales_RG = torch.empty(rows, num_groups(length), dtype=torch.uint8, device=device)
    ema = x_RL if ema_RL is None else ema_RL
    block_r, block_g, grid = _tiles(rows, length, along_rows=x_RL.stride(1) == 1)
    _quantize_kernel[grid](
        x_RL,
        ema_RL,
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
        num_bytes(length),
        values_length,
        *x_RL.stride(),
        *ema.stride(),
        Q=Constants.of(quantizer, fp8, values_dtype),
        FP8=fp8 is not None,
        WHOLE=_whole(rows, values_length, block_r, block_g),
        WIDE=is_wide(x_RL, ema_RL, values_RL),
        BLOCK_R=block_r,
        BLOCK_G=block_g,
        num_warps=1,
    )
    return Quantized(values_RL, codes_RB, scales_RG, operand_scale)


def dequantize(codes_RB: Tensor, scales_RG: Tensor, length: int, element: Element, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize`, bit for bit."""
    rows = scales_RG.shape[0]
    values_RL = torch.empty(rows, length, dtype=dtype, device=codes_RB.device)
    if values_RL.numel():
        block_r, block_g, grid = _tiles(rows, length, along_rows=True)
        _dequantize_kernel[grid](
            codes_RB.contiguous(),
            scales_RG.contiguous(),
            values_RL,
            rows,
            length,
            num_bytes(length),
            Q=Constants.of(Quantizer(element=element), dtype=dtype),
            WHOLE=_whole(rows, length, block_r, block_g),
            WIDE=is_wide(values_RL),
            BLOCK_R=block_r,
            BLOCK_G=block_g,
            num_warps=1,
        )
    return values_RL


def _tiles(rows: int, length: int, along_rows: bool) -> tuple[int, int, tuple[int, int]]:
    """Rows and groups of a tile, which is long in the direction in which memory is contiguous, and the grid of tiles.

    An empty tensor has a scale, too, which one program writes.
    """
    groups = num_groups(length)
    block_g = min(8 if along_rows else 2, triton.next_power_of_2(max(groups, 1)))
    if along_rows and groups % 8 == 4:  # such as 384 channels: the last tile of each row would be half empty
        block_g = 4
    block_r = _TILE // (block_g * GROUP_SIZE)
    return block_r, block_g, (max(triton.cdiv(rows, block_r), 1), max(triton.cdiv(groups, block_g), 1))


def _whole(rows: int, length: int, block_r: int, block_g: int) -> bool:
    """True if no tile reaches beyond the matrix."""
    return rows % block_r == 0 and length % (block_g * GROUP_SIZE) == 0 and rows * length > 0
