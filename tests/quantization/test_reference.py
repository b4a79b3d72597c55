"""What the specification promises about both operands of one matrix, against arithmetic in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from quantization import Element, Quantizer, quantize_mx
from quantization.philox import element_draws
from quantization.reference import quantize_both


@pytest.mark.parametrize("element", list(Element))
def test_rows_and_columns_round_an_element_by_its_own_draw(element, device):
    """With the scale 1 in all groups, an element is rounded once, whichever way: up where its draw reaches 2**b."""
    fmt = element.format
    x = fmt.max * (2 * torch.rand(37, 41, generator=torch.Generator().manual_seed(3)) - 1)
    x[[0, -1]] = x[:, [0, -1]] = fmt.max  # in every group of a row and of a column
    x, key = x.to(device), torch.tensor([5], device=device)
    q = Quantizer(element=element, rounding="stochastic")
    rows, columns, _ = quantize_both(x, q, q, key=key, dtype=torch.float32)
    assert torch.equal(rows.values_RL, columns.values_RL.T)
    draws = element_draws(key, 37, 41, fmt.random_bits)
    for value, rounded, draw in zip(x.flatten().tolist(), rows.values_RL.flatten().tolist(), draws.flatten().tolist()):
        low = max(m for m in fmt.magnitudes if m <= abs(value))
        high = min((m for m in fmt.magnitudes if m > abs(value)), default=low)
        ups = round((Fraction(abs(value)) - Fraction(low)) / Fraction(high - low or 1) * 2**fmt.random_bits)
        assert abs(rounded) == (high if draw + ups >= 2**fmt.random_bits else low)


def test_nearest_rounding_both_ways_is_that_of_quantize_mx(randn):
    x = randn(40, 70)
    rows, columns, total = quantize_both(x, Quantizer(), Quantizer(), dtype=torch.float32, with_sum=True)
    assert torch.equal(rows.values_RL, quantize_mx(x).dequantize())
    assert torch.equal(columns.values_RL, quantize_mx(x, axis=0).dequantize().T)
    assert (total.double() - x.double().sum(0)).abs().max() < 1e-4
