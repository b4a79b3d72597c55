"""Sizes that the launches of all kernels share."""

from __future__ import annotations

from torch import Tensor

from ..formats import FP8_ROW_MULTIPLE, GROUP_SIZE

_FIRST_WIDE_OFFSET = 2**31


def num_groups(length: int) -> int:
    """Groups of a row."""
    return -(-length // GROUP_SIZE)


def num_bytes(length: int) -> int:
    """Bytes of a row's codes."""
    return -(-length // 2)


def padded(length: int) -> int:
    """Length of a row of an FP8 operand, which is padded with zeros."""
    return -(-length // FP8_ROW_MULTIPLE) * FP8_ROW_MULTIPLE


def is_wide(*tensors: Tensor | None) -> bool:
    """True if an element of one of them lies 2**31 elements or more from its first, so that offsets take 64 bits.

    In 32 bits, the addresses of a gradient's kernel cost about a tenth of its time less (H100, 25,216 x 3,072).
    """
    return any(
        tensor is not None
        and tensor.numel() > 0
        and sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) >= _FIRST_WIDE_OFFSET
        for tensor in tensors
    )
