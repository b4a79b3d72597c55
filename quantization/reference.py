"""The specification of MX quantization, in plain PyTorch, on any device.

`triton/kernels.py` has the same four functions in Triton and returns the same bits. They work on matrices whose groups
lie along the rows, or, in `quantize_both`, along rows and columns; `mx.py` and `linear.py` bring their tensors into
that form.

Shapes: R rows, L elements in a row, G = ceil(L / 32) groups in a row, E = 32 elements in a group (the last group is
padded with zeros, which never leave this file), B = ceil(L / 2) bytes of packed codes in a row. N x C is a matrix that
is quantized both ways.

The amax of a group or a tensor is its largest magnitude. The public functions take and return a tensor's amax as the
int32 bits of an fp32, in the argument `largest`; they count the groups that underflow in FP8 in the argument `lost`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import (
    FP8_ROW_MULTIPLE,
    FP32_EXPONENT_BIAS,
    FP32_EXPONENT_MASK,
    FP32_MAGNITUDE_MASK,
    FP32_MANTISSA_BITS,
    FP32_MANTISSA_MASK,
    FP32_NAN,
    FP32_SUBNORMAL_HALF,
    FP64_EXPONENT_BIAS,
    FP64_MANTISSA_BITS,
    GROUP_SIZE,
    MAX_MAGNITUDE_CODE,
    SCALE_NAN,
    SIGN_CODE,
    ZERO_GROUP_BITS,
    Element,
    ElementFormat,
    Fp8,
    Rounding,
    Scaling,
    fp8_range,
)
from .philox import element_draws
from .recipe import Quantizer

NUMERICS = 2
"""Rises when the same seed gives other numbers. 1 drew 16 bits per rounding from Philox with 10 rounds, and Q3 and Q5
drew apart. Checkpoints and records of runs keep it, and reports do not pool runs that differ in it."""

TORCH_FP8 = {Fp8.E5M2: torch.float8_e5m2, Fp8.E4M3: torch.float8_e4m3fn}


class Quantized(NamedTuple):
    """The result of one pass over a matrix; a part that was not asked for is None."""

    values_RL: Tensor | None  # the quantized values, in the dtype asked for
    codes_RB: Tensor | None  # uint8, two codes a byte, the first element in the low nibble
    scales_RG: Tensor | None  # uint8, E8M0
    operand_scale: Tensor | None  # fp32 [1], the power of two that multiplies FP8 values


class Packed(NamedTuple):
    """A quantized matrix in 4.25 bits an element, and the quantizer that made it."""

    codes_RB: Tensor
    scales_RG: Tensor
    length: int
    quantizer: Quantizer


class Operand(NamedTuple):
    """One side of a matmul, its reduction axis last."""

    values_RL: Tensor
    """Numbers in the precision of the matmul; FP8 rows are padded with zeros to a multiple of 16."""
    scale: Tensor | None = None
    """fp32 [1], the power of two that multiplies FP8 values; None for other values."""


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
    """Quantize every group of 32 elements along the rows of `x_RL`.

    `key` (one int64) decides stochastic rounding: an element's draw follows from the key and from the element's place.
    `ema_RL`, shaped like `x_RL`, decides EMA rounding; while the scalar tensor `ema_active` is false, EMA rounding is
    nearest rounding. `values_dtype` asks for the quantized values, `pack` for codes and scales. A group that holds NaN
    or Inf becomes NaN: scale 0xFF, codes 0.

    `fp8` asks for the values as FP8 numbers instead, over a power of two that follows from `largest`, the tensor's amax
    (`largest_magnitude(x_RL)`) or more, in rows padded with zeros to a multiple of 16. They are exact, unless the scale
    of a group lies further below the tensor's than `fp8` spans: such a group underflows to zero, and if it was not zero
    before, it is counted in `lost`, an int64 [1].
    """
    draws_RL = None
    if quantizer.rounding is Rounding.STOCHASTIC:
        draws_RL = element_draws(key, *x_RL.shape, quantizer.element.format.random_bits)
    return _quantize(x_RL, quantizer, draws_RL, ema_RL, ema_active, values_dtype, fp8, largest, lost, pack)


def dequantize(codes_RB: Tensor, scales_RG: Tensor, length: int, element: Element, dtype: torch.dtype) -> Tensor:
    """The values [R, L] of packed codes and E8M0 scales. A product beyond `dtype` saturates at its largest number."""
    rows, groups = scales_RG.shape
    code = torch.stack((codes_RB & 0xF, codes_RB >> 4), dim=-1).flatten(1).to(torch.int32)
    code = _padded(code, groups * GROUP_SIZE).view(rows, groups, GROUP_SIZE)
    return _values(code, scales_RG.to(torch.int32).unsqueeze(-1), element.format, dtype)[:, :length]


def largest_magnitude(x_RL: Tensor) -> Tensor:
    """The amax of the finite elements of `x_RL`: its fp32 bits, int32 [1]; 0 if there is none."""
    bits = x_RL.to(torch.float32).reshape(-1).view(torch.int32) & FP32_MAGNITUDE_MASK
    bits = F.pad(bits, (0, 1))  # an empty tensor has a maximum, too
    return bits.masked_fill(bits >= FP32_EXPONENT_MASK, 0).amax().view(1)


def largest_quantized(largest: Tensor, quantizer: Quantizer) -> Tensor:
    """A bound on the amax of the quantized tensor, int32 [1] like that of the tensor, `largest`: Qp times the scale."""
    fmt = quantizer.element.format
    byte = _scale_byte(largest.view(torch.float32), fmt, quantizer.scaling)
    bits = ((byte + fmt.max_exponent) << FP32_MANTISSA_BITS) | fmt.max_mantissa
    return bits.masked_fill(byte + fmt.max_exponent > 2 * FP32_EXPONENT_BIAS, FP32_EXPONENT_MASK - 1)


def quantize_both(
    source: Tensor | Packed,
    rows: Quantizer | None,
    columns: Quantizer | None,
    *,
    key: Tensor | None = None,
    dtype: torch.dtype | None = None,
    fp8: Fp8 | None = None,
    largest: Tensor | None = None,
    lost: Tensor | None = None,
    with_sum: bool = False,
) -> tuple[Operand | None, Operand | None, Tensor | None]:
    """Quantize a matrix [N, C] along its rows, along its columns, or both.

    Returns the operand [N, C] of `rows`, the operand [C, N] of `columns`, and, if `with_sum`, the fp32 sums [C] of the
    unquantized columns. Both operands round an element (n, c) by the same draw from `key`, which biases neither. Values
    are in `dtype`, or in `fp8`, which needs `lost` and `largest` like `quantize`. For a packed source, `largest` is the
    amax of the tensor that its quantizer read.
    """
    x_NC, bound = source, largest
    if isinstance(source, Packed):
        x_NC = dequantize(source.codes_RB, source.scales_RG, source.length, source.quantizer.element, torch.float32)
        bound = None if largest is None else largest_quantized(largest, source.quantizer)
    operands, draws = [], {}
    for q, transposed in ((rows, False), (columns, True)):
        if q is None:
            operands.append(None)
            continue
        bits = q.element.format.random_bits
        if q.rounding is Rounding.STOCHASTIC and bits not in draws:
            draws[bits] = element_draws(key, *x_NC.shape, bits)
        x_RL, draws_RL = x_NC, draws.get(bits)
        if transposed:
            x_RL, draws_RL = x_NC.T, None if draws_RL is None else draws_RL.T
        values_dtype = None if fp8 is not None else dtype
        made = _quantize(x_RL, q, draws_RL, None, None, values_dtype, fp8, bound, lost, False)
        operands.append(Operand(made.values_RL, made.operand_scale))
    return *operands, x_NC.sum(dim=0, dtype=torch.float32) if with_sum else None


def _quantize(
    x_RL: Tensor,
    quantizer: Quantizer,
    draws_RL: Tensor | None,
    ema_RL: Tensor | None,
    ema_active: Tensor | None,
    values_dtype: torch.dtype | None,
    fp8: Fp8 | None,
    largest: Tensor | None,
    lost: Tensor | None,
    pack: bool,
) -> Quantized:
    """`quantize` by given draws, int32 like `x_RL`."""
    fmt, length = quantizer.element.format, x_RL.shape[1]
    x = _groups(x_RL.to(torch.float32))
    magnitude = x.abs()
    amax = magnitude.amax(dim=-1, keepdim=True)
    non_finite = ~(amax < torch.inf)
    ema = None if ema_RL is None else _groups(ema_RL.to(torch.float32))
    if ema is not None:
        non_finite |= ~(ema.abs() < torch.inf).all(dim=-1, keepdim=True)
    scale_byte = _scale_byte(amax, fmt, quantizer.scaling)

    inverse_scale = ((2 * FP32_EXPONENT_BIAS - scale_byte) << FP32_MANTISSA_BITS).view(torch.float32)
    y = magnitude.mul_(inverse_scale)  # |x| / S
    if quantizer.rounding is Rounding.STOCHASTIC:
        code = _stochastic_code(y, fmt, _groups(draws_RL))
    elif quantizer.rounding is Rounding.EMA:
        code = _nearest_code(y, fmt, ema * inverse_scale, x.signbit(), ema_active)
    else:
        code = _nearest_code(y, fmt)
    code.clamp_(max=MAX_MAGNITUDE_CODE)
    code.add_((x.view(torch.int32) >> 31) & SIGN_CODE).masked_fill_(non_finite, 0)
    scale_byte.masked_fill_(non_finite, SCALE_NAN)

    values_RL = codes_RB = scales_RG = operand_scale = None
    if fp8 is not None:
        counts = (amax > 0) & ~non_finite
        values_RL, operand_scale = _fp8_values(code, scale_byte, counts, quantizer, fp8, largest, lost, length)
    if values_dtype is not None:
        values_RL = _values(code, scale_byte, fmt, values_dtype)[:, :length]
    if pack:
        codes_RB, scales_RG = _packed(code, scale_byte, length)
    return Quantized(values_RL, codes_RB, scales_RG, operand_scale)


def _padded(x_RL: Tensor, length: int) -> Tensor:
    """`x_RL` with every row padded with zeros to `length`."""
    return x_RL if x_RL.shape[1] == length else F.pad(x_RL, (0, length - x_RL.shape[1]))


def _groups(x_RL: Tensor) -> Tensor:
    """The groups [R, G, E] of a matrix, the last group of a row padded with zeros."""
    rows, length = x_RL.shape
    groups = -(-length // GROUP_SIZE)
    return _padded(x_RL, groups * GROUP_SIZE).reshape(rows, groups, GROUP_SIZE)


def _scale_byte(amax: Tensor, fmt: ElementFormat, scaling: Scaling) -> Tensor:
    """s + 127 as int32, from the bits of the groups' amax in fp32.

    For an amax M = 1.m x 2**e and Qp = 1.p x 2**Emax, ceil(log2(M / Qp)) is e - Emax, and one more where m > p. By
    either rule, a subnormal M has the least scale, 2**-127.
    """
    bits = amax.view(torch.int32)
    bits = bits.masked_fill(bits == 0, ZERO_GROUP_BITS)
    byte = (bits >> FP32_MANTISSA_BITS).sub_(fmt.max_exponent)
    if scaling.rounds_up:
        byte += (bits & FP32_MANTISSA_MASK) > fmt.max_mantissa
    return byte.clamp_(min=0)


def _nearest_code(
    y: Tensor,
    fmt: ElementFormat,
    ema_y: Tensor | None = None,
    negative: Tensor | None = None,
    ema_active: Tensor | None = None,
) -> Tensor:
    """Magnitude code of y >= 0 by nearest rounding, or by EMA rounding if `ema_y` is given. Overwrites y.

    `ema_y` is the moving average over the scale, with its sign; `negative` marks the elements that are negative.
    """
    # In the binade 2**e, the grid has the spacing 2**(e - mantissa_bits); t = y / spacing.
    least_binade = (FP32_EXPONENT_BIAS + fmt.min_exponent) << FP32_MANTISSA_BITS
    binade_bits = (y.view(torch.int32) & FP32_EXPONENT_MASK).clamp_(min=least_binade)
    unit_bits = (2 * FP32_EXPONENT_BIAS + fmt.mantissa_bits) << FP32_MANTISSA_BITS
    inverse_spacing = (unit_bits - binade_bits).view(torch.float32)
    t = y.mul_(inverse_spacing)
    t_floor = t.floor()
    fraction = t.sub_(t_floor)
    binade = binade_bits.sub_(least_binade) >> (FP32_MANTISSA_BITS - fmt.mantissa_bits)
    code = binade.add_(t_floor.to(torch.int32))  # of q1; the code of q2 is one more
    upper = (fraction > 0.5) | ((fraction == 0.5) & (code & 1).bool())
    if ema_y is not None:
        # |ema - q1| < |ema - q2| holds if the average lies on q1's side of their midpoint.
        ema_t = ema_y * inverse_spacing
        ema_t = torch.where(negative, -ema_t, ema_t)
        midpoint = t_floor + 0.5
        by_ema = ((ema_t > midpoint) | ((ema_t == midpoint) & ~negative)) & (fraction > 0)
        upper = by_ema if ema_active is None else torch.where(ema_active, by_ema, upper)
    return code.add_(upper)


def _stochastic_code(y: Tensor, fmt: ElementFormat, draw: Tensor) -> Tensor:
    """Magnitude code of y >= 0: a draw is added to the mantissa bits below the last one of `fmt`, and they are cut.

    `draw` has as many bits b as there are below it (`fmt.random_bits`), so of the 2**b draws just as many round up as
    y's position between its neighbours says, rounded to a multiple of 2**-b (nearest, ties to even): none for a y on
    the grid. Every position in a binade of `fmt` is such a multiple. Below the least binade 2**e, adding 2**e to y
    gives it the spacing of that binade, and rounds its position.
    """
    kept = fmt.random_bits
    least = 2.0**fmt.min_exponent
    small = y < least
    bits = torch.where(small, y + least, y).view(torch.int32) + draw
    first = (FP32_EXPONENT_BIAS + fmt.min_exponent) << fmt.mantissa_bits
    return (bits >> kept) - first + torch.where(small, 0, 1 << fmt.mantissa_bits)


def _packed(code: Tensor, scale_byte: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """uint8 codes [R, B] and scales [R, G] from codes [R, G, E] and scales [R, G, 1]."""
    codes = code.to(torch.uint8).flatten(1)[:, : length + length % 2]
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scale_byte.to(torch.uint8).squeeze(-1)


def _fp8_values(
    code: Tensor,
    scale_byte: Tensor,
    counts: Tensor,
    quantizer: Quantizer,
    fp8: Fp8,
    amax: Tensor,
    underflowed: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    """FP8 values of codes [R, G, E] and scales [R, G, 1], and the power of two, fp32 [1], that was taken out.

    A group that is too small for FP8 underflows to zero, and is added to `underflowed` if `counts`, [R, G, 1], is true:
    for groups that are neither zero nor NaN.
    """
    fmt = quantizer.element.format
    bottom, top = fp8_range(fp8, fmt)
    exponent_byte = (_scale_byte(amax.view(torch.float32), fmt, quantizer.scaling) - top).clamp_(min=1)
    underflows = scale_byte - exponent_byte < bottom
    underflowed += (underflows & counts).sum()
    values = _values(code, scale_byte, fmt, torch.float64).view_as(code)
    # 2 ** (127 - exponent_byte), made of its bits, because the result of exp2 depends on the library behind it.
    power_bits = (FP64_EXPONENT_BIAS + FP32_EXPONENT_BIAS - exponent_byte).long() << FP64_MANTISSA_BITS
    values = torch.where(underflows, 0 * values, values) * power_bits.view(torch.float64)
    rows, padded_length = code.shape[0], -(-length // FP8_ROW_MULTIPLE) * FP8_ROW_MULTIPLE
    values_RL = values.to(torch.float32).view(rows, code.shape[1] * code.shape[2])[:, :padded_length]
    return values_RL.to(TORCH_FP8[fp8]).contiguous(), (exponent_byte << FP32_MANTISSA_BITS).view(torch.float32)


def _values(code: Tensor, scale_byte: Tensor, fmt: ElementFormat, dtype: torch.dtype) -> Tensor:
    """[R, G * E] in `dtype`: the elements times 2**(scale_byte - 127), exact wherever `dtype` can hold the product.

    A product beyond the range of `dtype` saturates.
    """
    scale_bits = scale_byte << FP32_MANTISSA_BITS
    scale_bits.masked_fill_(scale_byte == 0, FP32_SUBNORMAL_HALF).masked_fill_(scale_byte == SCALE_NAN, FP32_NAN)
    scale = scale_bits.view(torch.float32)
    grid = torch.tensor(fmt.values, dtype=torch.float32, device=code.device)
    elements = grid.index_select(0, code.flatten()).view_as(code)
    if dtype == torch.float64:
        return (elements.to(dtype) * scale.to(dtype)).flatten(1)
    limit = torch.finfo(dtype).max
    return elements.mul_(scale).clamp_(-limit, limit).to(dtype).flatten(1)
