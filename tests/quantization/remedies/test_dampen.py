"""Dampening's gradient against autograd's of the loss as the papers write it, and its schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from quantization import Dampen, Quantizer, Recipe, quant_linears, swap_linears


@pytest.fixture
def model(device) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 7), nn.Linear(7, 3))
    return swap_linears(layers.to(device), Recipe(), ("0", "2"))


@pytest.mark.parametrize("reduction", ["sum", "kernel_mean"])
def test_gradient_is_that_of_the_loss(reduction, model, randn):
    x = randn(5, 40)
    dampen = Dampen(model, total_steps=8, weight=0.3, reduction=reduction)
    dampen.step = 5
    progress = (5 / 8 - 0.25) / 0.75
    weight = 0.3 * (1 - math.cos(math.pi * progress)) / 2

    torch.manual_seed(1)
    loss = model(x).square().sum()
    for layer in quant_linears(model).values():
        difference = layer.weight - layer.quantized_weight()
        if reduction == "sum":
            loss = loss + weight * difference.norm() ** 2
        else:
            loss = loss + weight * difference.square().sum(0).mean()
    want = torch.autograd.grad(loss, list(model.parameters()))

    torch.manual_seed(1)
    model(x).square().sum().backward()
    dampen.before_update()
    for parameter, gradient in zip(model.parameters(), want):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


def test_nothing_in_the_first_quarter_then_a_cosine(model):
    dampen = Dampen(model, total_steps=100, weight=2.0)
    weights = []
    for _ in range(100):
        weights.append(dampen.present_weight)
        dampen.after_step()
    assert weights[:26] == [0.0] * 26 and all(a < b for a, b in zip(weights[25:], weights[26:]))
    assert weights[25 + 25] == pytest.approx(2 * (1 - math.cos(math.pi / 3)) / 2)
    assert dampen.present_weight == 2.0 == dampen.log_numbers()["dampen_weight"]
    other = Dampen(model, total_steps=100, weight=2.0)
    other.load_state_dict(dampen.state_dict())
    assert other.step == 100


def test_it_pulls_weights_to_the_grid(model):
    """Without a task, gradient descent ends where Q2(W) = W."""
    dampen = Dampen(model, total_steps=1, weight=0.1)
    dampen.step = 1
    layers = list(quant_linears(model).values())
    before = [(layer.weight - layer.quantized_weight()).norm() for layer in layers]
    for _ in range(40):
        for layer in layers:
            layer.weight.grad = torch.zeros_like(layer.weight)
        dampen.before_update()
        with torch.no_grad():
            for layer in layers:
                layer.weight -= layer.weight.grad
    assert all((layer.weight - layer.quantized_weight()).norm() < 1e-3 * b for layer, b in zip(layers, before))


def test_a_frozen_parameter_is_left_alone(model, randn):
    first = model[0].weight.requires_grad_(False)
    model(randn(5, 40)).sum().backward()
    dampen = Dampen(model, total_steps=1, weight=1.0)
    dampen.step = 1
    dampen.before_update()
    assert first.grad is None


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (Recipe(), {"weight": -1}, "weight >= 0 .* got -1 and 8"),
        (Recipe(), {"reduction": "mean"}, "mean"),
        (Recipe(q2=Quantizer(enabled=False)), {}, "needs weights that Q2 quantizes without Q-EMA"),
        (Recipe().with_q_ema(), {}, "needs weights that Q2 quantizes without Q-EMA"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe, options, message):
    model = swap_linears(nn.Sequential(nn.Linear(8, 8)), recipe, ("0",))
    with pytest.raises(ValueError, match=message):
        Dampen(model, **{"total_steps": 8, "weight": 1.0} | options)
