"""`quantize_mx` quantizes any floating-point tensor along any axis to packed MX codes and scales, and back.

`backend_for` chooses the implementation: Triton kernels on CUDA, the PyTorch reference elsewhere, and operators in a
compiled graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import operators
from .formats import GROUP_SIZE, Element, Rounding, Scaling
from .philox import fresh_keys
from .recipe import Quantizer
from .shared_name import NAMES


def backend_for(tensor: Tensor, dtype: torch.dtype | None = None) -> ModuleType:
    """The module with the quantizers' functions: `triton.kernels` or `reference`, which return the same bits.

    In a compiled graph it is `operators`, which calls one of them.
    """
    return operators if torch.compiler.is_compiling() else operators.backend(tensor, dtype)


@dataclass(frozen=True, eq=False, repr=False)
class MXTensor:
    """A tensor in MX format, which takes 4.25 bits per value if the length of the axis is a multiple of 32.

    `torch.save` stores it and `torch.load` reads it with `weights_only`, too; `mx_file.py` has safetensors. Two are
    equal if they stand for one shape, axis and element with the same bits, on whatever devices.

    Raises TypeError for codes or scales of another dtype, and ValueError if their shapes do not belong to `shape`.
    """

    codes: Tensor
    """uint8, shaped like the tensor but ceil(length / 2) along `axis`: two codes a byte, the first element in the low
    nibble. E2M1 codes may be viewed as `torch.float4_e2m1fn_x2`. `axis` is contiguous in memory."""
    scales: Tensor
    """float8_e8m0fnu, shaped like the tensor but ceil(length / 32) along `axis`."""
    shape: torch.Size
    """Shape of the tensor."""
    axis: int
    """The axis, counted from the front, along which 32 consecutive elements share a scale."""
    element: Element

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        object.__setattr__(self, "element", Element(self.element))
        shape = self.shape or torch.Size((1,))
        if not 0 <= self.axis < len(shape):
            raise ValueError(f"axis must lie in [0, {len(shape) - 1}] for the shape {tuple(shape)}, got {self.axis}")
        for name, dtype, values in (("codes", torch.uint8, 2), ("scales", torch.float8_e8m0fnu, GROUP_SIZE)):
            part = getattr(self, name)
            wanted = (*shape[: self.axis], -(-shape[self.axis] // values), *shape[self.axis + 1 :])
            if part.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {part.dtype}")
            if tuple(part.shape) != wanted:
                raise ValueError(
                    f"{name} must have the shape {wanted} for a tensor of {tuple(shape)}, got {tuple(part.shape)}"
                )

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> MXTensor:
        """This tensor on `device`; itself if it is there already. Raises TypeError for a dtype: see `dequantize`."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"MXTensor.to takes a device, got {device}; dequantize({device}) gives values in a dtype")
        codes = self.codes.to(device, non_blocking=non_blocking)
        if codes is self.codes:
            return self
        return MXTensor(codes, self.scales.to(device, non_blocking=non_blocking), self.shape, self.axis, self.element)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MXTensor):
            return NotImplemented
        if (self.shape, self.axis, self.element) != (other.shape, other.axis, other.element):
            return False
        other = other.to(self.device)
        scales, others = (t.scales.view(torch.uint8) for t in (self, other))
        return torch.equal(self.codes, other.codes) and torch.equal(scales, others)

    __hash__ = None  # of what is equal by its content; the dataclass would keep that of the identity

    def __repr__(self) -> str:
        where = f"axis={self.axis}, element={self.element.value}, device={self.device}"
        return f"MXTensor(shape={tuple(self.shape)}, {where}, {self.nbytes:,} bytes)"

    def __reduce__(self) -> tuple:
        # Outside of torch.save, PyTorch cannot unpickle a tensor of float8_e8m0fnu.
        scale_bytes = self.scales.view(torch.uint8)
        return rebuild_mx, (self.codes, scale_bytes, tuple(self.shape), self.axis, self.element.value)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, in `shape`. fp32 and bf16 hold them exactly; values beyond the range of `dtype` saturate.

        Groups with the scale 0xFF are NaN.
        """
        if not self.shape:
            rows_shape, length = torch.Size(), 1
        else:
            rows_shape = self.shape[: self.axis] + self.shape[self.axis + 1 :]
            length = self.shape[self.axis]
        rows = rows_shape.numel()
        codes_RB = self.codes.movedim(self.axis, -1).reshape(rows, self.codes.shape[self.axis])
        scales_RG = self.scales.view(torch.uint8).movedim(self.axis, -1).reshape(rows, self.scales.shape[self.axis])
        values_RL = backend_for(codes_RB, dtype).dequantize(codes_RB, scales_RG, length, self.element, dtype)
        if not self.shape:
            return values_RL.reshape(())
        return values_RL.reshape(*rows_shape, length).movedim(-1, self.axis)


def rebuild_mx(codes: Tensor, scale_bytes: Tensor, shape: tuple[int, ...], axis: int, element: str) -> MXTensor:
    """The tensor in a pickle. Raises what `MXTensor` raises."""
    return MXTensor(codes, scale_bytes.view(torch.float8_e8m0fnu), shape, axis, element)


# What a pickle calls the function depends on the name by which the package was imported.
torch.serialization.add_safe_globals([(rebuild_mx, f"{package}.mx.{rebuild_mx.__name__}") for package in NAMES])


def quantize_mx(
    x: Tensor,
    axis: int = -1,
    element: Element | str = Element.E2M1,
    scaling: Scaling | str = Scaling.TRUNCATION_FREE,
    rounding: Rounding | str = Rounding.NEAREST,
    generator: torch.Generator | None = None,
    *,
    key: Tensor | None = None,
    ema: Tensor | None = None,
) -> MXTensor:
    """Quantize `x` in groups of 32 along `axis` (OCP MX v1.0; paper sections 3.2 and 5).

    `x` may have any shape, strides and floating dtype; float64 is rounded to fp32 first. The last group of an axis
    may be shorter than 32. Only stochastic rounding draws random bits. It derives them from `key`, one int64 on the
    device of `x`; without a key, it draws one from `generator` or from the device's default generator. `ema`, shaped
    like `x`, is the moving average that `rounding="ema"` rounds towards. A group that holds NaN or Inf becomes NaN.

    Raises TypeError for a tensor that is not floating-point, IndexError for an axis out of range, and ValueError for an
    unknown element, scaling or rounding, or if `key` or `ema` does not fit the tensor and the rounding.
    """
    if not x.is_floating_point():
        raise TypeError(f"quantize_mx needs a floating-point tensor, got {x.dtype}; convert it with .float()")
    element, scaling, rounding = Element(element), Scaling(scaling), Rounding(rounding)
    if (rounding is Rounding.EMA) != (ema is not None):
        given = "no ema" if ema is None else "an ema"
        raise ValueError(f"ema must be given if and only if rounding is 'ema', got {rounding.value!r} and {given}")
    if ema is not None and ema.shape != x.shape:
        raise ValueError(f"ema must have the shape of x, {tuple(x.shape)}, got {tuple(ema.shape)}")
    if key is not None and (key.dtype != torch.int64 or key.numel() != 1 or key.device != x.device):
        raise ValueError(f"key must be one int64 on {x.device}, got {key.numel()} {key.dtype} on {key.device}")
    if rounding is Rounding.STOCHASTIC and key is None:
        key = fresh_keys(1, x.device, generator)

    shape = x.shape
    x = x.detach()
    if not shape:
        x = x.reshape(1)
        ema = None if ema is None else ema.reshape(1)
    if not -x.ndim <= axis < x.ndim:
        raise IndexError(f"axis must lie in [{-x.ndim}, {x.ndim - 1}] for a tensor of {x.ndim} axes, got {axis}")
    axis %= x.ndim
    rows_shape = x.shape[:axis] + x.shape[axis + 1 :]
    x_RL = _as_rows(x, axis)
    ema_RL = None if ema is None else _as_rows(ema.detach(), axis)
    quantizer = Quantizer(element=element, scaling=scaling, rounding=rounding)
    _, codes_RB, scales_RG, _ = backend_for(x_RL).quantize(x_RL, quantizer, key=key, ema_RL=ema_RL)
    codes = codes_RB.reshape(*rows_shape, codes_RB.shape[-1]).movedim(-1, axis)
    scales = scales_RG.reshape(*rows_shape, scales_RG.shape[-1]).movedim(-1, axis).view(torch.float8_e8m0fnu)
    return MXTensor(codes, scales, shape, axis, element)


def _as_rows(x: Tensor, axis: int) -> Tensor:
    """A matrix whose rows run along `axis`; a view where the strides allow one."""
    rows = (x.shape[:axis] + x.shape[axis + 1 :]).numel()
    return x.movedim(axis, -1).reshape(rows, x.shape[axis])
