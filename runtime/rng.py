"""Saves and restores the global random generators, for checkpoints and for code that must not disturb a run."""

from __future__ import annotations

import random

import numpy as np
import torch


def rng_state() -> dict:
    """State of every global random generator: torch on the CPU and on the current GPU, numpy, Python.

    It holds tensors and plain values only, so that it can go into a checkpoint that loads with `weights_only=True`.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: dict) -> None:
    """Put every generator back into `state`, so that it draws the same numbers again."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
