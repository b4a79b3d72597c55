"""Do something to a model and its optimizer as if it had never happened."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


def rng_state() -> dict:
    """State of every global random generator: torch on the CPU and on the current GPU, numpy, Python.

    Tensors and plain values only, so that it can go into a checkpoint that loads with `weights_only=True`.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: dict) -> None:
    """Undo everything that was drawn since `state` was taken."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


@contextmanager
def rewound(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """On leaving, parameters, buffers, gradients, optimizer, train/eval modes and random generators are as before.

    The copy is kept in memory, on the devices of its originals.
    """
    tensors = [*model.parameters(), *model.buffers()]
    saved_tensors = [t.detach().clone() for t in tensors]
    saved_gradients = [p.grad for p in model.parameters()]
    saved_modes = [(module, module.training) for module in model.modules()]
    saved_state = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    saved_groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    saved_rng = rng_state()
    for p in model.parameters():
        p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, saved in zip(tensors, saved_tensors):
                tensor.copy_(saved)
        for p, gradient in zip(model.parameters(), saved_gradients):
            p.grad = gradient
        for module, training in saved_modes:
            module.training = training
        optimizer.state.clear()
        optimizer.state.update(saved_state)
        for group, saved in zip(optimizer.param_groups, saved_groups):
            group.update(saved)
        set_rng_state(saved_rng)
