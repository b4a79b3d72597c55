"""What `--augment-on gpu` leaves to the CPU: read, decode, crop and resize, and draw the parameters of the rest.

Shapes: B images of 3 channels and S x S pixels, where S is --input-size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from data.augmentation.draws import Box, Drawer, Draws, crop_numbers, random_box
from data.decode import Pixels, Reduction


@dataclass(frozen=True)
class BadImage:
    """An image of a batch whose file could not be read. The next readable image took its place in the batch."""

    path: str
    tried: tuple[str, ...]
    """Files between it and the next readable image, which could not be read either."""


class Loaded(NamedTuple):
    """An image that was read in place of `bad`, if that is not None."""

    pixels: Pixels
    label: int
    bad: BadImage | None = None


class HasPixels(Protocol):
    """A split whose images can be read without a transform."""

    def load_pixels(self, index: int, reduction: Reduction) -> Loaded: ...


class HostBatch(NamedTuple):
    """A batch as the CPU leaves it."""

    images: Tensor
    """uint8 [B, 3, S, S]."""
    labels: Tensor
    bad: tuple[BadImage, ...]
    draws: Draws | None
    """None for held-out images, which are only normalized."""


class Crop(Protocol):
    """Makes images of S x S pixels from images of any size."""

    size: int

    def draw(self, count: int) -> Sequence:
        """The numbers from which the crops of `count` images follow."""

    def reduction(self, numbers: Sequence, height: int, width: int) -> float: ...

    def __call__(self, pixels: Pixels, numbers: Sequence) -> Tensor: ...


@dataclass(frozen=True)
class RandomResizedCrop:
    """timm's crop of random size and aspect ratio."""

    crop: RandomResizedCropAndInterpolation
    size: int
    interpolation: str

    def draw(self, count: int) -> list:
        return crop_numbers(count).tolist()

    def reduction(self, numbers: Sequence, height: int, width: int) -> float:
        box = random_box(self.crop, numbers, height, width)
        return min(box.height, box.width) / self.size

    def __call__(self, pixels: Pixels, numbers: Sequence) -> Tensor:
        box = random_box(self.crop, numbers, pixels.height, pixels.width)
        part = _part(pixels, box)
        return _resize(part, [self.size, self.size], self.interpolation)


def _part(pixels: Pixels, box: Box) -> Tensor:
    """The box, which is given in pixels of the whole image, of the perhaps reduced one."""
    height, width = pixels.values.shape[1:]
    if (height, width) == (pixels.height, pixels.width):
        return pixels.values[:, box.top : box.top + box.height, box.left : box.left + box.width]
    down, right = height / pixels.height, width / pixels.width
    top, left = round(box.top * down), round(box.left * right)
    bottom, end = round((box.top + box.height) * down), round((box.left + box.width) * right)
    return pixels.values[:, top : max(bottom, top + 1), left : max(end, left + 1)]


@dataclass(frozen=True)
class ShiftedCrop:
    """The crop of small images: resized to S x S and shifted by up to `padding` pixels, with black beyond."""

    size: int
    padding: int
    interpolation: str

    def draw(self, count: int) -> np.ndarray:
        """Downward and rightward position of each window in the padded image: int64 [B, 2]."""
        return np.random.randint(2 * self.padding + 1, size=(count, 2))

    def reduction(self, numbers: Sequence, height: int, width: int) -> float:
        return min(height, width) / self.size

    def __call__(self, pixels: Pixels, numbers: Sequence) -> Tensor:
        image = _resize(pixels.values, [self.size, self.size], self.interpolation)
        top, left = numbers
        return F.pad(image, [self.padding] * 4)[:, top : top + self.size, left : left + self.size]


@dataclass(frozen=True)
class CentralCrop:
    """The crop of held-out images: the shorter side becomes `shorter` pixels; None squeezes the image to S x S."""

    size: int
    shorter: int | None
    interpolation: str

    def draw(self, count: int) -> list:
        return [()] * count

    def reduction(self, numbers: Sequence, height: int, width: int) -> float:
        return min(height, width) / (self.shorter or self.size)

    def __call__(self, pixels: Pixels, numbers: Sequence) -> Tensor:
        if self.shorter is None:
            return _resize(pixels.values, [self.size, self.size], self.interpolation)
        height, width = pixels.height, pixels.width  # a reduced image may have another aspect ratio by rounding
        long = int(self.shorter * max(height, width) / min(height, width))
        sides = [self.shorter, long] if height <= width else [long, self.shorter]
        return TF.center_crop(_resize(pixels.values, sides, self.interpolation), [self.size, self.size])


def _resize(image: Tensor, sides: list[int], interpolation: str) -> Tensor:
    """uint8 [3, height, width] -> [3, *sides], antialiased like Pillow's; up to 2 of 255 apart, in 1 value of 100."""
    if list(image.shape[1:]) == sides:
        return image
    return TF.resize(image, sides, InterpolationMode(interpolation), antialias=True)


def shorter_side(size: int, crop: float) -> int:
    """The shorter side of a held-out image whose central `size` pixels are the share `crop`."""
    return math.floor(size / crop)


class HostPart(Dataset):
    """A split whose batches are prepared for the augmentation on a GPU. Single images are as the split serves them."""

    def __init__(self, dataset: HasPixels, crop: Crop, drawer: Drawer | None) -> None:
        self.dataset, self.crop, self.drawer = dataset, crop, drawer

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> HostBatch:
        """The order of the draws is fixed, so that no image's parameters depend on what another image is like."""
        count = len(indices)
        numbers = self.crop.draw(count)
        draws = None if self.drawer is None else self.drawer(count)
        images = torch.empty(count, 3, self.crop.size, self.crop.size, dtype=torch.uint8)
        labels, bad = torch.empty(count, dtype=torch.int64), []
        for i, (index, own) in enumerate(zip(indices, numbers)):
            loaded = self.dataset.load_pixels(index, partial(self.crop.reduction, own))
            images[i] = self.crop(loaded.pixels, own)
            labels[i] = loaded.label
            bad += [] if loaded.bad is None else [loaded.bad]
        return HostBatch(images, labels, tuple(bad), draws)
