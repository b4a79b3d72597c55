"""Latent weights, quantization confidence and histograms, against loops over Python floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quantization import Element, Quantizer, confidence, histogram, latent_weight

# Paper appendix A: thresholds of nearest rounding, and the largest distance to one within each cell.
CELLS = {
    "e2m1": {
        "thresholds": [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5],
        "largest": {0: 0.25, 0.5: 0.25, 1: 0.25, 1.5: 0.25, 2: 0.375, 3: 0.5, 4: 0.75, 6: 1},
    },
    "e3m0": {
        "thresholds": [0.125, 0.375, 0.75, 1.5, 3, 6, 12],
        "largest": {0: 0.125, 0.25: 0.125, 0.5: 0.1875, 1: 0.375, 2: 0.75, 4: 1.5, 8: 3, 16: 4},
    },
}


def confidence_of(y: float, element: str) -> float:
    cells = CELLS[element]
    grid = min(cells["largest"], key=lambda magnitude: abs(abs(y) - magnitude))
    distance = min(abs(abs(y) - threshold) for threshold in cells["thresholds"])
    return min(1.0, distance / cells["largest"][grid])


def scale_of(group: list[float], quantizer: Quantizer) -> float:
    largest = max(map(abs, group)) or 1e-8
    if quantizer.scaling.value == "floor":
        return 2.0 ** (math.floor(math.log2(largest)) - {"e2m1": 2, "e3m0": 4}[quantizer.element.value])
    return 2.0 ** math.ceil(math.log2(largest / {"e2m1": 6, "e3m0": 16}[quantizer.element.value]))


@pytest.mark.parametrize("element", CELLS)
def test_confidence_is_the_distance_to_a_threshold_over_the_largest_in_the_cell(element, device):
    top = max(CELLS[element]["largest"])
    values = [i / 64 for i in range(-64 * top, 64 * top + 1)]  # every grid value and threshold among them
    found = confidence(torch.tensor(values, device=device), element).tolist()
    assert found == pytest.approx([confidence_of(y, element) for y in values], abs=1e-6)
    assert min(found) == 0 and max(found) == 1


@pytest.mark.parametrize("element", CELLS)
def test_confidence_at_thresholds_and_grid_values(element, device):
    thresholds = CELLS[element]["thresholds"]
    both = torch.tensor([*thresholds, *(-t for t in thresholds)], device=device)
    assert (confidence(both, Element(element)) == 0).all()
    top = max(CELLS[element]["largest"])
    certain = torch.tensor([0.0, -0.0, top, -top, 1.9 * top, -2.0 * top], device=device)  # saturated ones too
    assert (confidence(certain, element) == 1).all()


def test_confidence_of_one_grid_value_follows_its_cell():
    """2 is not in the middle of its cell (1.75, 2.5), so it is less than certain."""
    assert confidence(torch.tensor([2.0, 2.125, 4.0, 4.25]), "e2m1").tolist() == pytest.approx([2 / 3, 1, 2 / 3, 1])


@pytest.mark.parametrize("element", ["e2m1", "e3m0"])
@pytest.mark.parametrize("scaling", ["truncation_free", "floor"])
def test_latent_weight_is_on_the_scale_of_its_group(element, scaling, randn):
    quantizer = Quantizer(element=element, scaling=scaling)
    weight = randn(6, 70) * torch.logspace(-6, 6, 6, device=randn(1).device)[:, None]  # groups of 32, 32 and 6
    weight[1, 32:64] = 0
    weight[2, 64:] = 0
    latent = latent_weight(weight, quantizer)
    for row, found in zip(weight.tolist(), latent.tolist()):
        for start in (0, 32, 64):
            group = row[start : start + 32]
            assert found[start : start + 32] == [w / scale_of(group, quantizer) for w in group]
    assert (latent[1, 32:64] == 0).all() and (latent[2, 64:] == 0).all()
    top = max(CELLS[element]["largest"])
    assert latent.abs().max() <= (top if scaling == "truncation_free" else 2.0 ** (math.floor(math.log2(top)) + 1))
    assert ((confidence(latent, element) >= 0) & (confidence(latent, element) <= 1)).all()


def test_histogram_counts_like_numpy(randn):
    values = torch.cat((3 * randn(5000), torch.tensor([-8.0, 8.0, 0.0, -1e-30, 1e-30, 0.125, -0.125]).to(randn(1))))
    values = values.clamp(-8, 8)
    expected, _ = np.histogram(values.double().cpu().numpy(), bins=np.arange(-64, 65) / 8)
    assert histogram(values, -8, 0.125, 128).tolist() == expected.tolist()


def test_histogram_keeps_what_is_outside_and_drops_what_is_no_number():
    values = torch.tensor([-3.0, 0.0, 0.5, 1.0, 7.0, torch.nan, torch.inf])
    assert histogram(values, 0, 0.5, 2).tolist() == [2, 3]
    assert histogram(torch.empty(0), 0, 0.5, 2).tolist() == [0, 0]
