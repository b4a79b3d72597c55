"""The distribution of what is drawn for a batch, against what timm and torchvision draw for single images."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms as T

from data.augmentation.draws import Drawer, Operation, UnknownAugmentation, crop_numbers, random_box
from data.epoch_order import drawing_from

SIZE = 224
COUNTS = [10_000, pytest.param(100_000, marks=pytest.mark.long)]
"""Images for which a distribution is drawn."""


def transform_of(aa: str | None, color_jitter: float | None = None, reprob: float = 0.0) -> T.Compose:
    how = {"interpolation": "bicubic", "re_prob": reprob, "re_mode": "pixel"}
    return create_transform(SIZE, is_training=True, auto_augment=aa, color_jitter=color_jitter, **how)


def drawn(transform: T.Compose, count: int, seed: int = 0):
    with drawing_from((seed,)):
        return Drawer.of(transform, SIZE)(count)


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "rand-m5-n3-p1-tweights", "original-mstd0.5", "v0r", "3a"])
def test_operations_and_magnitudes_are_those_of_timm(aa, monkeypatch):
    """Same generators, same order of calls: the very same operations, noted where timm calls its functions."""
    transform, noted, count = transform_of(aa), [], 300
    policy = transform.transforms[2]
    groups = policy.policy if hasattr(policy, "policy") else [policy.ops]
    for operation in (operation for group in groups for operation in group):

        def note(image, *arguments, name=operation.aug_fn.__name__, **unused):
            factor = arguments[0] if arguments else 0.0
            factor *= SIZE if name.endswith("_rel") else 1
            factor = min(1.0, max(0.0, 1 - factor)) if name == "desaturate" else factor
            factor = random.uniform(0.1, 2.0 * factor) if name == "gaussian_blur_rand" else factor
            noted[-1].append((name.removesuffix("_rel").removesuffix("_rand").removeprefix("gaussian_"), factor))
            return image

        monkeypatch.setattr(operation, "aug_fn", note)
    with drawing_from((3,)):
        for _ in range(count):
            noted.append([])
            policy(Image.new("RGB", (SIZE, SIZE)))
    fresh = Drawer.of(transform_of(aa), SIZE)
    with drawing_from((3,)):
        got = [fresh._operations() for _ in range(count)]
    names = {"desaturate": "color"}
    wanted = [[(names.get(name, name), value) for name, value in operations] for operations in noted]
    assert [[(kind.name.lower(), value) for kind, value in operations] for operations in got] == wanted
    assert any(len(operations) > 1 for operations in got) or aa == "3a"


@pytest.mark.parametrize("count", COUNTS)
def test_randaugment_over_many_draws(count):
    """Two layers, each kept with probability 1/2, over fifteen operations that are equally likely."""
    draws = drawn(transform_of("rand-m9-mstd0.5-inc1"), count)
    counts = Counter(draws.operations[draws.operations > 0].tolist())
    total = sum(counts.values())
    assert total == pytest.approx(count, abs=4 * math.sqrt(2 * count / 4))
    assert len(counts) == 15 and Operation.BLUR not in counts
    for found in counts.values():
        assert found == pytest.approx(total / 15, abs=4.5 * math.sqrt(total / 15))
    angles = draws.arguments[draws.operations == Operation.ROTATE].abs() / 3
    assert angles.mean() == pytest.approx(9, abs=0.1) and angles.max() <= 10
    assert draws.flip.float().mean() == pytest.approx(0.5, abs=0.02)


def test_jitter_is_torchvisions():
    draws = drawn(transform_of(None, color_jitter=0.3), 3000)
    kinds = draws.operations
    assert kinds.shape == (3000, 3) and set(kinds.unique().tolist()) == {7, 8, 9}
    assert len(kinds.unique(dim=0)) == 6  # every order
    assert 0.7 <= draws.arguments.min() < 0.71 and 1.29 < draws.arguments.max() <= 1.3
    assert draws.arguments.mean() == pytest.approx(1, abs=0.01)


def quantiles_agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The two-sample Kolmogorov-Smirnov distance stays below its bound for a chance of one in 10^4."""
    values = np.sort(np.concatenate((ours, theirs)))
    shares = [np.searchsorted(np.sort(sample), values, "right") / len(sample) for sample in (ours, theirs)]
    bound = math.sqrt(-math.log(0.5e-4) / 2 * (len(ours) + len(theirs)) / (len(ours) * len(theirs)))
    assert np.abs(shares[0] - shares[1]).max() < bound


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shape", [(375, 500), (90, 400)])
def test_crops_are_distributed_as_timms(shape, count):
    """The second shape is so flat that many crops do not fit."""
    crop = transform_of(None).transforms[0]
    with drawing_from((1,)):
        ours = np.array([random_box(crop, numbers, *shape) for numbers in crop_numbers(count).tolist()])
    image = Image.new("L", shape[::-1])
    with drawing_from((2,)):
        theirs = np.array([crop.get_params(image, crop.scale, crop.ratio) for _ in range(count)])
    for column in range(4):
        quantiles_agree(ours[:, column].astype(float), theirs[:, column].astype(float))
    quantiles_agree(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])
    assert (ours[:, :2] + ours[:, 2:] <= shape).all() and ours.min() >= 0


def test_crops_that_never_fit_are_central_as_timms():
    crop = transform_of(None).transforms[0]
    for height, width in ((10, 1000), (1000, 10)):
        wanted = crop.get_params(Image.new("L", (width, height)), (1.0, 1.0), crop.ratio)
        numbers = np.full((10, 4), 0.999).tolist()
        assert random_box(crop, numbers, height, width) == tuple(wanted)


def test_erased_rectangles_are_distributed_as_timms():
    transform, count = transform_of(None, reprob=0.25), 20_000
    ours = drawn(transform, count).erased.numpy()
    assert (ours[:, 2] > 0).mean() == pytest.approx(0.25, abs=0.015)
    ours = ours[ours[:, 2] > 0]
    erasing, theirs = transform.transforms[-1], []

    class Noting:
        def __setitem__(self, places, noise):
            theirs.append([places[1].start, places[2].start, noise.shape[1], noise.shape[2]])

    erasing.probability = 1.0
    with drawing_from((4,)):
        for _ in range(1000):
            erasing._erase(Noting(), 1, SIZE, SIZE, torch.float32)
    theirs = np.array(theirs)
    for column in range(4):
        quantiles_agree(ours[:, column].astype(float), theirs[:, column].astype(float))


def test_the_parameters_follow_from_the_key_alone():
    transform = transform_of("rand-m9-mstd0.5-inc1", reprob=0.25)
    first, again, other = drawn(transform, 50), drawn(transform, 50), drawn(transform, 50, seed=1)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, again))
    assert first.seed != other.seed and not torch.equal(first.flip, other.flip)


def test_augmix_has_no_counterpart():
    with pytest.raises(UnknownAugmentation, match="AugMix mixes"):
        Drawer.of(transform_of("augmix-m3"), SIZE)
