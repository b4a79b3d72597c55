"""Rates of change, path lengths and trajectories, against loops over Python floats."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quantization import (
    OscillationWindow,
    PathLengths,
    QEma,
    Quantizer,
    QuantLinear,
    Recipe,
    TensorPath,
    latent_weight,
    plain_rounding,
    quantize_mx,
    rate_of_change,
)


def norm(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values))


def rate_of(history: list[Tensor]) -> float:
    steps = [t.flatten().tolist() for t in history]
    rates = [norm([b - a for a, b in zip(x, y)]) / norm(x) for x, y in zip(steps, steps[1:])]
    return sum(rates) / len(rates)


def lengths_of(history: list[Tensor]) -> list[float]:
    steps = [t.flatten().tolist() for t in history]
    return [sum(abs(b - a) for a, b in zip(way, way[1:])) for way in zip(*steps)]


def ratios_of(weights: list[Tensor], quantized: list[Tensor]) -> list[float]:
    return [q / w if w > 0 else 0.0 for w, q in zip(lengths_of(weights), lengths_of(quantized))]


def make(device, recipe: Recipe | None = None) -> nn.Sequential:
    """Two layers, of a short last group and of one short group only."""
    torch.manual_seed(0)
    layers = [QuantLinear(40, 20, recipe=recipe), QuantLinear(20, 6, recipe=recipe)]
    return nn.Sequential(*layers).to(device)


def move(net: nn.Module, randn, size: float = 0.02, still: int = 3) -> None:
    """A step of training, as far as weights are concerned: a row stays where it is, a group is zero throughout."""
    with torch.no_grad():
        for layer in net:
            step = size * randn(*layer.weight.shape) * layer.weight.abs().mean()
            step[still] = 0
            layer.weight += step
            layer.weight[0, :32] = 0


def follow(net: nn.Sequential, randn, steps: int, after_step=lambda: None):
    """The window over `steps` steps; copies of W and of Q2(W) at every step, by layer."""
    move(net, randn)
    window = OscillationWindow(dict(net.named_children()), candidate_rows=3)

    def look() -> list[tuple[Tensor, Tensor]]:
        return [(layer.weight.detach().clone(), layer.quantized_weight().clone()) for layer in net]

    seen = [look()]
    for _ in range(steps):
        move(net, randn)
        after_step()
        window.record()
        seen.append(look())
    return window, {str(i): tuple(zip(*(step[i] for step in seen))) for i in range(len(net))}


class TestRateOfChange:
    def test_is_relative_to_the_position_before(self, randn):
        before, after = randn(7, 5), randn(7, 5)
        assert float(rate_of_change(before, after)) == pytest.approx(rate_of([before, after]), rel=1e-6)

    def test_of_what_stays_and_of_what_leaves_zero(self):
        zero, one = torch.zeros(2, 2), torch.ones(2, 2)
        assert rate_of_change(one, one) == rate_of_change(zero, zero) == 0
        assert rate_of_change(zero, one) == torch.inf
        assert rate_of_change(one, one * torch.nan).isnan()

    def test_path_is_the_mean_over_steps(self, randn):
        history = [randn(3, 4) for _ in range(5)]
        path = TensorPath(history[0])
        assert path.rate_of_change().isnan()
        for position in history[1:]:
            path.add(position)
        assert path.steps == 4 and float(path.rate_of_change()) == pytest.approx(rate_of(history), rel=1e-6)
        assert path.length.flatten().tolist() == pytest.approx(lengths_of(history), rel=1e-6)

    def test_path_keeps_no_hold_of_the_tensor(self):
        weight = torch.ones(3)
        path = TensorPath(weight)
        weight += 1
        path.add(weight)
        assert float(path.rate_of_change()) == pytest.approx(1)


@pytest.mark.parametrize("element", ["e2m1", "e3m0"])
def test_window_measures_what_the_weights_did(element, device, randn):
    net = make(device, Recipe(q2=Quantizer(element=element)))
    window, seen = follow(net, randn, steps=5)
    assert window.steps == 5
    for name, (weights, quantized) in seen.items():
        assert float(window.weights[name].rate_of_change()) == pytest.approx(rate_of(weights), rel=1e-5)
        assert float(window.quantized[name].rate_of_change()) == pytest.approx(rate_of(quantized), rel=1e-5)
        ratio = window.ratios()[name]
        assert ratio.flatten().tolist() == pytest.approx(ratios_of(weights, quantized), rel=1e-4)
        assert (ratio[3, 32:] == 0).all() and (ratio[0, :32] == 0).all() and ratio.max() > 1


def test_trajectories_are_the_largest_ratios_of_the_candidate_rows(device, randn):
    net = make(device)
    window, seen = follow(net, randn, steps=6)
    candidates = {"0": [0, 9, 19], "1": [0, 2, 5]}  # three rows each, evenly spread
    expected = []
    for name, rows in candidates.items():
        weights, quantized = seen[name]
        ratios = torch.tensor(ratios_of(weights, quantized)).view(weights[0].shape)
        expected += [(float(ratios[row, c]), name, row, c) for row in rows for c in range(ratios.shape[1])]
    expected.sort(reverse=True)
    found = window.trajectories(4)
    assert [t.ratio for t in found] == pytest.approx([ratio for ratio, *_ in expected[:4]], rel=1e-4)
    for t in found:
        layer_weights, layer_quantized = seen[t.layer]
        assert t.row in candidates[t.layer] and len(t.latent) == len(t.quantized) == 7
        quantizer = Recipe().q2
        for step, (weight, quantized) in enumerate(zip(layer_weights, layer_quantized)):
            latent = float(latent_weight(weight, quantizer)[t.row, t.column])
            scale = float(weight[t.row, t.column]) / latent
            assert t.latent[step] == latent
            assert t.quantized[step] == pytest.approx(float(quantized[t.row, t.column]) / scale)
            assert abs(t.quantized[step]) in (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def test_a_weight_on_a_threshold_oscillates(device):
    """It moves by 2 x 2**-10 each step over the threshold 0.75 between 0.5 and 1: R_w = 0.5 / 2**-9."""
    layer = QuantLinear(32, 1, bias=False).to(device)
    with torch.no_grad():
        layer.weight.zero_()[0, 0] = 6.0  # keeps the scale at 1
        layer.weight[0, 1] = 0.75 - 2**-10
    window = OscillationWindow({"fc": layer})
    for step in range(30):
        with torch.no_grad():
            layer.weight[0, 1] += 2**-9 * (-1) ** step
        window.record()
    (best,) = window.trajectories(1)
    assert (best.row, best.column, best.ratio) == (0, 1, 256)
    assert best.quantized == [0.5, 1.0] * 15 + [0.5] and best.latent[:2] == [0.75 - 2**-10, 0.75 + 2**-10]
    assert int((window.ratios()["fc"] > 16).sum()) == 1


def test_a_weight_that_does_not_move_has_ratio_0_whatever_its_scale_does(device):
    """Another one makes the scale of its group 2 and then 1 again, and 0.5 becomes 0 and 0.5."""
    layer = QuantLinear(32, 1, bias=False).to(device)
    with torch.no_grad():
        layer.weight.zero_()[0, :2] = torch.tensor([6.0, 0.5])
    window, paths = OscillationWindow({"fc": layer}), PathLengths(layer)
    for largest, quantized in ((7.0, 0.0), (6.0, 0.5)):
        with torch.no_grad():
            layer.weight[0, 0] = largest
        assert layer.quantized_weight()[0, 1] == quantized
        window.record()
        paths.record()
    assert window.quantized["fc"].length[0, 1] == 1
    for ratios in (window.ratios()["fc"], paths.ratios()[layer.weight]):
        assert ratios[0, 1] == 0 and ratios[0, 0] == 2  # 6, 8 and 6, for 6, 7 and 6: twice 2 over twice 1


def test_q_ema_counts_in_a_window_and_not_in_detection(device, randn):
    net = make(device, Recipe().with_q_ema(0.9))
    q_ema = QEma(net)
    for _ in range(12):  # in use from the tenth update on
        move(net, randn)
        q_ema.after_step()
    with plain_rounding(net):
        plain = PathLengths(net)
    plain_seen = [[quantize_mx(layer.weight).dequantize() for layer in net]]
    window = OscillationWindow(dict(net.named_children()))
    used = [[layer.quantized_weight() for layer in net]]
    for _ in range(4):
        move(net, randn, size=0.2)
        q_ema.after_step()
        window.record()
        with plain_rounding(net):
            plain.record()
        used.append([layer.quantized_weight() for layer in net])
        plain_seen.append([quantize_mx(layer.weight).dequantize() for layer in net])
    for i, layer in enumerate(net):
        in_use, rounded = ([step[i] for step in history] for history in (used, plain_seen))
        assert window.quantized[str(i)].length.flatten().tolist() == pytest.approx(lengths_of(in_use), abs=1e-6)
        ratios = plain.ratios()[layer.weight] * window.weights[str(i)].length
        assert ratios.flatten().tolist() == pytest.approx(lengths_of(rounded), rel=1e-4, abs=1e-6)
        assert lengths_of(in_use) != lengths_of(rounded)


def test_layers_without_q2_have_paths_of_the_weight_only(device, randn):
    recipe = replace(Recipe(), q2=Quantizer(enabled=False))
    layers = {"plain": nn.Linear(8, 8).to(device), "q1 only": QuantLinear(8, 8, recipe=recipe).to(device)}
    window = OscillationWindow(layers)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight *= 1.5
    window.record()
    assert window.weights.keys() == layers.keys() and not window.quantized
    assert [float(path.rate_of_change()) for path in window.weights.values()] == pytest.approx([0.5, 0.5])
    assert window.ratios() == {} and window.trajectories(3) == []


def test_a_stochastic_q2_is_refused():
    layer = QuantLinear(8, 8, recipe=Recipe(q2=Quantizer(rounding="stochastic")))
    with pytest.raises(ValueError, match="needs a Q2 without random numbers, got a stochastic one in fc"):
        OscillationWindow({"fc": layer})
