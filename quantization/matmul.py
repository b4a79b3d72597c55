"""The matmul of two operands: in the precision of the computation, or exact in FP8.

An E2M1 element times a power of two is an FP8 number, so a quantized operand over one power of two for the whole
tensor is an FP8 tensor, and FP8 tensor cores multiply it at up to twice the rate of bf16 from half the bytes. Products
are accumulated in fp32 either way; the two paths differ by the order of that sum alone.

One operand of a matmul may be E5M2, which holds E2M1 groups whose scales lie up to 28 binades apart; the other is
E4M3, 14 binades. Groups further below the largest become zero: they are smaller than the rounding error of whatever
stands beside them in a sum, and a second, bf16 matmul kept ready inside the same graph would cost more than FP8 saves.
`take_lost_groups` gives their number, and main.py logs it.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import FP8_ROW_MULTIPLE
from .reference import Operand


class Matmul(str, Enum):
    """What multiplies quantized operands under bf16."""

    AUTO = "auto"
    """FP8 where the device has it, else bf16."""
    BF16 = "bf16"
    FP8 = "fp8"
    """FP8 everywhere: on a device without FP8 tensor cores the same numbers are multiplied in fp32, slowly."""


@torch.compiler.assume_constant_result
def has_fp8(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` multiplies FP8 on `device`: NVIDIA from compute capability 8.9 (Ada) on."""
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(torch, "_scaled_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


class LostGroups(NamedTuple):
    """Counters of one device."""

    forward: Tensor
    """int64 [1], added to in place."""
    backward: Tensor
    """fp32 [1], whose gradient is the count: a backward pass in a compiled graph may return numbers, not keep them."""


_LOST: dict[torch.device, LostGroups] = {}


def lost_counters(device: torch.device) -> LostGroups:
    if device not in _LOST:
        counters = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device, requires_grad=True)
        _LOST[device] = LostGroups(*counters)
        # A gradient that exists is added to in place, also by the replays of a CUDA graph.
        _LOST[device].backward.grad = torch.zeros(1, device=device)
    return _LOST[device]


@torch.no_grad()
def take_lost_groups(device: torch.device) -> Tensor:
    """int64 [1]: the groups that FP8 operands have lost on `device` since the last call."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _LOST:
        return torch.zeros(1, dtype=torch.int64, device=device)
    forward, backward = lost_counters(device)
    count = forward + backward.grad.to(torch.int64)
    forward.zero_()
    backward.grad.zero_()
    return count


def matmul_dtype(x: Tensor) -> torch.dtype:
    """bf16 for bf16 input or under autocast, else fp32. fp16 lacks the exponent range of MX scales."""
    if x.dtype == torch.float64:  # which autocast leaves alone
        return torch.float64
    if torch.is_autocast_enabled(x.device.type) or x.dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.float32


def output_dtype(x: Tensor) -> torch.dtype:
    """What `nn.Linear` would return."""
    device_type = x.device.type
    if x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def multiply(a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias in `dtype`, accumulated in fp32 (in float64 for float64): [rows of a, rows of b]."""
    if a.scale is None:
        return _multiply_plain(a.values_RL, b.values_RL, dtype, bias)
    return _multiply_fp8(a, b, dtype, bias)


def _multiply_plain(a: Tensor, b: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    if bias is not None:
        return F.linear(a, b, bias.to(a.dtype)).to(dtype)
    # The fp32 accumulator reaches an fp32 gradient without a detour through bf16.
    if a.is_cuda and a.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.mm(a, b.T, out_dtype=dtype)
    return (a @ b.T).to(dtype)


def _multiply_fp8(a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    a_values, b_values = a.values_RL, b.values_RL
    rows = b_values.shape[0]
    if not a_values.is_cuda or not a_values.numel() or not b_values.numel():
        product = (a_values.float() * a.scale) @ (b_values.float() * b.scale).T
        return (product if bias is None else product + bias.to(torch.bfloat16)).to(dtype)
    missing = -rows % FP8_ROW_MULTIPLE
    if missing:  # no column of the product may be left over either
        b_values = F.pad(b_values.view(torch.uint8), (0, 0, 0, missing)).view(b_values.dtype)
        bias = None if bias is None else F.pad(bias, (0, missing))
    in_epilogue = dtype == torch.bfloat16
    product = torch._scaled_mm(
        a_values,
        b_values.T,
        a.scale.view(()),
        b.scale.view(()),
        bias=bias.to(dtype) if bias is not None and in_epilogue else None,
        out_dtype=dtype if in_epilogue else torch.float32,
        use_fast_accum=False,  # which would sum up with 14 bits
    )
    if bias is not None and not in_epilogue:
        product = product + bias.to(torch.bfloat16)
    return product[:, :rows].to(dtype)
