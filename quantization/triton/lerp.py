"""One Triton kernel that moves all averages of a model: the formula of `q_ema.lerp_unless`, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .multi_tensor import CHUNK, addresses, chunk, chunks, pointer


@triton.jit
def _lerp_kernel(chunks_ptr, table_ptr, skip_ptr, weight, rest, FROM_AVERAGE: tl.constexpr, CHUNK: tl.constexpr):
    row, at, mask = chunk(chunks_ptr, skip_ptr, CHUNK)
    average_ptrs = pointer(table_ptr, row, 0, 2) + at
    average = tl.load(average_ptrs, mask=mask, other=0.0)
    target = tl.load(pointer(table_ptr, row, 1, 2) + at, mask=mask, other=0.0)
    if FROM_AVERAGE:
        new = average + (target - average) * weight
    else:
        new = target + (average - target) * rest
    tl.store(average_ptrs, new, mask=mask)


def step(averages: Sequence[Tensor], targets: Sequence[Tensor], weight: float, skip: Tensor | None = None) -> None:
    """averages += weight (targets - averages), in place, or nothing where `skip`, a scalar beside them, is not 0.

    All tensors must fit (`multi_tensor.fits`), and each average must have the shape of its target. Nothing waits for
    the device.
    """
    device = averages[0].device
    programs = chunks(tuple(average.numel() for average in averages), device)
    if not len(programs):
        return
    table = addresses(list(zip(averages, targets)), device)
    skip = torch.zeros((), device=device) if skip is None else skip
    # `rest` is rounded once, from fp64. A multiplication that is fused with the addition would not be rounded itself.
    options = {"FROM_AVERAGE": weight < 0.5, "CHUNK": CHUNK, "enable_fp_fusion": False}
    with torch.cuda.device_of(averages[0]):
        _lerp_kernel[(len(programs),)](programs, table, skip, weight, 1 - weight, **options)
    increment_version(averages)
