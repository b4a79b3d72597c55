"""Moving averages that advance with the optimizer's steps, except the skipped ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import HAS_TRITON

if HAS_TRITON:
    from .triton import lerp as lerp_kernel
    from .triton import multi_tensor
else:
    lerp_kernel = None


def lerp_unless(skip: Tensor | None, averages: list[Tensor], targets: list[Tensor], weight: float) -> None:
    """averages += weight (targets - averages), in place; nothing changes if `skip`, an fp32 scalar of 0 or 1, is 1.

    `skip` may be on the device; the host does not read it. Every operation rounds once, so the bits are the same on
    every processor; those of `torch.lerp` are not, because some processors fuse its multiplication with its addition.
    """
    alike = [t.shape for t in averages] == [t.shape for t in targets]
    tensors = [*averages, *targets] if skip is None else [skip, *averages, *targets]
    if alike and lerp_kernel is not None and multi_tensor.fits(tensors):
        lerp_kernel.step(averages, targets, weight, skip)
        return
    for average, target in zip(averages, targets):
        if weight < 0.5:
            new = average + (target - average) * weight
        else:  # with a weight of 1, the average becomes exactly the target
            new = target + (average - target) * (1 - weight)
        average.copy_(new if skip is None else torch.where(skip > 0, average, new))
