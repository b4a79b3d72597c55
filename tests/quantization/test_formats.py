"""Element formats fit their 4-bit codes, or are refused where they are defined."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantization import Element
from quantization.formats import ElementFormat

E2M1 = Element.E2M1.format
E2M3 = tuple(k / 8 for k in range(16)) + tuple(2.0**e * (1 + k / 8) for e in (1, 2) for k in range(8))


def test_another_4_bit_element_is_accepted():
    """E1M2: eight equal steps."""
    made = ElementFormat((0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75), 2, 0, 0, 0x600000)
    assert made.max == 1.75 and made.thresholds[0] == 0.125


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magnitudes": E2M3, "mantissa_bits": 3, "max_mantissa": 0x700000}, "has 8 magnitudes, .* got 32; a wider"),
        ({"magnitudes": E2M1.magnitudes[:-1]}, "got 7"),
        ({"magnitudes": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)}, "make the magnitudes .* 6.0.*, got .* 5.0"),
        ({"magnitudes": E2M1.magnitudes[::-1]}, "make the magnitudes"),
        ({"mantissa_bits": 2}, "mantissa_bits 2 and min_exponent 0 make the magnitudes"),
        ({"min_exponent": -1}, "min_exponent -1 make the magnitudes"),
        ({"max_exponent": 3}, "6.0 has max_exponent 2 and max_mantissa 0x400000, got 3"),
        ({"max_mantissa": 0}, "6.0 has max_exponent 2 and max_mantissa 0x400000, got 2 and 0x0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(E2M1, **changes)
