"""Batch augmentation against Pillow, timm and torchvision on the same image with the same arguments."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor
from torchvision import transforms as T

from data.augmentation import kernels
from data.augmentation.draws import Draws, Operation
from data.augmentation.images import INTERPOLATIONS, BatchAugmentation, apply, fixed_tables, matrices, normalize
from data.base import Preprocessing

FILL = (124, 116, 104)
FUNCTIONS = {
    Operation.AUTO_CONTRAST: (auto_augment.auto_contrast, [None]),
    Operation.EQUALIZE: (auto_augment.equalize, [None]),
    Operation.INVERT: (auto_augment.invert, [None]),
    Operation.POSTERIZE: (auto_augment.posterize, [1, 2, 3, 4, 7, 8]),
    Operation.SOLARIZE: (auto_augment.solarize, [0, 1, 100, 255, 256]),
    Operation.SOLARIZE_ADD: (auto_augment.solarize_add, [0, 30, 110, 128]),
    Operation.COLOR: (auto_augment.color, [0.0, 0.1, 0.55, 1.0, 1.9]),
    Operation.CONTRAST: (auto_augment.contrast, [0.0, 0.1, 0.55, 1.0, 1.9]),
    Operation.BRIGHTNESS: (auto_augment.brightness, [0.0, 0.1, 0.55, 1.0, 1.9]),
    Operation.SHARPNESS: (auto_augment.sharpness, [0.0, 0.1, 0.55, 1.0, 1.9]),
    Operation.BLUR: (auto_augment.gaussian_blur, [0.1, 0.3, 0.7, 1.0, 1.3, 1.77, 2.0]),
    Operation.SHEAR_X: (auto_augment.shear_x, [-0.3, 0.0, 0.27]),
    Operation.SHEAR_Y: (auto_augment.shear_y, [-0.3, 0.2]),
    Operation.TRANSLATE_X: (auto_augment.translate_x_abs, [-20.3, 3.0, 7.77]),
    Operation.TRANSLATE_Y: (auto_augment.translate_y_abs, [-20.3, 7.77]),
    Operation.ROTATE: (auto_augment.rotate, [-27.0, 0.0, 13.3, 30.0]),
}
"""timm's function for an operation, and arguments over the range that its policies use."""
GEOMETRIC = [operation for operation in FUNCTIONS if operation >= Operation.SHEAR_X]


@cache
def pictures() -> tuple[Image.Image, ...]:
    """A smooth image with noise and its darker half of the values, one grey level alone, and pure noise; 53 px."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (9, 8, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((53, 53), Image.Resampling.BICUBIC)) * 0.6 + random.normal(30, 8, (53, 53, 3))
    arrays = (smooth, smooth / 2, np.full((53, 53, 3), 90), random.integers(0, 256, (53, 53, 3)))
    return tuple(Image.fromarray(array.clip(0, 255).astype(np.uint8)) for array in arrays)


def to_batch(images: list[Image.Image], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).to(device)


def by_pillow(image: Image.Image, operation: Operation, argument: float | None, resample: str) -> Image.Image:
    arguments = () if argument is None else (argument,)
    how = {"fillcolor": FILL, "resample": Image.Resampling[resample.upper()]}
    return FUNCTIONS[operation][0](image, *arguments, **how)


def assert_equal(got: Tensor, wanted: list[Image.Image]) -> None:
    apart = (got.cpu().int() - to_batch(wanted, torch.device("cpu")).int()).abs()
    assert apart.max() == 0, f"{(apart > 0).float().mean():.2e} of the values differ, by up to {apart.max()}"


@pytest.mark.parametrize("operation", FUNCTIONS, ids=lambda operation: operation.name)
def test_an_operation_gives_what_pillow_gives(operation, device):
    """All arguments and images in one batch, so that each image has its own."""
    for resample in INTERPOLATIONS if operation in GEOMETRIC else ("bicubic",):
        cases = list(itertools.product(pictures(), FUNCTIONS[operation][1]))
        kinds = np.full(len(cases), operation)
        arguments = np.array([argument or 0.0 for _, argument in cases])
        got = apply(to_batch([image for image, _ in cases], device), kinds, arguments, FILL, resample)
        assert_equal(got, [by_pillow(image, operation, argument, resample) for image, argument in cases])


def test_two_operations_in_order_give_what_pillow_gives(device):
    """Every pair of operations, in both orders: the second one gets the first one's values, so they must be equal."""
    pairs = list(itertools.product(FUNCTIONS, FUNCTIONS))
    image = pictures()[0]
    batch, wanted = to_batch([image] * len(pairs), device), [image] * len(pairs)
    for layer in range(2):
        arguments = [FUNCTIONS[pair[layer]][1][-1] for pair in pairs]
        kinds = np.array([pair[layer] for pair in pairs])
        batch = apply(batch, kinds, np.array([a or 0.0 for a in arguments]), FILL, "bicubic")
        wanted = [by_pillow(w, p[layer], a, "bicubic") for w, p, a in zip(wanted, pairs, arguments)]
    assert_equal(batch, wanted)


def test_an_image_without_an_operation_stays(device):
    batch = to_batch(list(pictures()), device)
    kinds = np.array([Operation.NONE, Operation.INVERT, Operation.NONE, Operation.ROTATE])
    got = apply(batch, kinds, np.array([0.0, 0.0, 0.0, 9.0]), FILL, "bicubic")
    assert torch.equal(got[[0, 2]], batch[[0, 2]])
    assert not torch.equal(got[1], batch[1]) and not torch.equal(got[3], batch[3])


def test_no_bits_to_keep_make_the_image_black(device):
    got = apply(to_batch([pictures()[0]], device), np.array([Operation.POSTERIZE]), np.zeros(1), FILL, "bicubic")
    assert got.max() == 0


def draws(count: int, **changes: object) -> Draws:
    none = torch.zeros(count, 0)
    plain = Draws(torch.zeros(count, dtype=torch.bool), none.byte(), none.double(), torch.zeros(count, 4).long(), 7)
    return plain._replace(**changes)


def test_flip_and_normalization_are_torchvisions(device):
    images, preprocessing = list(pictures()), Preprocessing()
    flipped = torch.tensor([True, False, True, False])
    got = BatchAugmentation(preprocessing)(to_batch(images, device), draws(4, flip=flipped))
    finish = T.Compose([T.ToTensor(), T.Normalize(preprocessing.mean, preprocessing.std)])
    turned = [im.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if f else im for im, f in zip(images, flipped)]
    wanted = torch.stack([finish(image) for image in turned])
    assert torch.equal(got.cpu(), wanted)


def test_noise_replaces_the_rectangle_and_nothing_else(device):
    batch, augmentation = to_batch([pictures()[3]] * 3, device), BatchAugmentation(Preprocessing())
    rectangles = torch.tensor([[5, 9, 20, 30], [0, 0, 0, 0], [40, 0, 13, 53]])
    plain, chosen = augmentation(batch, draws(3)), draws(3, erased=rectangles)
    got = augmentation(batch, chosen)
    inside = torch.zeros(3, 53, 53, dtype=torch.bool)
    inside[0, 5:25, 9:39] = inside[2, 40:53] = True
    differs = (got != plain).all(1).cpu()
    assert torch.equal(differs, inside) and torch.equal((got != plain).any(1).cpu(), inside)
    noise = got[0, :, 5:25, 9:39]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert torch.equal(augmentation(batch, chosen), got)
    assert not torch.equal(augmentation(batch, chosen._replace(seed=8)), got)


def test_kernels_give_what_the_functions_give_on_a_cpu(device):
    """Every operation in one batch. Without a GPU the kernels run in Triton's interpreter."""
    cases = [(kind, FUNCTIONS[kind][1][-1] or 0.0) for kind in FUNCTIONS if kind != Operation.BLUR]
    cases += [(Operation.NONE, 0.0), (Operation.ROTATE, -190.0)]
    images = to_batch([pictures()[0].crop((0, 0, 33, 33))] * len(cases), torch.device("cpu"))
    kinds, arguments = np.array([kind for kind, _ in cases]), np.array([argument for _, argument in cases])
    for name, first in (("bicubic", 0), ("bilinear", len(cases) - 1)):
        own = images[first:], kinds[first:], arguments[first:]
        how = (fixed_tables(*own[1:]), matrices(*own[1:], 33, 33), FILL)
        got = kernels.apply(own[0].to(device), *own[1:], *how, cubic=name == "bicubic").cpu()
        assert torch.equal(got, apply(*own, FILL, name))
    preprocessing = Preprocessing()
    mean, std = (torch.tensor(v, device=device) for v in (preprocessing.mean, preprocessing.std))
    got = kernels.normalize(images[:2].to(device), mean, std).cpu()
    assert torch.equal(got, normalize(images[:2], preprocessing))


def test_an_unknown_interpolation_is_refused():
    with pytest.raises(ValueError, match="interpolation must be one of bilinear, bicubic, got lanczos"):
        apply(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), np.zeros(1), np.zeros(1), FILL, "lanczos")
