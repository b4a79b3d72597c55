"""Fixtures for the tests of quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from quantization.formats import ElementFormat


def positions(fmt: ElementFormat) -> Iterator[tuple[float, int, int]]:
    """fp32 numbers y on all steps of a 4-bit float's grid, the code below each, and how many of all 2**b draws go up.

    In exact fractions: rint(2**b * position) with ties to even, where the position tells how far y lies between its
    neighbours. Among them are numbers on the grid, the first and last ones of a step, and multiples of 2**-(b + 1).
    """
    draws = 2**fmt.random_bits
    rng = np.random.default_rng(0)
    for code, (low, high) in enumerate(pairwise(fmt.magnitudes)):
        step = high - low
        numbers = {low, low + step / 3, high - step * 2**-20, *(low + step * rng.random(2))}
        if low == 0:  # fp32 has numbers beyond any draw's bits here
            numbers |= {step * (3 / 2) / draws, step * (5 / 2) / draws, step * 0.3 / draws, step * 0.7 / draws}
        for y in sorted({float(np.float32(number)) for number in numbers}):
            if y < high:
                yield y, code, round((Fraction(y) - Fraction(low)) / Fraction(step) * draws)


@pytest.fixture
def positions_to_round() -> Callable[[ElementFormat], Iterator[tuple[float, int, int]]]:
    return positions
