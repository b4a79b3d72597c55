"""Augmentation of a batch on its device: flip, timm's operations with Pillow's results, normalization, erasing.

An operation is applied to all images of the batch that drew it at once, with an argument for each image. Values are
those that Pillow gives, in its own arithmetic (libImaging's Geometry.c, Blend.c, BoxBlur.c, Filter.c and Convert.c, and
ImageOps.py). On a GPU the kernels of `kernels.py` do the same in few launches.

Shapes: B images of 3 channels and S x S pixels, of which N drew an operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.augmentation.draws import Draws, Operation
from data.base import Preprocessing

INTERPOLATIONS = ("bilinear", "bicubic")
TABLES = (Operation.INVERT, Operation.POSTERIZE, Operation.SOLARIZE, Operation.SOLARIZE_ADD, Operation.BRIGHTNESS)
"""Operations that replace each value by an entry of a table that does not depend on the image."""
GEOMETRIC = (*(Operation.SHEAR_X, Operation.SHEAR_Y, Operation.TRANSLATE_X, Operation.TRANSLATE_Y, Operation.ROTATE),)


@dataclass(frozen=True)
class BatchAugmentation:
    """Turns a batch of cropped images and its draws into the model's input."""

    preprocessing: Preprocessing

    @property
    def fill(self) -> tuple[int, ...]:
        """The colour beyond the borders of an image: the mean, as timm has it."""
        return tuple(min(255, round(255 * value)) for value in self.preprocessing.mean)

    def __call__(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """uint8 [B, 3, S, S] -> fp32 [B, 3, S, S]. Without draws, images are only normalized."""
        if draws is None:
            return normalize(images, self.preprocessing)
        if draws.flip.any():
            images = flip(images, draws.flip)
        kinds, arguments = draws.operations.numpy(), draws.arguments.numpy()
        for layer in range(kinds.shape[1]):
            images = apply(images, kinds[:, layer], arguments[:, layer], self.fill, self.preprocessing.interpolation)
        return erase(normalize(images, self.preprocessing), draws)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """The images, those with `mirrored` [B] from right to left."""
    mirrored = mirrored.to(images.device, non_blocking=True)
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 [B, 3, S, S] -> fp32, by the arithmetic of torchvision's ToTensor and Normalize."""
    mean, std = (_on(images, np.float32(v)).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    if images.is_cuda:
        from data.augmentation import kernels  # Triton is imported where there is a GPU alone

        return kernels.normalize(images, mean, std)
    return images.float().div_(255).sub_(mean).div_(std)


def erase(images: Tensor, draws: Draws) -> Tensor:
    """Replace each image's rectangle by normal noise, in place. The noise follows from the seed of `draws`."""
    chosen = np.flatnonzero(draws.erased[:, 2].numpy())
    if not len(chosen):
        return images
    generator = torch.Generator(images.device).manual_seed(draws.seed)
    noise = torch.randn((len(chosen), *images.shape[1:]), generator=generator, device=images.device)
    top, left, height, width = _on(images, draws.erased[chosen].numpy()).T[:, :, None]
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
    down, right = (rows >= top) & (rows < top + height), (columns >= left) & (columns < left + width)
    inside = (down[:, :, None] & right[:, None, :])[:, None]
    where = _on(images, chosen)
    return images.index_copy_(0, where, torch.where(inside, noise, images[where]))


def apply(
    images: Tensor, kinds: np.ndarray, arguments: np.ndarray, fill: tuple[int, ...], interpolation: str
) -> Tensor:
    """One layer: each image of uint8 [B, 3, S, S] goes through its own operation, with its own argument.

    Raises ValueError for an interpolation other than `INTERPOLATIONS`.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation}")
    if images.is_cuda:
        return _apply_by_kernels(images, kinds, arguments, fill, interpolation)

    def warp_all(images: Tensor, kinds: np.ndarray, arguments: np.ndarray) -> Tensor:
        return warp(images, matrices(kinds, arguments, *images.shape[:1:-1]), fill, interpolation)

    groups: list[tuple[tuple[Operation, ...], Callable[[Tensor, np.ndarray, np.ndarray], Tensor]]] = [
        (TABLES, lambda x, k, a: look_up(x, _on(x, fixed_tables(k, a)).unsqueeze(1).expand(-1, 3, -1))),
        ((Operation.AUTO_CONTRAST,), lambda x, k, a: look_up(x, auto_contrast_tables(histograms(x)))),
        ((Operation.EQUALIZE,), lambda x, k, a: look_up(x, equalize_tables(histograms(x)))),
        ((Operation.CONTRAST,), lambda x, k, a: contrast(x, a)),
        ((Operation.COLOR,), lambda x, k, a: blend(grey(x), x.int(), a)),
        ((Operation.SHARPNESS,), lambda x, k, a: blend(smooth(x), x.int(), a)),
        ((Operation.BLUR,), lambda x, k, a: gaussian_blur(x, a)),
        (GEOMETRIC, warp_all),
    ]
    changed = []
    for operations, function in groups:
        chosen = np.flatnonzero(np.isin(kinds, operations))
        if len(chosen):
            where = _on(images, chosen)
            changed.append((where, function(images[where], kinds[chosen], arguments[chosen])))
    if changed:
        images = images.clone()
    for where, result in changed:
        images.index_copy_(0, where, result)
    return images


def _apply_by_kernels(
    images: Tensor, kinds: np.ndarray, arguments: np.ndarray, fill: tuple[int, ...], interpolation: str
) -> Tensor:
    """The same on a GPU. Only the blur, which is in few policies, has no kernel."""
    from data.augmentation import kernels

    how = (fixed_tables(kinds, arguments), matrices(kinds, arguments, *images.shape[:1:-1]), fill)
    changed = kernels.apply(images, kinds, arguments, *how, cubic=interpolation == "bicubic")
    blurred = np.flatnonzero(kinds == Operation.BLUR)
    if len(blurred):
        where = _on(images, blurred)
        changed.index_copy_(0, where, gaussian_blur(images[where], arguments[blurred]))
    return changed


def _on(images: Tensor, values: np.ndarray) -> Tensor:
    """The values on the device of `images`."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(images.device, non_blocking=True)


def fixed_tables(kinds: np.ndarray, arguments: np.ndarray) -> np.ndarray:
    """The tables of operations that do not look at the image: uint8 [N, 256] for the arguments [N].

    Other operations have the table that changes nothing.
    """
    values = np.arange(256)
    tables = np.tile(values.astype(np.uint8), (len(kinds), 1))
    for i in np.flatnonzero(np.isin(kinds, TABLES)):
        kind, argument = kinds[i], arguments[i]
        if kind == Operation.INVERT:
            tables[i] = 255 - values
        elif kind == Operation.POSTERIZE:  # no bits at all make the image black
            tables[i] = values & (256 - (1 << (8 - int(min(argument, 8)))))
        elif kind == Operation.SOLARIZE:
            tables[i] = np.where(values < argument, values, 255 - values)
        elif kind == Operation.SOLARIZE_ADD:
            tables[i] = np.where(values < 128, np.minimum(values + int(argument), 255), values)
        else:  # brightness blends with black
            tables[i] = (np.float32(argument) * values.astype(np.float32)).clip(0, 255).astype(np.uint8)
    return tables


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each value of uint8 [N, 3, S, S] by its entry in the table of its image and channel, [N, 3, 256]."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def histograms(images: Tensor) -> Tensor:
    """How often each image and channel has each value: int64 [N, 3, 256]."""
    count, channels = images.shape[:2]
    place = torch.arange(count * channels).view(count, channels, 1) * 256
    counts = torch.bincount((images.flatten(2).long() + place).flatten(), minlength=count * channels * 256)
    return counts.view(count, channels, 256)


def auto_contrast_tables(counts: Tensor) -> Tensor:
    """Tables that stretch the values between the smallest and the largest one of [N, 3, 256] to 0..255."""
    values = torch.arange(256, device=counts.device, dtype=torch.float64)
    present = counts > 0
    low = torch.where(present, values, 256).amin(2, keepdim=True)
    high = torch.where(present, values, -1).amax(2, keepdim=True)
    width = (high - low).clamp(min=1)
    scale = torch.full_like(width, 255) / width  # a number over a tensor would be its reciprocal times the number
    stretched = (values * scale + -low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def equalize_tables(counts: Tensor) -> Tensor:
    """Tables by which all values become equally frequent, from the counts [N, 3, 256]."""
    values = torch.arange(256, device=counts.device)
    last = torch.where(counts > 0, values, -1).amax(2, keepdim=True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)) // 255
    before = counts.cumsum(2) - counts + step // 2
    return torch.where(step > 0, before // step.clamp(min=1), values).clamp(max=255).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """The brightness of each pixel by Pillow's weights (ITU-R 601-2 in 16 bits): int32 [N, 1, S, S]."""
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).unsqueeze(1)


def blend(first: Tensor, second: Tensor, factors: np.ndarray) -> Tensor:
    """first + factor * (second - first), cut off to 0..255: uint8, from whole numbers and the factors [N]."""
    factors = _on(second, factors.astype(np.float32)).view(-1, 1, 1, 1)
    return (factors * (second - first)).add_(first).clamp_(0, 255).to(torch.uint8)


def contrast(images: Tensor, factors: np.ndarray) -> Tensor:
    """Blend each image with its mean brightness, rounded to a whole number."""
    brightness = grey(images).flatten(1)
    mean = (2 * brightness.sum(1, dtype=torch.int64) + brightness.shape[1]) // (2 * brightness.shape[1])
    return blend(mean.int().view(-1, 1, 1, 1), images.int(), factors)


def smooth(images: Tensor) -> Tensor:
    """The mean of 3 x 3 pixels in which the middle one counts five times; the border stays. int32 [N, 3, S, S]."""
    values = images.int()
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values[:, :, 1:-1, 1:-1]
    values[:, :, 1:-1, 1:-1] = (2 * sums + 13) // 26  # rounded; no sum lies halfway
    return values


def gaussian_blur(images: Tensor, radii: np.ndarray) -> Tensor:
    """Pillow's blur by the standard deviations `radii` [N]: three passes of a box with fractional width each way.

    The width is that of Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering".
    """
    weights = [_box_weights(float(radius)) for radius in radii]
    most = max(len(w) for w in weights) // 2
    padded = [np.pad(w, most - len(w) // 2) for w in weights]
    taps = _on(images, np.stack(padded).astype(np.float64)).view(len(radii), 1, 1, 1, -1)
    values = images.double()
    for _ in range(2):
        for _ in range(3):
            windows = F.pad(values, (most, most, 0, 0), mode="replicate").unfold(3, 2 * most + 1, 1)
            values = (((windows * taps).sum(-1) + 2**23) / 2**24).floor()  # whole numbers below 2^53
        values = values.transpose(2, 3)
    return values.to(torch.uint8)


def _box_weights(radius: float) -> np.ndarray:
    """The box whose three passes have the standard deviation `radius`, in units of 2^-24."""
    variance = np.float32(radius) * np.float32(radius) / np.float32(3)
    length = math.sqrt(12.0 * variance + 1.0)
    whole = math.floor((length - 1.0) / 2.0)
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    share /= 6 * (variance - (whole + 1) * (whole + 1))
    width = float(np.float32(whole + share))
    inside = int(np.float32(1 << 24) / np.float32(width * 2 + 1))
    outside = ((1 << 24) - (int(width) * 2 + 1) * inside) // 2
    return np.array([outside, *[inside] * (2 * int(width) + 1), outside])


def matrices(kinds: np.ndarray, arguments: np.ndarray, width: int, height: int) -> np.ndarray:
    """For each geometric operation, where a pixel comes from: fp64 [N, 6], x = a X + b Y + c and y = d X + e Y + f.

    Other operations have the matrix that changes nothing.
    """
    found = np.tile(np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]), (len(kinds), 1))
    places = {Operation.SHEAR_X: 1, Operation.TRANSLATE_X: 2, Operation.SHEAR_Y: 3, Operation.TRANSLATE_Y: 5}
    for i in np.flatnonzero(np.isin(kinds, GEOMETRIC)):
        matrix, kind, argument = found[i], kinds[i], arguments[i]
        if kind != Operation.ROTATE:
            matrix[places[kind]] = argument
            continue
        angle = -math.radians(argument % 360.0)
        cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2.0, height / 2.0
        matrix[:] = (cosine, sine, cosine * -x + sine * -y + x, -sine, cosine, -sine * -x + cosine * -y + y)
    return found


def warp(images: Tensor, matrix: np.ndarray, fill: tuple[int, ...], interpolation: str) -> Tensor:
    """Each pixel of uint8 [N, 3, S, S] from where its image's row of `matrix` [N, 6] says; `fill` beyond the borders.

    Bicubic interpolation is Pillow's, whose slope is -1 (Geometry.c).
    """
    count, _, height, width = images.shape
    a, b, c, d, e, f = _on(images, matrix).view(count, 6, 1, 1).unbind(1)
    rows, columns = torch.arange(height).double().view(1, -1, 1) + 0.5, torch.arange(width).double() + 0.5
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    left, above = (x - 0.5).floor(), (y - 0.5).floor()
    right, down = x - 0.5 - left, y - 0.5 - above
    taps = (-1, 0, 1, 2) if interpolation == "bicubic" else (0, 1)
    between = _cubic if interpolation == "bicubic" else _linear
    flat = images.flatten(2)

    def value(i: int, j: int) -> Tensor:
        place = (above + i).clamp(0, height - 1).long() * width + (left + j).clamp(0, width - 1).long()
        return flat.gather(2, place.view(count, 1, -1).expand(-1, 3, -1)).view_as(images).double()

    right, down = right.unsqueeze(1), down.unsqueeze(1)
    values = between(down, *(between(right, *(value(i, j) for j in taps)) for i in taps))
    beyond = torch.tensor(fill, dtype=torch.uint8).view(1, 3, 1, 1)
    return torch.where(outside.unsqueeze(1), beyond, values.clamp(0, 255).to(torch.uint8))


def _linear(share: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return first + share * (second - first)


def _cubic(share: Tensor, first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> Tensor:
    """The value that lies `share` of the way from the second to the third one."""
    slope, bend = third - first, 2 * (first - second) + third - fourth
    return second + share * (slope + share * (bend + share * (second - first - third + fourth)))
