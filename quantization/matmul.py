"""The matmul of two operands: in bf16, fp32 or float64, or exactly in FP8.

An E2M1 element times a power of two is an FP8 number. So a quantized operand, divided by one power of two for the whole
tensor, is an FP8 tensor, and FP8 tensor cores multiply it at up to twice the rate of bf16 from half the bytes. Products
are accumulated in fp32 either way; the two paths differ only in the order of that sum.

One operand of a matmul may be E5M2, which holds E2M1 groups whose scales lie up to 28 binades apart; the other is
E4M3, 14 binades. A group further below the tensor's amax underflows: it becomes zero. It is smaller than the rounding
error of its neighbours in the sum, and a second matmul in bf16, kept ready inside the same graph, would cost more than
FP8 saves. `take_lost_groups` returns the number of underflowed groups, which the log calls `lost_groups`.
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
    """The arithmetic that multiplies quantized operands under bf16."""

    AUTO = "auto"
    """FP8 where the device has it, else bf16."""
    BF16 = "bf16"
    FP8 = "fp8"
    """FP8 everywhere: a device without FP8 tensor cores multiplies the same numbers in fp32, slowly."""


@torch.compiler.assume_constant_result
def has_fp8(device: torch.device) -> bool:
    """Tell if `torch._scaled_mm` multiplies FP8 on `device`: NVIDIA from compute capability 8.9 (Ada) on."""
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(torch, "_scaled_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


class UnderflowCounters(NamedTuple):
    """Count the underflowed groups of all layers on one device."""

    forward: Tensor
    """int64 [1]; the quantizers of the forward pass add to it in place."""
    backward: Tensor
    """fp32 [1], always zero; the count is in its gradient. A compiled backward cannot mutate a buffer, so it returns
    the count as this tensor's gradient, and autograd adds that to `backward.grad`."""


_COUNTERS: dict[torch.device, UnderflowCounters] = {}


def underflow_counters(device: torch.device) -> UnderflowCounters:
    """The counters of `device`, which the first call makes."""
    if device not in _COUNTERS:
        counters = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device, requires_grad=True)
        _COUNTERS[device] = UnderflowCounters(*counters)
        # Autograd adds in place to a gradient that exists, and so do the replays of a CUDA graph.
        _COUNTERS[device].backward.grad = torch.zeros(1, device=device)
    return _COUNTERS[device]


@torch.no_grad()
def take_lost_groups(device: torch.device) -> Tensor:
    """int64 [1]: the groups of FP8 operands that have underflowed on `device` since the last call."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _COUNTERS:
        return torch.zeros(1, dtype=torch.int64, device=device)
    forward, backward = underflow_counters(device)
    count = forward + backward.grad.to(torch.int64)
    forward.zero_()
    backward.grad.zero_()
    return count


def matmul_dtype(x: Tensor) -> torch.dtype:
    """bf16 for bf16 input or under autocast, else fp32. fp16 lacks the exponent range of MX scales."""
    if x.dtype == torch.float64:  # autocast leaves it alone
        return torch.float64
    if torch.is_autocast_enabled(x.device.type) or x.dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.float32


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype that `nn.Linear` would return."""
    device_type = x.device.type
    if x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def multiply(a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias in `dtype`, [rows of a, rows of b], accumulated in fp32 (float64 for float64)."""
    if a.scale is None:
        return _multiply_plain(a.values_RL, b.values_RL, dtype, bias)
    return _multiply_fp8(a, b, dtype, bias)


def _multiply_plain(a: Tensor, b: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    if bias is not None:
        return F.linear(a, b, bias.to(a.dtype)).to(dtype)
    # The fp32 accumulator becomes the fp32 gradient without being rounded to bf16 in between.
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
    if missing:  # the product's columns must be a multiple of 16, too
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
        use_fast_accum=False,  # fast accumulation would sum up with 14 bits
    )
    if bias is not None and not in_epilogue:
        product = product + bias.to(torch.bfloat16)
    return product[:, :rows].to(dtype)
