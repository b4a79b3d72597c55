"""Hundreds of steps of the smallest model, or thousands in the long test, leave memory where it was."""

from __future__ import annotations

import gc
import resource
import sys

import pytest
import torch
from torch import nn

from engine import TrainStep
from quantization import Freeze, Int4Recipe, QEma, RampingAdamW, Recipe, quant_linears, swap_linears
from training.losses import OutputLoss

CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss())

WARM_UP = 200
MEGABYTE = 2**20


class Tiny(nn.Module):
    """One quantized linear, recomputed in the backward pass, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(6, 8), nn.GELU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.utils.checkpoint.checkpoint(self.mlp, x, use_reentrant=False))


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.skipif(torch.cuda.is_available(), reason="resident memory is measured, the CPU's")
@pytest.mark.parametrize(
    ("method", "steps"),
    [("q-ema and q-ramping", 800), ("freeze", 400), ("int4", 400)]
    + [pytest.param(m, 3000, marks=pytest.mark.long) for m in ("q-ema and q-ramping", "freeze", "int4")],
)
def test_memory_does_not_grow(method, steps):
    """Live tensors to the number, Python's objects by less than one a step, the process's memory by 8 MB.

    Python's own caches still take some tenths of an object per step then, ever fewer: none after some thousand steps.
    """
    torch.manual_seed(0)
    recipe = {"int4": Int4Recipe(), "freeze": Recipe()}.get(method, Recipe().with_q_ema(0.99))
    model = swap_linears(Tiny(), recipe, ("mlp.0",))
    ramping = method == "q-ema and q-ramping"
    optimizer = (RampingAdamW if ramping else torch.optim.AdamW)(model.parameters(), lr=1e-3)
    step = TrainStep(model, CROSS_ENTROPY, optimizer, torch.device("cpu"), clip_grad=1.0, accumulate_steps=2)
    after = QEma(model) if ramping else Freeze(model, steps, 0.01) if method == "freeze" else None
    losses = torch.zeros(steps)

    def train(first: int, last: int) -> None:
        for i in range(first, last):
            if ramping and i % 100 == 0:
                weights = [layer.weight for layer in quant_linears(model).values()]
                optimizer.set_periods({weight: torch.randint(1, 4, weight.shape).float() for weight in weights})
            images = torch.randn(4 - i % 2, 6)
            losses[i], _ = step((images, (images[:, 0] > 0).long()))
            if after is not None:
                after.after_step()

    train(0, WARM_UP)
    tensors, blocks = live_tensors(), sys.getallocatedblocks()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    train(WARM_UP, steps)
    assert live_tensors() <= tensors  # fewer if tests before this one have left some
    assert sys.getallocatedblocks() - blocks < steps - WARM_UP
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident < 8 * MEGABYTE
    assert losses.isfinite().all() and losses[-100:].mean() < losses[:100].mean()
