"""Triton kernels for one layer of operations, each image its own, and for the normalization: four launches a layer.

They give what the functions of `images.py` give on a CPU. Sums of counts are whole numbers, so the order of the threads
changes nothing. Points and the values between pixels are computed in fp64, as Pillow does it: a value is the integer
part of a sum, and fp32 would often fall on the other side of a whole number. For the same reason no product and sum
are joined into one rounding (`enable_fp_fusion`).

Shapes: B images of 3 channels, height x width pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from data.augmentation.draws import Operation

PIXELS = 1024
"""Pixels of one program."""
AUTO_CONTRAST, EQUALIZE = (tl.constexpr(int(op)) for op in (Operation.AUTO_CONTRAST, Operation.EQUALIZE))
COLOR, CONTRAST = (tl.constexpr(int(op)) for op in (Operation.COLOR, Operation.CONTRAST))
SHARPNESS, SHEAR_X = (tl.constexpr(int(op)) for op in (Operation.SHARPNESS, Operation.SHEAR_X))
NONE, BLUR = (tl.constexpr(int(op)) for op in (Operation.NONE, Operation.BLUR))


@triton.jit
def _grey(red, green, blue):
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


@triton.jit
def _blend(first, second, factor):
    value = factor * (second - first).to(tl.float32) + first.to(tl.float32)
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.uint8)


@triton.jit
def _count_kernel(images, kinds, counts, sums, size, PIXELS: tl.constexpr):
    """How often each value occurs, where the operation asks for it; for contrast the sum of the brightness."""
    image = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = places < size
    kind = tl.load(kinds + image)
    first = images + image * 3 * size + places
    if (kind == AUTO_CONTRAST) | (kind == EQUALIZE):
        every = tl.arange(0, 256)
        beyond = PIXELS - tl.sum(inside.to(tl.int32))  # places beyond the end are counted as 0
        for channel in tl.static_range(3):
            values = tl.load(first + channel * size, mask=inside, other=0).to(tl.int32)
            found = tl.histogram(values, 256) - tl.where(every == 0, beyond, 0)
            tl.atomic_add(counts + (image * 3 + channel) * 256 + every, found, mask=found > 0)
    if kind == CONTRAST:
        red = tl.load(first, mask=inside, other=0).to(tl.int32)
        green = tl.load(first + size, mask=inside, other=0).to(tl.int32)
        blue = tl.load(first + 2 * size, mask=inside, other=0).to(tl.int32)
        brightness = tl.where(inside, _grey(red, green, blue), 0)
        tl.atomic_add(sums + image, tl.sum(brightness).to(tl.int64))


@triton.jit
def _table_kernel(kinds, arguments, counts, sums, fixed, tables, size):
    """The table of one image and channel; `fixed` has those that do not depend on the image."""
    image, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    values = tl.arange(0, 256)
    kind = tl.load(kinds + image)
    counted = tl.load(counts + (image * 3 + channel) * 256 + values)
    table = tl.load(fixed + image * 256 + values).to(tl.int32)
    low = tl.min(tl.where(counted > 0, values, 256))
    high = tl.max(tl.where(counted > 0, values, -1))
    if kind == AUTO_CONTRAST:
        scale = tl.full([], 255.0, tl.float64) / tl.maximum(high - low, 1).to(tl.float64)
        stretched = values.to(tl.float64) * scale + -low.to(tl.float64) * scale
        stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
        table = tl.where(high > low, stretched, values)
    if kind == EQUALIZE:
        step = (tl.sum(counted) - tl.sum(tl.where(values == high, counted, 0))) // 255
        before = tl.cumsum(counted) - counted + step // 2
        table = tl.where(step > 0, tl.minimum(before // tl.maximum(step, 1), 255), values)
    if kind == CONTRAST:
        mean = ((2 * tl.load(sums + image) + size) // (2 * size)).to(tl.int32)
        factor = tl.load(arguments + image * 7 + 6).to(tl.float32)
        table = _blend(mean + tl.zeros_like(values), values, factor).to(tl.int32)
    tl.store(tables + (image * 3 + channel) * 256 + values, table.to(tl.uint8))


@triton.jit
def _pixel(plane, row, column, height, width):
    row, column = tl.minimum(tl.maximum(row, 0), height - 1), tl.minimum(tl.maximum(column, 0), width - 1)
    return tl.load(plane + row * width + column).to(tl.int32)


@triton.jit
def _cubic(share, first, second, third, fourth):
    bend = 2 * (first - second) + third - fourth
    return second + share * (third - first + share * (bend + share * (second - first - third + fourth)))


@triton.jit
def _row(plane, row, left, share, height, width, CUBIC: tl.constexpr):
    second = _pixel(plane, row, left, height, width).to(tl.float64)
    third = _pixel(plane, row, left + 1, height, width).to(tl.float64)
    if CUBIC:
        first = _pixel(plane, row, left - 1, height, width).to(tl.float64)
        fourth = _pixel(plane, row, left + 2, height, width).to(tl.float64)
        value = _cubic(share, first, second, third, fourth)
    else:
        value = second + share * (third - second)
    return value


@triton.jit
def _warped(plane, above, left, down, right, height, width, CUBIC: tl.constexpr):
    second = _row(plane, above, left, right, height, width, CUBIC)
    third = _row(plane, above + 1, left, right, height, width, CUBIC)
    if CUBIC:
        first = _row(plane, above - 1, left, right, height, width, CUBIC)
        fourth = _row(plane, above + 2, left, right, height, width, CUBIC)
        value = _cubic(down, first, second, third, fourth)
    else:
        value = second + down * (third - second)
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.uint8)


@triton.jit
def _sharpened(plane, row, column, height, width, factor):
    middle = _pixel(plane, row, column, height, width)
    sums = 4 * middle
    for i in tl.static_range(-1, 2):
        for j in tl.static_range(-1, 2):
            sums += _pixel(plane, row + i, column + j, height, width)
    border = (row == 0) | (row == height - 1) | (column == 0) | (column == width - 1)
    return _blend(tl.where(border, middle, (2 * sums + 13) // 26), middle, factor)


@triton.jit
def _layer_kernel(
    images, changed, kinds, arguments, tables, height, width, red, green, blue, CUBIC: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    size = height * width
    inside = places < size
    row, column = places // width, places % width
    kind = tl.load(kinds + image)
    first, out = images + image * 3 * size, changed + image * 3 * size + places
    m = arguments + image * 7
    if kind >= SHEAR_X:
        across, along = column.to(tl.float64) + 0.5, row.to(tl.float64) + 0.5
        x = tl.load(m) * across + tl.load(m + 1) * along + tl.load(m + 2)
        y = tl.load(m + 3) * across + tl.load(m + 4) * along + tl.load(m + 5)
        known = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        left, above = tl.floor(x - 0.5), tl.floor(y - 0.5)
        right, down = x - 0.5 - left, y - 0.5 - above
        left, above = left.to(tl.int32), above.to(tl.int32)
        for channel in tl.static_range(3):
            value = _warped(first + channel * size, above, left, down, right, height, width, CUBIC)
            beyond = red if channel == 0 else (green if channel == 1 else blue)
            tl.store(out + channel * size, tl.where(known, value, beyond).to(tl.uint8), mask=inside)
    elif kind == COLOR:
        factor = tl.load(m + 6).to(tl.float32)
        r = tl.load(first + places, mask=inside, other=0).to(tl.int32)
        g = tl.load(first + size + places, mask=inside, other=0).to(tl.int32)
        b = tl.load(first + 2 * size + places, mask=inside, other=0).to(tl.int32)
        grey = _grey(r, g, b)
        tl.store(out, _blend(grey, r, factor), mask=inside)
        tl.store(out + size, _blend(grey, g, factor), mask=inside)
        tl.store(out + 2 * size, _blend(grey, b, factor), mask=inside)
    elif kind == SHARPNESS:
        factor = tl.load(m + 6).to(tl.float32)
        for channel in tl.static_range(3):
            value = _sharpened(first + channel * size, row, column, height, width, factor)
            tl.store(out + channel * size, value, mask=inside)
    elif (kind == NONE) | (kind == BLUR):
        for channel in tl.static_range(3):
            tl.store(out + channel * size, tl.load(first + channel * size + places, mask=inside), mask=inside)
    else:
        for channel in tl.static_range(3):
            value = tl.load(first + channel * size + places, mask=inside, other=0).to(tl.int32)
            changed_value = tl.load(tables + (image * 3 + channel) * 256 + value)
            tl.store(out + channel * size, changed_value, mask=inside)


def apply(
    images: Tensor,
    kinds: np.ndarray,
    arguments: np.ndarray,
    fixed: np.ndarray,
    matrices: np.ndarray,
    fill: tuple[int, ...],
    cubic: bool,
) -> Tensor:
    """One layer of all operations but BLUR, uint8 [B, 3, height, width].

    `fixed` are the tables that do not depend on the image, uint8 [B, 256], and `matrices` those of the geometric
    operations, fp64 [B, 6].
    """
    images = images.contiguous()
    count, _, height, width = images.shape
    device, size = images.device, height * width
    numbers = np.concatenate((matrices, arguments[:, None]), 1)
    on_device = (torch.from_numpy(a).to(device, non_blocking=True) for a in (kinds.astype(np.int32), numbers, fixed))
    kinds_B, numbers, fixed = on_device
    counts = torch.zeros(count * 3 * 256 + 2 * count, dtype=torch.int32, device=device)
    counts, sums = counts[: count * 3 * 256], counts[count * 3 * 256 :].view(torch.int64)
    tables, changed = torch.empty((count, 3, 256), dtype=torch.uint8, device=device), torch.empty_like(images)
    blocks = (count, triton.cdiv(size, PIXELS))
    exact = {"enable_fp_fusion": False}
    _count_kernel[blocks](images, kinds_B, counts, sums, size, PIXELS=PIXELS)
    _table_kernel[(count, 3)](kinds_B, numbers, counts, sums, fixed, tables, size, **exact)
    how = {"CUBIC": cubic, "PIXELS": PIXELS, **exact}
    _layer_kernel[blocks](images, changed, kinds_B, numbers, tables, height, width, *fill, **how)
    return changed


@triton.jit
def _normalize_kernel(images, normalized, mean, std, size, PIXELS: tl.constexpr):
    plane = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = places < size
    value = tl.load(images + plane * size + places, mask=inside, other=0).to(tl.float32)
    m, s = tl.load(mean + plane % 3), tl.load(std + plane % 3)
    value = tl.div_rn(tl.div_rn(value, tl.full([PIXELS], 255.0, tl.float32)) - m, s + tl.zeros([PIXELS], tl.float32))
    tl.store(normalized + plane * size + places, value, mask=inside)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images / 255 - mean) / std, each operation rounded: uint8 [B, 3, height, width] -> fp32."""
    images = images.contiguous()
    count, channels, height, width = images.shape
    normalized = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    grid = (count * channels, triton.cdiv(height * width, PIXELS))
    _normalize_kernel[grid](images, normalized, mean, std, height * width, PIXELS=PIXELS, enable_fp_fusion=False)
    return normalized
