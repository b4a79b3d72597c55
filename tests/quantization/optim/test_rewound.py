"""`rewound` undoes every change of a model and its optimizer that was made inside its block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from quantization import RampingAdamW
from quantization.optim.rewound import rewound


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, RampingAdamW])
@pytest.mark.parametrize("started", [False, True])
def test_statistics_gradients_and_options_come_back_too(optimizer_class, started, randn, device):
    """Beside the weights; a gradient that waits for its optimizer step neither grows nor goes."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).to(device)
    groups = [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[1].parameters()}]
    optimizer = optimizer_class(groups)

    def accumulate() -> None:
        model(randn(5, 6)).square().sum().backward()

    if started:
        accumulate()
        optimizer.step()
    model[0].weight.grad = held = randn(4, 6)
    model[1].bias.grad = None
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    tensors, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with rewound(model, optimizer):
        assert all(p.grad is None for p in model.parameters())
        for group in optimizer.param_groups:
            group["lr"] *= 3
            group["weight_decay"] = 0.5
        for _ in range(2):
            accumulate()
            optimizer.step()
        assert model[1].num_batches_tracked == 2 + started
        assert not torch.equal(model[1].running_mean, tensors["1.running_mean"])
    assert model[0].weight.grad is held
    for p, gradient in zip(model.parameters(), gradients):
        assert gradient is None if p.grad is None else torch.equal(p.grad, gradient)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    now = optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"] and now["state"].keys() == state["state"].keys()
    for index, of_parameter in state["state"].items():
        assert all(torch.equal(now["state"][index][name], value) for name, value in of_parameter.items())
