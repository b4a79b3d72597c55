"""Scales and roundings in Triton: what happens to one group and to one element, bit for bit as in `reference.py`.

Arithmetic on scales and steps is done on fp32 bit patterns, so that no rounding, flushing or reordering by a compiler
can change a decision. The scale S = 2**(byte - 127) of a group is held as `scale_bits`, byte << 23: its byte stands
where the exponent field of an fp32 stands, so that most of what is asked of it is one addition.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ..formats import (
    FP32_EXPONENT_BIAS,
    FP32_EXPONENT_MASK,
    FP32_MAGNITUDE_MASK,
    FP32_MANTISSA_BITS,
    FP32_MANTISSA_MASK,
    FP32_NAN,
    FP32_SUBNORMAL_HALF,
    MAX_MAGNITUDE_CODE,
    ZERO_GROUP_BITS,
    Fp8,
    Rounding,
    fp8_range,
)
from ..recipe import Quantizer

BIAS = tl.constexpr(FP32_EXPONENT_BIAS)
EXPONENT_MASK = tl.constexpr(FP32_EXPONENT_MASK)
MAGNITUDE_MASK = tl.constexpr(FP32_MAGNITUDE_MASK)
MANTISSA_BITS = tl.constexpr(FP32_MANTISSA_BITS)
STOCHASTIC = tl.constexpr(Rounding.STOCHASTIC.value)
EMA = tl.constexpr(Rounding.EMA.value)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

_MANTISSA_MASK = tl.constexpr(FP32_MANTISSA_MASK)
_NAN = tl.constexpr(FP32_NAN)
_SUBNORMAL_HALF = tl.constexpr(FP32_SUBNORMAL_HALF)
_MAX_CODE = tl.constexpr(MAX_MAGNITUDE_CODE)
_ZERO_GROUP = tl.constexpr(ZERO_GROUP_BITS)
_ONE = tl.constexpr(1)  # what stands to the left of a constexpr must be one

_FP8_PTX = (
    "{{ .reg .b16 low, high; cvt.rn.satfinite.{0} low, $2, $1; cvt.rn.satfinite.{0} high, $4, $3; "
    "mov.b32 $0, {{low, high}}; }}"
)


@cache
def _converts_to_fp8() -> bool:
    return not INTERPRETED.value and torch.cuda.get_device_capability() >= (8, 9)


@dataclass(frozen=True)
class Constants:
    """What a kernel is compiled for of one quantizer: its element's numbers, its rules, its window in FP8."""

    mantissa_bits: int
    min_exponent: int
    max_exponent: int
    max_mantissa: int
    rounds_up: bool
    rounding: str
    fp8_bottom: int
    """The least exponent of a group's scale, over the tensor's power of two, that FP8 holds; 0 without FP8."""
    fp8_top: int
    """The greatest one."""
    limit: float
    """The largest number of the dtype of the values, where a product can exceed it; else 0."""
    fp8_ptx: str | None
    """PTX that makes four FP8 numbers of four fp32 ones; None without FP8, or where a GPU lacks the instruction.

    Triton's own conversion takes them apart and packs them anew, which is 0.75 instructions per number more."""

    @classmethod
    @cache
    def of(cls, q: Quantizer, fp8: Fp8 | None = None, dtype: torch.dtype | None = None) -> Constants:
        fmt = q.element.format
        element = fmt.mantissa_bits, fmt.min_exponent, fmt.max_exponent, fmt.max_mantissa
        window = (0, 0) if fp8 is None else fp8_range(fp8, fmt)
        limit = torch.finfo(dtype or torch.float32).max if fp8 is None else 0.0
        ptx = None if fp8 is None or not _converts_to_fp8() else _FP8_PTX.format(f"{fp8.value}x2.f32")
        return cls(*element, q.scaling.rounds_up, q.rounding.value, *window, limit, ptx)

    @property
    def qp(self) -> float:
        """The largest magnitude."""
        return (1 + self.max_mantissa / 2**FP32_MANTISSA_BITS) * 2.0**self.max_exponent

    @property
    def random_bits(self) -> int:
        """The bits of an fp32 mantissa below the element's own, and of a draw."""
        return FP32_MANTISSA_BITS - self.mantissa_bits

    @property
    def max_exponent_bits(self) -> int:
        return self.max_exponent << FP32_MANTISSA_BITS

    @property
    def fp8_bottom_bits(self) -> int:
        return self.fp8_bottom << FP32_MANTISSA_BITS

    @property
    def fp8_top_bits(self) -> int:
        return self.fp8_top << FP32_MANTISSA_BITS

    @property
    def least_binade(self) -> int:
        """Exponent field of the least binade, in place."""
        return (FP32_EXPONENT_BIAS + self.min_exponent) << FP32_MANTISSA_BITS

    @property
    def unit_offset(self) -> int:
        """From a binade's exponent field to that of the power of two whose last bit is worth the grid's spacing."""
        return self.random_bits << FP32_MANTISSA_BITS

    @property
    def from_smallest(self) -> float:
        """What takes the smallest fp32 numbers, among which a code is its own bit pattern, to the grid."""
        return 2.0 ** (FP32_EXPONENT_BIAS - 1 + self.min_exponent)


@triton.jit
def load(ptrs, mask, WHOLE: tl.constexpr):
    """The numbers at `ptrs`, zeros where `mask` is false. A whole tile needs no mask, and spends no time on it."""
    if WHOLE:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=mask, other=0)
    return x


@triton.jit
def store(ptrs, x, mask, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(ptrs, x)
    else:
        tl.store(ptrs, x, mask=mask)


@triton.jit
def to_fp32(x):
    """fp32 of any input. bf16 is the upper half of an fp32, subnormals included."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger_along(magnitude, AXIS: tl.constexpr):
    """The largest of some fp32 magnitudes along an axis; Inf or NaN if one of them is."""
    if INTERPRETED:  # which knows the maximum of integers, and runs any other reduction element by element
        return tl.max(magnitude.to(tl.int32, bitcast=True), axis=AXIS).to(tl.float32, bitcast=True)
    else:
        return tl.reduce(magnitude, AXIS, _larger)


@triton.jit
def magnitude_bits(magnitude):
    """The bits of what `larger_along` found: those of Inf, or more, for Inf and NaN."""
    return magnitude.to(tl.int32, bitcast=True) & MAGNITUDE_MASK


@triton.jit
def largest_finite(bits):
    """Bits of the largest finite magnitude in a tile of fp32 bits; 0 if there is none."""
    magnitude_bits = tl.ravel(bits & MAGNITUDE_MASK)
    return tl.max(tl.where(magnitude_bits < EXPONENT_MASK, magnitude_bits, 0), axis=0)


@triton.jit
def nonzero(largest_bits):
    """The bits of groups' amax, with the number that stands for it in groups of zeros."""
    return tl.where(largest_bits == 0, _ZERO_GROUP, largest_bits)


@triton.jit
def scale_bits_of(largest_bits, Q: tl.constexpr):
    """The scale of groups, byte << 23, from the bits of their amax M.

    The exponent of M / Qp is M's less Qp's. Rounded up, it is one more where M's mantissa exceeds Qp's, which is where
    adding to M what Qp's mantissa lacks carries. A group of zeros gets the least scale, which changes none of its
    values; `nonzero` comes first where the scale itself is stored.
    """
    if Q.rounds_up:
        largest_bits += _MANTISSA_MASK - Q.max_mantissa
    return (tl.maximum(largest_bits, Q.max_exponent_bits) - Q.max_exponent_bits) & EXPONENT_MASK


@triton.jit
def scale_of(scale_bits):
    """fp32 2**(byte - 127); NaN for 0xFF."""
    bits = tl.maximum(scale_bits, _SUBNORMAL_HALF)  # 2**-127 is no normal number
    return tl.where(bits == EXPONENT_MASK, _NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def inverse_scale_of(scale_bits):
    """fp32 2**(127 - byte) for a finite scale."""
    return (-scale_bits + ((2 * BIAS) << MANTISSA_BITS)).to(tl.float32, bitcast=True)


@triton.jit
def signed(magnitude, like):
    """The magnitude with the sign of `like`, also where it is zero."""
    sign = like.to(tl.int32, bitcast=True) & ~MAGNITUDE_MASK
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def grid_value(bits, Q: tl.constexpr):
    """fp32 value of a code and a sign that stand in the bits of an fp32: codes are small floats, hence rebiased."""
    return bits.to(tl.float32, bitcast=True) * Q.from_smallest


@triton.jit
def grid_bits(value, Q: tl.constexpr):
    """The reverse of `grid_value`, rounded to the nearest bit."""
    return (value * (1 / Q.from_smallest)).to(tl.int32, bitcast=True)


@triton.jit
def code_value(bits, Q: tl.constexpr):
    """fp32 value of the code and sign in the upper four bits of an int32."""
    SIGN_AND_CODE: tl.constexpr = ~MAGNITUDE_MASK | (_MAX_CODE << Q.random_bits)
    return grid_value((bits >> (28 - Q.random_bits)) & SIGN_AND_CODE, Q)


@triton.jit
def round_stochastic(y, draw, Q: tl.constexpr):
    """Value on the grid of any y, by a draw of as many bits as stand below the element's mantissa in an fp32's.

    Over the right power of two the grid is that of the smallest fp32 numbers, subnormals included: what is left of the
    bits after adding the draw and cutting is the code.
    """
    CUT: tl.constexpr = -(_ONE << Q.random_bits)
    return _saturated(grid_value((grid_bits(y, Q) + draw) & CUT, Q), Q)


@triton.jit
def round_nearest(y, Q: tl.constexpr):
    """Value on the grid of y >= 0; ties to the even code."""
    binade_bits = tl.maximum(y.to(tl.int32, bitcast=True) & EXPONENT_MASK, Q.least_binade)
    if Q.mantissa_bits > 0:
        # Beside a power of two whose last bit is worth the spacing, fp32 addition rounds to the grid, ties to even.
        unit = (binade_bits + Q.unit_offset).to(tl.float32, bitcast=True)
        value = (y + unit) - unit
    else:
        t = y * ((-binade_bits + ((2 * BIAS) << MANTISSA_BITS)).to(tl.float32, bitcast=True))
        t_floor = tl.floor(t)
        fraction = t - t_floor
        code = t_floor.to(tl.int32) + ((binade_bits - Q.least_binade) >> Q.random_bits)
        code += ((fraction > 0.5) | ((fraction == 0.5) & ((code & 1) == 1))).to(tl.int32)
        value = grid_value(code << Q.random_bits, Q)
    return _saturated(value, Q)


@triton.jit
def round_to_ema(y, ema, negative, Q: tl.constexpr):
    """Value on the grid of y >= 0: the neighbour nearer to `ema`, which is scaled like y and has a sign."""
    binade_bits = tl.maximum(y.to(tl.int32, bitcast=True) & EXPONENT_MASK, Q.least_binade)
    UNIT: tl.constexpr = (2 * BIAS + Q.mantissa_bits) << MANTISSA_BITS
    inverse_spacing = (-binade_bits + UNIT).to(tl.float32, bitcast=True)
    t = y * inverse_spacing
    t_floor = tl.floor(t)
    ema_t = ema * inverse_spacing
    ema_t = tl.where(negative, -ema_t, ema_t)
    midpoint = t_floor + 0.5
    upper = ((ema_t > midpoint) | ((ema_t == midpoint) & (negative == 0))) & (t > t_floor)
    code = t_floor.to(tl.int32) + ((binade_bits - Q.least_binade) >> Q.random_bits) + upper.to(tl.int32)
    return _saturated(grid_value(code << Q.random_bits, Q), Q)


@triton.jit
def _saturated(value, Q: tl.constexpr):
    """Scaling that rounds up leaves no value beyond Qp."""
    if not Q.rounds_up:
        value = tl.maximum(tl.minimum(value, Q.qp), -Q.qp)
    return value


@triton.jit
def fp8_exponent_bits(largest_bits, Q: tl.constexpr):
    """(e + 127) << 23 for the power of two 2**e that a tensor's FP8 values are multiplied by, from its amax."""
    scale_bits = scale_bits_of(nonzero(largest_bits), Q)
    return tl.maximum(scale_bits - Q.fp8_top_bits, _ONE << MANTISSA_BITS)


@triton.jit
def fp8_factor(scale_bits, exponent_bits, largest, lost_ptr, Q: tl.constexpr):
    """fp32 scale of groups over 2**e, given their amax: NaN where it is Inf or NaN, 0 for a group below FP8's range.

    The groups below it that are not zero are counted at `lost_ptr`, int64 [1].
    """
    low = scale_bits < exponent_bits + Q.fp8_bottom_bits
    bits = tl.where(low, 0, scale_bits - exponent_bits + (BIAS << MANTISSA_BITS))
    lost = tl.sum(tl.ravel((low & (largest > 0)).to(tl.int32)), axis=0)
    if lost > 0:
        tl.atomic_add(lost_ptr, lost.to(tl.int64), sem="relaxed")
    return bits.to(tl.float32, bitcast=True) + largest * 0.0  # one operation, where a choice takes two


@triton.jit
def plain_factor(scale_bits, largest):
    """fp32 scale of groups, given their amax: NaN where it is Inf or NaN."""
    return scale_of(scale_bits) + largest * 0.0


@triton.jit
def stored(product, DTYPE: tl.constexpr, Q: tl.constexpr):
    """An fp32 product in DTYPE, saturated at its largest numbers; NaN stays NaN."""
    if Q.limit > 0:
        product = tl.where(product > Q.limit, Q.limit, product)
        product = tl.where(product < -Q.limit, -Q.limit, product)
    if DTYPE == tl.bfloat16:  # two significant bits: the lower half is zero
        return (product.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    if Q.fp8_ptx is not None:
        return tl.inline_asm_elementwise(Q.fp8_ptx, "=r,r,r,r,r", [product], dtype=tl.uint8, is_pure=True, pack=4).to(
            DTYPE, bitcast=True
        )
    converted = product.to(DTYPE)
    if INTERPRETED and DTYPE == tl.float8e4nv:  # Triton's interpreter knows no NaN there
        fp8_bits = tl.where(product != product, 0x7F, converted.to(tl.uint8, bitcast=True))
        converted = fp8_bits.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return converted
