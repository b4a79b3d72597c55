"""One Triton kernel that steps all parameters of a `RampingAdamW`: `ramping.step_parameter`, bit for bit.

A table holds the addresses of every parameter's tensors, a second one its scalars, in the order of the fields of
`Update` and `Scalars`. A program updates one chunk of one parameter. Sums and products are rounded one by one, as
PyTorch's elementwise operations round them, hence no fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ..adamw_update import Scalars, Update
from . import multi_tensor
from .multi_tensor import CHUNK, addresses, chunk, chunks, pointer, to_device


def _columns(fields: Sequence[str], *names: str) -> tuple[tl.constexpr, ...]:
    return tuple(tl.constexpr(fields.index(name)) for name in names)


# Columns of the two tables, in the order of the fields. A kernel reads only global constexprs, hence one name each.
_TENSORS, _SCALARS = tl.constexpr(len(Update._fields) - 1), tl.constexpr(len(Scalars._fields))
_PARAMETER, _GRADIENT, _EXP_AVG, _EXP_AVG_SQ, _PERIOD, _GRAD_SUM, _GRAD_COUNT = _columns(
    Update._fields, "parameter", "gradient", "exp_avg", "exp_avg_sq", "period", "grad_sum", "grad_count"
)
_KEEP, _WEIGHT1, _BETA2, _WEIGHT2, _CORRECTION, _EPS, _STEP_SIZE = _columns(
    Scalars._fields, "keep", "weight1", "beta2", "weight2", "correction", "eps", "step_size"
)


@triton.jit
def _adamw_kernel(chunks_ptr, table_ptr, scalars_ptr, skip_ptr, CHUNK: tl.constexpr):
    row, at, mask = chunk(chunks_ptr, skip_ptr, CHUNK)
    scalars_ptr += row * _SCALARS
    keep = tl.load(scalars_ptr + _KEEP)
    weight1 = tl.load(scalars_ptr + _WEIGHT1)
    beta2 = tl.load(scalars_ptr + _BETA2)
    weight2 = tl.load(scalars_ptr + _WEIGHT2)
    correction = tl.load(scalars_ptr + _CORRECTION)
    eps = tl.load(scalars_ptr + _EPS)
    step_size = tl.load(scalars_ptr + _STEP_SIZE)
    p_ptrs = pointer(table_ptr, row, _PARAMETER, _TENSORS) + at
    m_ptrs = pointer(table_ptr, row, _EXP_AVG, _TENSORS) + at
    v_ptrs = pointer(table_ptr, row, _EXP_AVG_SQ, _TENSORS) + at
    p = tl.load(p_ptrs, mask=mask, other=0.0)
    gradient = tl.load(pointer(table_ptr, row, _GRADIENT, _TENSORS) + at, mask=mask, other=0.0)
    m = tl.load(m_ptrs, mask=mask, other=0.0)
    v = tl.load(v_ptrs, mask=mask, other=0.0)

    p = p * keep
    due = tl.abs(gradient) < float("inf")
    ramped = tl.load(table_ptr + row * _TENSORS + _PERIOD) != 0
    count = tl.full((CHUNK,), 1.0, tl.float32)
    if ramped:
        period = tl.load(pointer(table_ptr, row, _PERIOD, _TENSORS) + at, mask=mask, other=1.0)
        total_ptrs = pointer(table_ptr, row, _GRAD_SUM, _TENSORS) + at
        count_ptrs = pointer(table_ptr, row, _GRAD_COUNT, _TENSORS) + at
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
    """Tell if the kernel takes this update: all its tensors are fp32 and contiguous, on one GPU."""
    return multi_tensor.fits(t for t in update.tensors if t is not None)


def step(updates: Sequence[Update], skip: Tensor | None = None) -> None:
    """Apply updates that fit, on one device, in place, or none where `skip`, a scalar on that device, is not 0.

    Nothing waits for the device.
    """
    device = updates[0].parameter.device
    programs = chunks(tuple(u.parameter.numel() for u in updates), device)
    if not len(programs):
        return
    table = addresses([u.tensors for u in updates], device)
    scalars = [[0.0 if isinstance(x, Tensor) else x for x in u.scalars] for u in updates]
    scalars = to_device(torch.tensor(scalars, dtype=torch.float32), device)
    for column, values in enumerate(zip(*(u.scalars for u in updates))):
        if isinstance(values[0], Tensor):
            scalars[:, column] = torch.stack(values)
    if skip is None:
        skip = torch.zeros((), device=device)
    with torch.cuda.device_of(skip):
        _adamw_kernel[(len(programs),)](programs, table, scalars, skip, CHUNK=CHUNK, enable_fp_fusion=False)
    # Whoever keeps what was made of a weight, such as `weights_quantized_once`, sees by its version that it changed.
    written = (t for u in updates for t in u._replace(gradient=None).tensors if t is not None)
    increment_version(list(written))
