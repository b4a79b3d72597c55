"""The random parameters of a batch's augmentation, drawn on the host: crops, flips, operations, erased rectangles.

They follow from the global generators of NumPy and Python, which `epoch_order.drawing_from` sets from the seed, the
epoch and the batch's position. The parameters of an image depend neither on the sizes of the images before it nor on
whether these could be read. timm's own policy object draws the operations and their magnitudes: only the functions
that would change the image are replaced by ones that note what was asked for.

Shapes: B images, L layers of operations, A attempts to draw a rectangle.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms as T

ATTEMPTS = 10
"""Attempts to draw a rectangle that fits into the image, of torchvision's crop and of timm's erasing alike."""


class Operation(IntEnum):
    """An operation on an image, with the meaning of its argument."""

    NONE = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4
    """Bits to keep."""
    SOLARIZE = 5
    """Values from this one on are inverted."""
    SOLARIZE_ADD = 6
    """Added to values below 128."""
    COLOR = 7
    """Factor of Pillow's enhancement, like the next three; 1 changes nothing."""
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    BLUR = 11
    """Standard deviation of the Gaussian in pixels."""
    SHEAR_X = 12
    """Pixels to the right for each pixel down."""
    SHEAR_Y = 13
    TRANSLATE_X = 14
    """Pixels to the left."""
    TRANSLATE_Y = 15
    ROTATE = 16
    """Degrees, counter-clockwise."""


class Draws(NamedTuple):
    """The parameters of a batch, in host memory."""

    flip: Tensor
    """bool [B], true for an image that is mirrored."""
    operations: Tensor
    """An `Operation` for each image and layer: uint8 [B, L]."""
    arguments: Tensor
    """The operations' arguments: fp64 [B, L]."""
    erased: Tensor
    """Top, left, height and width of the rectangle that noise replaces, int64 [B, 4]; the height is 0 for none."""
    seed: int
    """The noise follows from it."""


Recorded = list[tuple[Operation, float]]


class UnknownAugmentation(ValueError):
    """A step of timm's transform that has no counterpart for batches."""


_KINDS: dict[Callable, Operation] = {
    auto_augment.auto_contrast: Operation.AUTO_CONTRAST,
    auto_augment.equalize: Operation.EQUALIZE,
    auto_augment.invert: Operation.INVERT,
    auto_augment.posterize: Operation.POSTERIZE,
    auto_augment.solarize: Operation.SOLARIZE,
    auto_augment.solarize_add: Operation.SOLARIZE_ADD,
    auto_augment.color: Operation.COLOR,
    auto_augment.contrast: Operation.CONTRAST,
    auto_augment.brightness: Operation.BRIGHTNESS,
    auto_augment.sharpness: Operation.SHARPNESS,
    auto_augment.gaussian_blur: Operation.BLUR,
    auto_augment.gaussian_blur_rand: Operation.BLUR,
    auto_augment.desaturate: Operation.COLOR,
    auto_augment.shear_x: Operation.SHEAR_X,
    auto_augment.shear_y: Operation.SHEAR_Y,
    auto_augment.translate_x_abs: Operation.TRANSLATE_X,
    auto_augment.translate_x_rel: Operation.TRANSLATE_X,
    auto_augment.translate_y_abs: Operation.TRANSLATE_Y,
    auto_augment.translate_y_rel: Operation.TRANSLATE_Y,
    auto_augment.rotate: Operation.ROTATE,
}


def _recorder(function: Callable, size: int) -> Callable[..., Recorded]:
    """A function with the arguments of timm's `function` that adds its operation to a list of operations."""
    kind = _KINDS[function]

    def record(recorded: Recorded, argument: float = 0.0, **unused: object) -> Recorded:
        if function in (auto_augment.translate_x_rel, auto_augment.translate_y_rel):
            argument = argument * size
        elif function is auto_augment.desaturate:
            argument = min(1.0, max(0.0, 1.0 - argument))
        elif function is auto_augment.gaussian_blur_rand:
            argument = random.uniform(0.1, 2.0 * argument)
        return [*recorded, (kind, argument)]

    return record


def recording(policy: auto_augment.AutoAugment | auto_augment.RandAugment, size: int) -> Callable[[Recorded], Recorded]:
    """timm's policy for images of `size` pixels a side, which draws as ever but only records its operations.

    Raises UnknownAugmentation for AugMix, which mixes images and is no sequence of operations.
    """
    if isinstance(policy, auto_augment.AugMixAugment):
        raise UnknownAugmentation("AugMix mixes several augmented copies of an image")
    policy = copy.deepcopy(policy)
    groups = policy.policy if isinstance(policy, auto_augment.AutoAugment) else [policy.ops]
    for operation in (operation for group in groups for operation in group):
        function = auto_augment.NAME_TO_OP[operation.name]
        if function not in _KINDS:
            raise UnknownAugmentation(f"{operation.name} has no counterpart for batches")
        operation.aug_fn = _recorder(function, size)
    return policy


def _record_jitter(jitter: T.ColorJitter) -> Callable[[Recorded], Recorded]:
    """torchvision's colour jitter without hue, as three operations in a drawn order. Its generator is torch's."""
    kinds = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR)

    def record(recorded: Recorded) -> Recorded:
        order, *factors = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        drawn = [(kinds[i], factors[i]) for i in order.tolist() if i < 3 and factors[i] is not None]
        return [*recorded, *drawn]

    return record


@dataclass(frozen=True)
class Drawer:
    """Draws the parameters of a batch as the steps of timm's transform for single images do."""

    size: int
    """Pixels per side of an image after its crop."""
    flip: float
    """Probability of mirroring an image."""
    steps: tuple[Callable[[Recorded], Recorded], ...] = ()
    erasing: RandomErasing | None = None

    @classmethod
    def of(cls, transform: T.Compose, size: int) -> Drawer:
        """Raises UnknownAugmentation for a step that has no counterpart here."""
        flip, steps, erasing = 0.0, [], None
        for step in transform.transforms[1:]:  # the first one crops
            if isinstance(step, T.RandomHorizontalFlip):
                flip = step.p
            elif type(step).__module__ == auto_augment.__name__:
                steps.append(recording(step, size))
            elif isinstance(step, T.ColorJitter):
                steps.append(_record_jitter(step))
            elif isinstance(step, RandomErasing):
                erasing = step
        return cls(size, flip, tuple(steps), erasing)

    def __call__(self, count: int) -> Draws:
        """The parameters of `count` images."""
        flip = np.random.random(count) < self.flip
        erased = np.zeros((count, 4), np.int64) if self.erasing is None else self._rectangles(count)
        seed = int(np.random.randint(2**62, dtype=np.int64))
        drawn = [self._operations() for _ in range(count)] if self.steps else [[]] * count
        layers = max(map(len, drawn), default=0)
        padded = np.zeros((2, count, layers))
        for i, operations in enumerate(drawn):
            if operations:
                padded[:, i, : len(operations)] = np.array(operations).T
        kinds = torch.from_numpy(padded[0].astype(np.uint8))
        return Draws(torch.from_numpy(flip), kinds, torch.from_numpy(padded[1]), torch.from_numpy(erased), seed)

    def _operations(self) -> Recorded:
        recorded: Recorded = []
        for step in self.steps:
            recorded = step(recorded)
        return recorded

    def _rectangles(self, count: int) -> np.ndarray:
        """The rectangle that timm's RandomErasing replaces, the first that fits: top, left, height, width [B, 4]."""
        erasing, size = self.erasing, self.size
        applied = np.random.random(count) <= erasing.probability
        areas, aspects, down, right = np.random.random((4, count, ATTEMPTS))
        areas = (erasing.min_area + (erasing.max_area - erasing.min_area) * areas) * size * size
        low, high = erasing.log_aspect_ratio
        aspects = np.exp(low + (high - low) * aspects)
        heights, widths = (np.rint(np.sqrt(areas * a)).astype(np.int64) for a in (aspects, 1 / aspects))
        fits = (heights < size) & (widths < size)
        rows, first = np.arange(count), fits.argmax(1)
        heights, widths, down, right = (values[rows, first] for values in (heights, widths, down, right))
        tops, lefts = (
            (share * (size - side + 1)).astype(np.int64) for share, side in ((down, heights), (right, widths))
        )
        return np.stack((tops, lefts, heights, widths), 1) * (applied & fits.any(1))[:, None]


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def crop_numbers(count: int) -> np.ndarray:
    """The numbers in [0, 1) from which `random_box` makes the crops of `count` images: fp64 [B, A, 4]."""
    return np.random.random((count, ATTEMPTS, 4))


def random_box(
    crop: RandomResizedCropAndInterpolation, numbers: Sequence[Sequence[float]], height: int, width: int
) -> Box:
    """The part of an image that torchvision's and timm's RandomResizedCrop takes, from `numbers` [A, 4]."""
    log_low, log_high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    for share, aspect, down, right in numbers:
        area = (crop.scale[0] + (crop.scale[1] - crop.scale[0]) * share) * height * width
        ratio = math.exp(log_low + (log_high - log_low) * aspect)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w)
    ratio = width / height  # none fits: the largest central part with an aspect ratio in range
    if ratio < crop.ratio[0]:
        w, h = width, round(width / crop.ratio[0])
    elif ratio > crop.ratio[1]:
        w, h = round(height * crop.ratio[1]), height
    else:
        w, h = width, height
    return Box((height - h) // 2, (width - w) // 2, h, w)
