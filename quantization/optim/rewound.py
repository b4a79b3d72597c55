"""`rewound`: train a model for some steps, then continue as if these steps had never happened."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def rewound(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """On leaving, parameters, buffers, gradients, optimizer, train/eval modes and random generators are as before.

    The copy is kept in memory, on the devices of its originals. The generators are those of torch (the CPU's and the
    current GPU's), numpy and Python.
    """
    tensors = [*model.parameters(), *model.buffers()]
    saved_tensors = [t.detach().clone() for t in tensors]
    saved_gradients = [p.grad for p in model.parameters()]
    saved_modes = [(module, module.training) for module in model.modules()]
    saved_state = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    saved_groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    for p in model.parameters():
        p.grad = None
    try:
        with _generators_rewound():
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


@contextmanager
def _generators_rewound() -> Iterator[None]:
    """On leaving, the global random generators draw the numbers that they would have drawn on entering."""
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
