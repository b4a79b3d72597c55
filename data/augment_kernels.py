"""Triton kernels of the batch augmentation: what PyTorch's own operations would need dozens of passes for.

Each gives what its counterpart in `augment_images.py` gives on a CPU. Sums of counts are whole numbers, so the order of
the threads changes nothing. Points and the values between pixels are computed in fp64, as Pillow does it: a value is
the integer part of a sum, and fp32 would often fall on the other side of a whole number.

Shapes: N images of 3 channels, height x width pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 1024
"""Pixels of one program."""


@triton.jit
def _count_kernel(images, counts, size, PIXELS: tl.constexpr):
    plane = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = places < size
    values = tl.load(images + plane * size + places, mask=inside, other=0).to(tl.int32)
    found = tl.histogram(values, 256)
    values = tl.arange(0, 256)
    found -= tl.where(values == 0, PIXELS - tl.sum(inside.to(tl.int32)), 0)  # places beyond the end counted as 0
    tl.atomic_add(counts + plane * 256 + values, found, mask=found > 0)


def count_values(images: Tensor) -> Tensor:
    """How often each image and channel has each value: uint8 [N, 3, height, width] -> int64 [N, 3, 256]."""
    images = images.contiguous()
    count, channels, height, width = images.shape
    counts = torch.zeros((count, channels, 256), dtype=torch.int32, device=images.device)
    grid = (count * channels, triton.cdiv(height * width, PIXELS))
    _count_kernel[grid](images, counts, height * width, PIXELS=PIXELS)
    return counts.long()


@triton.jit
def _cubic(share, first, second, third, fourth):
    bend = 2 * (first - second) + third - fourth
    return second + share * (third - first + share * (bend + share * (second - first - third + fourth)))


@triton.jit
def _pixel(plane, row, column, height, width):
    row, column = tl.minimum(tl.maximum(row, 0), height - 1), tl.minimum(tl.maximum(column, 0), width - 1)
    return tl.load(plane + row * width + column).to(tl.float64)


@triton.jit
def _cubic_row(plane, row, left, share, height, width):
    first = _pixel(plane, row, left - 1, height, width)
    second = _pixel(plane, row, left, height, width)
    third = _pixel(plane, row, left + 1, height, width)
    return _cubic(share, first, second, third, _pixel(plane, row, left + 2, height, width))


@triton.jit
def _linear_row(plane, row, left, share, height, width):
    first = _pixel(plane, row, left, height, width)
    return first + share * (_pixel(plane, row, left + 1, height, width) - first)


@triton.jit
def _warp_kernel(
    images, matrix, warped, height, width, red, green, blue, CUBIC: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    size = height * width
    column, row = (places % width).to(tl.float64) + 0.5, (places // width).to(tl.float64) + 0.5
    m = matrix + image * 6
    x = tl.load(m) * column + tl.load(m + 1) * row + tl.load(m + 2)
    y = tl.load(m + 3) * column + tl.load(m + 4) * row + tl.load(m + 5)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, above = tl.floor(x - 0.5), tl.floor(y - 0.5)
    right, down = x - 0.5 - left, y - 0.5 - above
    left, above = left.to(tl.int32), above.to(tl.int32)
    for channel in tl.static_range(3):
        plane = images + (image * 3 + channel) * size
        if CUBIC:
            first = _cubic_row(plane, above - 1, left, right, height, width)
            second = _cubic_row(plane, above, left, right, height, width)
            third = _cubic_row(plane, above + 1, left, right, height, width)
            fourth = _cubic_row(plane, above + 2, left, right, height, width)
            value = _cubic(down, first, second, third, fourth)
        else:
            first = _linear_row(plane, above, left, right, height, width)
            value = first + down * (_linear_row(plane, above + 1, left, right, height, width) - first)
        value = tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)
        beyond = red if channel == 0 else (green if channel == 1 else blue)
        out = warped + (image * 3 + channel) * size + places
        tl.store(out, tl.where(inside, value, beyond).to(tl.uint8), mask=places < size)


def warp(images: Tensor, matrix: Tensor, fill: tuple[int, ...], cubic: bool) -> Tensor:
    """uint8 [N, 3, height, width] by the points of `matrix`, fp64 [N, 6]; `fill` is red, green and blue beyond them."""
    images = images.contiguous()
    count, _, height, width = images.shape
    warped = torch.empty_like(images)
    grid = (count, triton.cdiv(height * width, PIXELS))
    _warp_kernel[grid](images, matrix, warped, height, width, *fill, CUBIC=cubic, PIXELS=PIXELS)
    return warped
