"""The quantizers as operators of PyTorch, which graphs of torch.compile call.

The compiler sees each operator as opaque and knows only the shapes of its results. So it need not analyse a kernel at
each of some hundred launches, which took most of the time of compiling a model. The functions are those of
`reference.py` and `triton/kernels.py`, one of which does the work. Each has four parts here, side by side: the function
that a graph calls, the operator's schema, what it does, and its fake, which makes tensors of the results' shapes.

The one exception is `largest_magnitude`, the amax: it is written in PyTorch's own operations, which the compiler fuses
into the kernel that makes the tensor, if the tensor's rows are not too long.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .formats import (
    FP8_ROW_MULTIPLE,
    FP32_EXPONENT_MASK,
    FP32_MAGNITUDE_MASK,
    GROUP_SIZE,
    Element,
    Fp8,
)
from .recipe import Quantizer
from .reference import TORCH_FP8, Operand, Packed, Quantized

HAS_TRITON = importlib.util.find_spec("triton") is not None

# The compiler holds rows up to this length in registers. It reads longer ones twice: in a DeiT-B on an H200, a GELU
# fused with its amax took 182 us, and 154 us in two kernels.
_LONGEST_FUSED_ROW = 1024

_LIBRARY = torch.library.Library("mxfp4", "FRAGMENT")


def _define(schema: str, function: Callable, fake: Callable) -> None:
    """Register an operator. One that changes an argument must return a fixed number of tensors.

    So results that were not asked for are empty tensors.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mxfp4::{name}", fake, lib=_LIBRARY)


def backend(tensor: Tensor, dtype: torch.dtype | None = None) -> ModuleType:
    """`triton.kernels` for a tensor on a GPU, else `reference`.

    The kernels write no float64 values, so results in float64 come from the reference on every device.
    """
    if tensor.is_cuda and HAS_TRITON and dtype != torch.float64:
        from .triton import kernels

        return kernels
    return reference


def quantize(
    x_RL: Tensor,
    quantizer: Quantizer,
    *,
    key: Tensor | None = None,
    ema_RL: Tensor | None = None,
    ema_active: Tensor | None = None,
    values_dtype: torch.dtype | None = None,
    fp8: Fp8 | None = None,
    largest: Tensor | None = None,
    lost: Tensor | None = None,
    pack: bool = True,
) -> Quantized:
    """`reference.quantize`."""
    results = torch.ops.mxfp4.quantize(
        x_RL, _names(quantizer), key, ema_RL, ema_active, values_dtype, fp8 and fp8.value, largest, lost, pack
    )
    wanted = values_dtype is not None or fp8 is not None, pack, pack, fp8 is not None
    return Quantized(*(tensor if exists else None for tensor, exists in zip(results, wanted)))


def _quantize(x, quantizer, key, ema, ema_active, values_dtype, fp8, largest, lost, pack) -> tuple[Tensor, ...]:
    results = backend(x, values_dtype).quantize(
        x,
        _quantizer(quantizer),
        key=key,
        ema_RL=ema,
        ema_active=ema_active,
        values_dtype=values_dtype,
        fp8=fp8 and Fp8(fp8),
        largest=largest,
        lost=lost,
        pack=pack,
    )
    return _tensors(x, *results)


def _fake_quantize(x, quantizer, key, ema, ema_active, values_dtype, fp8, largest, lost, pack) -> tuple[Tensor, ...]:
    rows, length = x.shape
    values, scale = _values_like(x, rows, length, values_dtype, fp8)
    packed = (x.new_empty(rows, _ceil_div(length, n), dtype=torch.uint8) if pack else None for n in (2, GROUP_SIZE))
    return _tensors(x, values, *packed, scale)


_define(
    "quantize(Tensor x, str[] quantizer, Tensor? key, Tensor? ema, Tensor? ema_active, ScalarType? values_dtype, "
    "str? fp8, Tensor? largest, Tensor(a!)? lost, bool pack) -> (Tensor, Tensor, Tensor, Tensor)",
    _quantize,
    _fake_quantize,
)


def quantize_both(
    source: Tensor | Packed,
    rows: Quantizer | None,
    columns: Quantizer | None,
    *,
    key: Tensor | None = None,
    dtype: torch.dtype | None = None,
    fp8: Fp8 | None = None,
    largest: Tensor | None = None,
    lost: Tensor | None = None,
    with_sum: bool = False,
) -> tuple[Operand | None, Operand | None, Tensor | None]:
    """`reference.quantize_both`."""
    x_NC, scales, length, made_by = (
        (source.codes_RB, source.scales_RG, source.length, _names(source.quantizer))
        if isinstance(source, Packed)
        else (source, None, 0, [])
    )
    values, scale, column_values, column_scale, total = torch.ops.mxfp4.quantize_both(
        x_NC, scales, length, made_by, _names(rows), _names(columns), key, dtype, fp8 and fp8.value, largest, lost,
        with_sum,
    )  # fmt: skip
    if fp8 is None:
        scale = column_scale = None
    row_operand = None if rows is None else Operand(values, scale)
    column_operand = None if columns is None else Operand(column_values, column_scale)
    return row_operand, column_operand, total if with_sum else None


def _quantize_both(
    x, scales, length, made_by, rows, columns, key, dtype, fp8, largest, lost, with_sum
) -> tuple[Tensor, ...]:
    *operands, total = backend(x, dtype).quantize_both(
        x if scales is None else Packed(x, scales, length, _quantizer(made_by)),
        _quantizer(rows),
        _quantizer(columns),
        key=key,
        dtype=dtype,
        fp8=fp8 and Fp8(fp8),
        largest=largest,
        lost=lost,
        with_sum=with_sum,
    )
    parts = [part for operand in operands for part in (operand or (None, None))]
    return _tensors(x, *parts, total)


def _fake_quantize_both(
    x, scales, length, made_by, rows, columns, key, dtype, fp8, largest, lost, with_sum
) -> tuple[Tensor, ...]:
    n, c = (x.shape[0], length) if scales is not None else x.shape
    row_operand = _values_like(x, n, c, dtype, fp8) if rows else (None, None)
    column_operand = _values_like(x, c, n, dtype, fp8) if columns else (None, None)
    total = x.new_empty(c, dtype=torch.float32) if with_sum else None
    return _tensors(x, *row_operand, *column_operand, total)


_define(
    "quantize_both(Tensor x, Tensor? scales, int length, str[] made_by, str[] rows, str[] columns, Tensor? key, "
    "ScalarType? dtype, str? fp8, Tensor? largest, Tensor(a!)? lost, bool with_sum) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _quantize_both,
    _fake_quantize_both,
)


def dequantize(codes_RB: Tensor, scales_RG: Tensor, length: int, element: Element, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize`."""
    return torch.ops.mxfp4.dequantize(codes_RB, scales_RG, length, element.value, dtype)


def _dequantize(codes, scales, length, element, dtype) -> Tensor:
    return backend(codes, dtype).dequantize(codes, scales, length, Element(element), dtype).contiguous()


def _fake_dequantize(codes, scales, length, element, dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], length, dtype=dtype)


_define(
    "dequantize(Tensor codes, Tensor scales, int length, str element, ScalarType dtype) -> Tensor",
    _dequantize,
    _fake_dequantize,
)


def largest_magnitude(x_RL: Tensor) -> Tensor:
    """`reference.largest_magnitude`. The result for a bf16 tensor is rounded to bf16 once more, ties upwards.

    That changes nothing, unless the compiler takes the amax of numbers that it has not yet rounded to bf16.
    """
    if x_RL.shape[1] > _LONGEST_FUSED_ROW or not x_RL.numel():
        return torch.ops.mxfp4.largest_magnitude(x_RL)
    bits = x_RL.to(torch.float32).view(torch.int32) & FP32_MAGNITUDE_MASK
    # First the amax of each row, which is fused into the kernel that makes the rows.
    amax = torch.where(bits < FP32_EXPONENT_MASK, bits, 0).amax(dim=1).amax().view(1)
    return rounded_to_bf16(amax) if x_RL.dtype == torch.bfloat16 else amax


def rounded_to_bf16(bits: Tensor) -> Tensor:
    """Round the bits of finite fp32 magnitudes, int32, to those of bf16: ties upwards, at most bf16's maximum."""
    return ((bits + 0x8000) & -0x10000).clamp(max=0x7F7F0000)


def _largest_magnitude(x) -> Tensor:
    return backend(x, x.dtype).largest_magnitude(x)


def _fake_largest_magnitude(x) -> Tensor:
    return x.new_empty(1, dtype=torch.int32)


_define("largest_magnitude(Tensor x) -> Tensor", _largest_magnitude, _fake_largest_magnitude)


def _names(q: Quantizer | None) -> list[str]:
    return [] if q is None else [q.element.value, q.scaling.value, q.rounding.value]


def _quantizer(names: list[str]) -> Quantizer | None:
    return Quantizer(True, *names) if names else None


def _tensors(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if tensor is None else tensor.contiguous() for tensor in tensors)


def _ceil_div(length: int, size: int) -> int:
    return -(-length // size)


def _values_like(x: Tensor, rows: int, length: int, dtype: torch.dtype | None, fp8: str | None) -> tuple[Tensor, ...]:
    """An operand and its scale, which is empty without FP8."""
    if fp8 is None:
        return _tensors(x, None if dtype is None else x.new_empty(rows, length, dtype=dtype), None)
    padded = _ceil_div(length, FP8_ROW_MULTIPLE) * FP8_ROW_MULTIPLE
    return x.new_empty(rows, padded, dtype=TORCH_FP8[Fp8(fp8)]), x.new_empty(1, dtype=torch.float32)
