"""Number formats of microscaling (MX): 4-bit elements, the E8M0 group scale, scale rules, rounding rules.

All quantizers take their constants from this file. Source: OCP Microscaling Formats (MX) Specification v1.0, sections
5.3 (elements) and 5.4 (E8M0 scale); E3M0 is the gradient format of the paper's Table 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from math import frexp

GROUP_SIZE = 32  # values that share one scale (OCP MX section 5.2, the block size k)
SIGN_CODE = 0x8  # sign bit of a 4-bit code
MAX_MAGNITUDE_CODE = 0x7

# An E8M0 byte b stands for 2 ** (b - 127): it is the exponent field of an fp32, with the same bias.
SCALE_NAN = 0xFF  # the one byte that stands for NaN instead

# fp32 bit patterns: scales and roundings are decided on these, never through a floating-point logarithm.
FP32_MANTISSA_BITS = 23
FP32_EXPONENT_BIAS = 127
FP32_MANTISSA_MASK = 0x007FFFFF
FP32_EXPONENT_MASK = 0x7F800000  # also the pattern of +Inf: a magnitude at or above it is Inf or NaN
FP32_MAGNITUDE_MASK = 0x7FFFFFFF
FP32_SUBNORMAL_HALF = 0x00400000  # 2 ** -127, the smallest E8M0 scale
FP32_NAN = 0x7FC00000
FP64_MANTISSA_BITS = 52
FP64_EXPONENT_BIAS = 1023
ZERO_GROUP_BITS = 0x322BCC77  # fp32 1e-8, which replaces the amax of an all-zero group

FP8_ROW_MULTIPLE = 16  # FP8 matmuls need operands whose rows are a multiple of 16 bytes


@dataclass(frozen=True)
class ElementFormat:
    """A sign-magnitude 4-bit float whose magnitude codes 0..7 ascend in value.

    With `mantissa_bits` m and `min_exponent` e, values below 2**e are spaced 2**(e - m) apart (they are the
    subnormals and, for m = 1, the first binade); every binade above holds 2**m values.

    Raises ValueError for numbers that contradict each other, and for more or fewer magnitudes than a 4-bit code holds.
    """

    magnitudes: tuple[float, ...]  # value of each magnitude code
    mantissa_bits: int
    min_exponent: int
    max_exponent: int  # Emax, the exponent of the largest magnitude
    max_mantissa: int  # fp32 mantissa bits of the largest magnitude Qp

    def __post_init__(self) -> None:
        count, m, e = MAX_MAGNITUDE_CODE + 1, self.mantissa_bits, self.min_exponent
        if len(self.magnitudes) != count:
            raise ValueError(
                f"an element has {count} magnitudes, those of the 4-bit codes 0x0 to 0x7, got {len(self.magnitudes)}; "
                "a wider element needs wider codes"
            )
        # Code c = (exponent field, m mantissa bits); the exponent field 0 holds the subnormals.
        fields = [divmod(code, 2**m) for code in range(count)]
        wanted = tuple((fraction / 2**m + (field > 0)) * 2.0 ** (e + max(field - 1, 0)) for field, fraction in fields)
        if self.magnitudes != wanted:
            raise ValueError(
                f"mantissa_bits {m} and min_exponent {e} make the magnitudes {wanted}, got {self.magnitudes}"
            )
        fraction, exponent = frexp(self.max)  # Qp = fraction * 2**exponent with a fraction from 1/2 to 1
        largest = exponent - 1, round((2 * fraction - 1) * 2**FP32_MANTISSA_BITS)
        if (self.max_exponent, self.max_mantissa) != largest:
            raise ValueError(
                f"the largest magnitude {self.max} has max_exponent {largest[0]} and max_mantissa {largest[1]:#x}, "
                f"got {self.max_exponent} and {self.max_mantissa:#x}"
            )

    @property
    def max(self) -> float:
        """Qp, the largest magnitude."""
        return self.magnitudes[-1]

    @property
    def random_bits(self) -> int:
        """The random bits that decide one stochastic rounding: those of an fp32 mantissa below the element's own."""
        return FP32_MANTISSA_BITS - self.mantissa_bits

    @property
    def values(self) -> tuple[float, ...]:
        """Value of each of the 16 codes, -0.0 included."""
        return self.magnitudes + tuple(-m for m in self.magnitudes)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The points at which nearest rounding changes from one magnitude to the next: the midpoints."""
        return tuple((low + high) / 2 for low, high in pairwise(self.magnitudes))


class Element(str, Enum):
    """Element format of a group. A new one is a member here and a row in `_FORMATS`; options and kernels follow."""

    E2M1 = "e2m1"
    """FP4 of OCP MX: 0 0.5 1 1.5 2 3 4 6."""
    E3M0 = "e3m0"
    """Powers of two: 0 0.25 0.5 1 2 4 8 16. Not an OCP format; the paper's Table 7."""

    @property
    def format(self) -> ElementFormat:
        return _FORMATS[self]


_FORMATS = {
    Element.E2M1: ElementFormat((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), 1, 0, 2, 0x400000),
    Element.E3M0: ElementFormat((0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0), 0, -2, 4, 0),
}


class Scaling(str, Enum):
    """The rule that gives the exponent s of a group's scale S = 2**s from the group's amax M (paper section 3.2).

    A new one is a member here, and its arithmetic in `_scale_byte` of `reference.py` and in `scale_bits_of` of
    `triton/rounding.py`.
    """

    TRUNCATION_FREE = "truncation_free"
    """s = ceil(log2(M / Qp)): no scaled value exceeds Qp, so nothing is clipped and stochastic rounding is unbiased."""
    FLOOR = "floor"
    """s = floor(log2 M) - Emax (OCP MX section 6.3): one more bit of resolution for some groups, but scaled values
    may exceed Qp, and those saturate."""

    @property
    def rounds_up(self) -> bool:
        """True if s is rounded up where M / Qp is no power of two. Raises KeyError for a member without arithmetic."""
        return {Scaling.TRUNCATION_FREE: True, Scaling.FLOOR: False}[self]


class Rounding(str, Enum):
    """The rule that rounds a scaled value y to one of its grid neighbours q1 < q2 (paper sections 3.2 and 5)."""

    NEAREST = "nearest"
    """The nearer one; a tie goes to the neighbour with the even code."""
    STOCHASTIC = "stochastic"
    """q2 with probability (y - q1) / (q2 - q1), so that the expectation is y."""
    EMA = "ema"
    """The one nearer to the weight's moving average (Q-EMA); a tie goes to q2."""


class Fp8(str, Enum):
    """FP8 format of a matmul operand (OCP OFP8 v1.0).

    An element times its scale, over one power of two for the whole tensor, is exact in it as long as the groups'
    scales lie within as many binades of each other as the format spans.
    """

    E5M2 = "e5m2"
    """Spans 28 binades of E2M1 scales; for activations in the forward pass and for gradients."""
    E4M3 = "e4m3"
    """Spans 14 binades; for the other operand, since tensor cores take at most one E5M2 operand."""


_FP8_EXPONENTS = {Fp8.E5M2: (-16, 15), Fp8.E4M3: (-9, 8)}
"""Exponents of the smallest subnormal and of the largest binade; that binade includes 1.5 times its power of two."""


def fp8_range(fp8: Fp8, fmt: ElementFormat) -> tuple[int, int]:
    """The least and the greatest exponent s for which every element of `fmt` times 2**s is exact in `fp8`."""
    least, most = _FP8_EXPONENTS[fp8]
    return least - fmt.min_exponent + fmt.mantissa_bits, most - fmt.max_exponent
