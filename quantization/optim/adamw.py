"""One parameter's share of a `RampingAdamW` step, as data for PyTorch (`ramping.py`) or for a kernel to carry out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scalars(NamedTuple):
    """What is the same for every element of a parameter."""

    keep: float
    """1 - lr * weight_decay"""
    weight1: float
    """1 - beta1"""
    beta2: float
    weight2: float
    """1 - beta2"""
    correction: float | Tensor
    """sqrt(1 - beta2**step)"""
    eps: float
    step_size: float | Tensor
    """-lr / (1 - beta1**step)"""


class Update(NamedTuple):
    """One parameter's update; the last three tensors are None for a parameter without periods."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    period: Tensor | None
    grad_sum: Tensor | None
    grad_count: Tensor | None
    scalars: Scalars
