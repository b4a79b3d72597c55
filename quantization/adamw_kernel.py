"""One step of `RampingAdamW` for all parameters of a model in one Triton kernel: `ramping.step_parameter`, bit for bit.

A table holds the addresses and the scalars of every parameter; a program updates one chunk of one parameter. Sums and
products are rounded one by one, as PyTorch's elementwise operations round them, hence no fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adamw import Scalars, Update

_CHUNK = 2048


_TENSORS = tl.constexpr(7)
_SCALARS = tl.constexpr(len(Scalars._fields))


@triton.jit
def _pointer(table_ptr, row, column: tl.constexpr):
    return tl.load(table_ptr + row * _TENSORS + column).to(tl.pointer_type(tl.float32))


@triton.jit
def _adamw_kernel(chunks_ptr, table_ptr, scalars_ptr, skip_ptr, CHUNK: tl.constexpr):
    row = tl.load(chunks_ptr + tl.program_id(0) * 3)
    first = tl.load(chunks_ptr + tl.program_id(0) * 3 + 1)
    size = tl.load(chunks_ptr + tl.program_id(0) * 3 + 2)
    at = first + tl.arange(0, CHUNK)
    mask = at < tl.where(tl.load(skip_ptr) == 0, size, 0)  # in a skipped step, nothing is read or written
    keep = tl.load(scalars_ptr + row * _SCALARS)
    weight1 = tl.load(scalars_ptr + row * _SCALARS + 1)
    beta2 = tl.load(scalars_ptr + row * _SCALARS + 2)
    weight2 = tl.load(scalars_ptr + row * _SCALARS + 3)
    correction = tl.load(scalars_ptr + row * _SCALARS + 4)
    eps = tl.load(scalars_ptr + row * _SCALARS + 5)
    step_size = tl.load(scalars_ptr + row * _SCALARS + 6)
    p_ptrs, m_ptrs = _pointer(table_ptr, row, 0) + at, _pointer(table_ptr, row, 2) + at
    v_ptrs = _pointer(table_ptr, row, 3) + at
    p = tl.load(p_ptrs, mask=mask, other=0.0)
    gradient = tl.load(_pointer(table_ptr, row, 1) + at, mask=mask, other=0.0)
    m = tl.load(m_ptrs, mask=mask, other=0.0)
    v = tl.load(v_ptrs, mask=mask, other=0.0)

    p = p * keep
    due = tl.abs(gradient) < float("inf")
    ramped = tl.load(table_ptr + row * _TENSORS + 4) != 0
    count = tl.full((CHUNK,), 1.0, tl.float32)
    if ramped:
        period = tl.load(_pointer(table_ptr, row, 4) + at, mask=mask, other=1.0)
        total_ptrs, count_ptrs = _pointer(table_ptr, row, 5) + at, _pointer(table_ptr, row, 6) + at
        total = tl.load(total_ptrs, mask=mask, other=0.0) + tl.where(due, gradient, 0.0)
        count = tl.load(count_ptrs, mask=mask, other=0.0) + due.to(tl.float32)
        # Whole numbers below 2**24: the quotient is one exactly where the count is a multiple of the period.
        quotient = tl.div_rn(count, period)
        due = (count > 0) & (quotient == tl.floor(quotient))
        gradient = tl.div_rn(total, count)
        tl.store(total_ptrs, tl.where(due, 0.0, total), mask=mask)
        tl.store(count_ptrs, tl.where(due, 0.0, count), mask=mask)
    new_m = m + (gradient - m) * weight1
    new_v = v * beta2 + weight2 * gradient * gradient
    denominator = tl.div_rn(tl.sqrt_rn(new_v), correction) + eps
    new_p = p + tl.div_rn(new_m * count * step_size, denominator)
    tl.store(m_ptrs, tl.where(due, new_m, m), mask=mask)
    tl.store(v_ptrs, tl.where(due, new_v, v), mask=mask)
    tl.store(p_ptrs, tl.where(due, new_p, p), mask=mask)


def fits(update: Update) -> bool:
    """Whether the kernel takes this update: fp32, on a GPU, every tensor contiguous."""
    tensors = [t for t in update[:7] if t is not None]
    return update.parameter.is_cuda and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def step(updates: Sequence[Update], skip: Tensor | None = None) -> None:
    """Apply updates that fit, on one device, in place, or none where `skip`, a scalar on that device, is not 0.

    Nothing waits for the device.
    """
    device = updates[0].parameter.device
    chunks = _chunks(tuple(u.parameter.numel() for u in updates), device)
    if not len(chunks):
        return
    table = torch.tensor([[0 if t is None else t.data_ptr() for t in u[:7]] for u in updates], dtype=torch.int64)
    scalars = [[0.0 if isinstance(x, Tensor) else x for x in u.scalars] for u in updates]
    scalars = torch.tensor(scalars, dtype=torch.float32)
    if device.type == "cuda":
        table, scalars = (t.pin_memory().to(device, non_blocking=True) for t in (table, scalars))
    for column, values in enumerate(zip(*(u.scalars for u in updates))):
        if isinstance(values[0], Tensor):
            scalars[:, column] = torch.stack(values)
    if skip is None:
        skip = torch.zeros((), device=device)
    _adamw_kernel[(len(chunks),)](chunks, table, scalars, skip, CHUNK=_CHUNK, enable_fp_fusion=False)


@lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Row of the table, first element and number of elements for every program."""
    rows = [(row, first, size) for row, size in enumerate(sizes) for first in range(0, size, _CHUNK)]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 3)
