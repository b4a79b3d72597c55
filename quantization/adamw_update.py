"""One parameter's share of a `RampingAdamW` step as data: `optim/ramping.py` makes it, PyTorch or a kernel applies it.

The file imports nothing of `quantization`, so that both the optimizer and `triton/adamw.py` can import it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scalars(NamedTuple):
    """The numbers of an update that are the same for every element of the parameter."""

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
    """The update of one parameter. All tensors have its shape; those of periods are None for one without periods."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    period: Tensor | None
    grad_sum: Tensor | None
    grad_count: Tensor | None
    scalars: Scalars

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All fields but `scalars`, in their order."""
        return self[:-1]
