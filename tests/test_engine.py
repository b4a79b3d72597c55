"""The training step's gradient clipping."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from engine import TrainStep, autocast
from quantization import RampingAdamW

OPTIMIZERS = [torch.optim.AdamW, RampingAdamW]


def build(optimizer: type[torch.optim.Optimizer], clip_grad: float, device: torch.device) -> TrainStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(device)
    return TrainStep(model, nn.CrossEntropyLoss(), optimizer(model.parameters(), lr=0.1), device, clip_grad=clip_grad)


@pytest.fixture
def batch(randn, device):
    return 20 * randn(16, 6), torch.arange(16, device=device) % 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("share", [0.25, 4.0])
def test_the_norm_of_all_gradients_together_is_limited(optimizer, share, batch, device):
    """The optimizer gets g * min(1, limit / |g|), with |g| over every parameter; below the limit not a bit changes."""
    free = build(optimizer, 0.0, device)
    before = copy.deepcopy(free.model)
    free(batch)
    gradients = [p.grad for p in free.model.parameters()]
    norm = torch.cat([g.double().flatten() for g in gradients]).norm().item()
    assert norm > 1  # far above the 1e-6 that PyTorch adds to it
    clipped = build(optimizer, share * norm, device)
    clipped(batch)
    wanted = [g * min(1.0, share) for g in gradients]
    for p, gradient in zip(clipped.model.parameters(), wanted):
        tolerance = 0 if share > 1 else 1e-5
        assert torch.allclose(p.grad, gradient, rtol=tolerance, atol=0)
    for p, clipped_p in zip(before.parameters(), clipped.model.parameters()):
        p.grad = clipped_p.grad.clone()
    optimizer(before.parameters(), lr=0.1).step()
    for p, clipped_p in zip(before.parameters(), clipped.model.parameters()):
        assert torch.equal(p, clipped_p)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_that_a_callback_replaces_are_clipped(optimizer, batch, device):
    step = build(optimizer, 0.3, device)

    def enlarge() -> None:
        for p in step.model.parameters():
            p.grad = 1e6 * p.grad

    step.before_update = enlarge
    step(batch)
    norm = torch.cat([p.grad.double().flatten() for p in step.model.parameters()]).norm().item()
    assert norm == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_as_torchs_own_over_several_steps(optimizer, batch, device):
    ours, reference = build(optimizer, 0.3, device), build(optimizer, 0.0, device)
    for _ in range(3):
        ours(batch)
        reference.optimizer.zero_grad()
        with autocast(device):
            loss = reference.criterion(reference.model(batch[0]), batch[1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.model.parameters(), 0.3)
        reference.optimizer.step()
    for p, q in zip(ours.model.parameters(), reference.model.parameters()):
        assert torch.equal(p, q)
