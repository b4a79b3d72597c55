"""Moving averages of all of a model's tensors in one Triton kernel: `torch._foreach_lerp_`, bit for bit on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .multi_tensor import CHUNK, addresses, chunk, chunks, pointer


@triton.jit
def _lerp_kernel(chunks_ptr, table_ptr, skip_ptr, weight, FROM_AVERAGE: tl.constexpr, CHUNK: tl.constexpr):
    row, at, mask = chunk(chunks_ptr, skip_ptr, CHUNK)
    average_ptrs = pointer(table_ptr, row, 0, 2) + at
    average = tl.load(average_ptrs, mask=mask, other=0.0)
    target = tl.load(pointer(table_ptr, row, 1, 2) + at, mask=mask, other=0.0)
    # The two forms of lerp in PyTorch, with the fused multiply-add that its compiler makes of them.
    if FROM_AVERAGE:
        new = tl.fma(target - average, tl.full((CHUNK,), weight, tl.float32), average)
    else:
        new = tl.fma(average - target, tl.full((CHUNK,), 1 - weight, tl.float32), target)
    tl.store(average_ptrs, new, mask=mask)


def step(averages: Sequence[Tensor], targets: Sequence[Tensor], weight: float, skip: Tensor) -> None:
    """averages += weight (targets - averages), in place, or nothing where `skip`, a scalar beside them, is not 0.

    All of them fit (`multi_tensor.fits`), and each average has the shape of its target; nothing waits for the device.
    """
    device = averages[0].device
    programs = chunks(tuple(average.numel() for average in averages), device)
    if len(programs):
        table = addresses(list(zip(averages, targets)), device)
        with torch.cuda.device_of(averages[0]):
            _lerp_kernel[(len(programs),)](programs, table, skip, weight, FROM_AVERAGE=abs(weight) < 0.5, CHUNK=CHUNK)
        increment_version(averages)
