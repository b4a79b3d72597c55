"""The amax of a tensor in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import INTERPRETED, largest_finite, to_fp32
from .tiles import is_wide

_TILE = 32768 if INTERPRETED.value else 8192  # the interpreter likes few tiles
_LONGEST_ROW = 512  # of a tile


@triton.jit
def _largest_kernel(
    x_ptr,  # bf16, fp16 or fp32 [R, L], rows contiguous
    largest_ptr,  # int32 [1], zero before
    rows,
    length,
    x_stride_r,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    if WIDE:
        r, col = r.to(tl.int64), col.to(tl.int64)
    mask = (r[:, None] < rows) & (col[None, :] < length)
    x = to_fp32(tl.load(x_ptr + r[:, None] * x_stride_r + col[None, :], mask=mask, other=0))
    tl.atomic_max(largest_ptr, largest_finite(x.to(tl.int32, bitcast=True)), sem="relaxed")


def largest_magnitude(x_RL: Tensor) -> Tensor:
    """`reference.largest_magnitude`, bit for bit."""
    if x_RL.stride(1) != 1:
        x_RL = x_RL.contiguous()
    largest = torch.zeros(1, dtype=torch.int32, device=x_RL.device)
    if x_RL.numel():
        rows, length = x_RL.shape
        block_l = min(triton.next_power_of_2(length), _LONGEST_ROW)
        block_r = _TILE // block_l
        grid = (triton.cdiv(rows, block_r), triton.cdiv(length, block_l))
        wide = is_wide(x_RL)
        _largest_kernel[grid](x_RL, largest, rows, length, x_RL.stride(0), wide, BLOCK_R=block_r, BLOCK_L=block_l)
    return largest
