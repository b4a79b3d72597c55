"""The specification of MX quantization, in plain PyTorch, on any device.

`kernels.py` has the same two functions in Triton and returns the same bits. Both work on a matrix whose groups lie
along its rows; `mx.py` and `linear.py` bring their operands into that form.

Shapes: R rows, L elements in a row, G = ceil(L / 32) groups in a row, E = 32 elements in a group (the last group is
filled up with zeros, which never leave this file), B = ceil(L / 2) bytes of packed codes in a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import (
    FP32_EXPONENT_BIAS,
    FP32_EXPONENT_MASK,
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
    ElementFormat,
    Rounding,
    Scaling,
)
from .philox import group_bits


class Quantized(NamedTuple):
    """What one pass over an operand leaves; a part that was not asked for is None."""

    values_RL: Tensor | None  # the quantized values, in the dtype asked for
    codes_RB: Tensor | None  # uint8, two codes a byte, the first element in the low nibble
    scales_RG: Tensor | None  # uint8, E8M0


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
    """Quantize every group of 32 elements along the rows of `x_RL`.

    `key` (one int64) decides stochastic rounding. `ema_RL`, shaped like `x_RL`, decides EMA rounding; while the
    scalar tensor `ema_active` is false, EMA rounding is nearest rounding. `values_dtype` asks for the quantized
    values, `pack` for codes and scales. A group that holds NaN or Inf becomes NaN: scale 0xFF, codes 0.
    """
    fmt = element.format
    rows, length = x_RL.shape
    x = _groups(x_RL)
    magnitude = x.abs()
    largest = magnitude.amax(dim=-1, keepdim=True)
    broken = ~(largest < torch.inf)
    if ema_RL is not None:
        ema = _groups(ema_RL)
        broken |= ~(ema.abs() < torch.inf).all(dim=-1, keepdim=True)
    scale_byte = _scale_byte(largest, fmt, scaling)

    # y = |x| / S; its grid has the spacing 2**(e - mantissa_bits) in the binade 2**e, and t = y / spacing.
    inverse_scale = ((2 * FP32_EXPONENT_BIAS - scale_byte) << FP32_MANTISSA_BITS).view(torch.float32)
    y = magnitude.mul_(inverse_scale)
    least_binade = (FP32_EXPONENT_BIAS + fmt.min_exponent) << FP32_MANTISSA_BITS
    binade_bits = (y.view(torch.int32) & FP32_EXPONENT_MASK).clamp_(min=least_binade)
    unit_bits = (2 * FP32_EXPONENT_BIAS + fmt.mantissa_bits) << FP32_MANTISSA_BITS
    inverse_spacing = (unit_bits - binade_bits).view(torch.float32)
    t = y.mul_(inverse_spacing)
    t_floor = t.floor()
    fraction = t.sub_(t_floor)
    binade = binade_bits.sub_(least_binade) >> (FP32_MANTISSA_BITS - fmt.mantissa_bits)
    code = binade.add_(t_floor.to(torch.int32))  # of q1; the code of q2 is one more

    if rounding is Rounding.STOCHASTIC:
        draw = group_bits(key, rows, code.shape[1]).to(torch.float32)
        # The probability is rounded to the nearest multiple of 2**-16; a fraction of zero never passes.
        upper = draw.add_(0.5) < fraction.mul_(2**RANDOM_BITS)
    else:
        upper = (fraction > 0.5) | ((fraction == 0.5) & (code & 1).bool())
        if rounding is Rounding.EMA:
            # |ema - q1| < |ema - q2| is the question on which side of their midpoint the average lies.
            negative = x.signbit()
            ema_t = ema * inverse_scale * inverse_spacing
            ema_t = torch.where(negative, -ema_t, ema_t)
            midpoint = t_floor + 0.5
            by_ema = ((ema_t > midpoint) | ((ema_t == midpoint) & ~negative)) & (fraction > 0)
            upper = by_ema if ema_active is None else torch.where(ema_active, by_ema, upper)
    code.add_(upper).clamp_(max=MAX_MAGNITUDE_CODE)
    code.add_((x.view(torch.int32) >> 31) & SIGN_CODE).masked_fill_(broken, 0)
    scale_byte.masked_fill_(broken, SCALE_NAN)

    values_RL = codes_RB = scales_RG = None
    if values_dtype is not None:
        values_RL = _values(code, scale_byte, fmt, values_dtype)[:, :length]
    if pack:
        codes = code.to(torch.uint8).flatten(1)[:, : length + length % 2]
        codes_RB = codes[:, 0::2] | (codes[:, 1::2] << 4)
        scales_RG = scale_byte.to(torch.uint8).squeeze(-1)
    return Quantized(values_RL, codes_RB, scales_RG)


def dequantize(codes_RB: Tensor, scales_RG: Tensor, length: int, element: Element, dtype: torch.dtype) -> Tensor:
    """The values [R, L] of packed codes and E8M0 scales. A product beyond `dtype` saturates at its largest number."""
    rows, groups = scales_RG.shape
    code = torch.stack((codes_RB & 0xF, codes_RB >> 4), dim=-1).flatten(1).to(torch.int32)
    code = _filled(code, groups * GROUP_SIZE).view(rows, groups, GROUP_SIZE)
    return _values(code, scales_RG.to(torch.int32).unsqueeze(-1), element.format, dtype)[:, :length]


def _filled(x_RL: Tensor, length: int) -> Tensor:
    """`x_RL` with zeros up to `length` in every row."""
    return x_RL if x_RL.shape[1] == length else F.pad(x_RL, (0, length - x_RL.shape[1]))


def _groups(x_RL: Tensor) -> Tensor:
    """fp32 [R, G, E], zero-filled."""
    rows, length = x_RL.shape
    groups = -(-length // GROUP_SIZE)
    return _filled(x_RL.to(torch.float32), groups * GROUP_SIZE).reshape(rows, groups, GROUP_SIZE)


def _scale_byte(largest: Tensor, fmt: ElementFormat, scaling: Scaling) -> Tensor:
    """s + 127 as int32, from the bits of the groups' largest magnitudes in fp32.

    For M = 1.m x 2**e and Qp = 1.p x 2**Emax, ceil(log2(M / Qp)) is e - Emax, and one more where m > p. A subnormal M
    ends at the least scale, 2**-127, by either rule.
    """
    bits = largest.view(torch.int32)
    bits = bits.masked_fill(bits == 0, ZERO_GROUP_BITS)
    byte = (bits >> FP32_MANTISSA_BITS).sub_(fmt.max_exponent)
    if scaling is Scaling.TRUNCATION_FREE:
        byte += (bits & FP32_MANTISSA_MASK) > fmt.max_mantissa
    return byte.clamp_(min=0)


def _values(code: Tensor, scale_byte: Tensor, fmt: ElementFormat, dtype: torch.dtype) -> Tensor:
    """[R, G * E] in `dtype`: the elements times 2**(scale_byte - 127), exact wherever `dtype` can hold the product,
    saturated beyond its range."""
    scale_bits = scale_byte << FP32_MANTISSA_BITS
    scale_bits.masked_fill_(scale_byte == 0, FP32_SUBNORMAL_HALF).masked_fill_(scale_byte == SCALE_NAN, FP32_NAN)
    scale = scale_bits.view(torch.float32)
    grid = torch.tensor(fmt.values, dtype=torch.float32, device=code.device)
    elements = grid.index_select(0, code.flatten()).view_as(code)
    if dtype == torch.float64:
        return (elements.to(dtype) * scale.to(dtype)).flatten(1)
    limit = torch.finfo(dtype).max
    return elements.mul_(scale).clamp_(-limit, limit).to(dtype).flatten(1)
