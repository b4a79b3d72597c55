"""Small data sets on the device: the images are those of the loader for the CPU, without processes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.base import Preprocessing
from data.in_memory import ArrayImages, ShiftAndFlip
from data.resident import Resident
from datasets import AugmentOn, DataConfig, build_loaders, fingerprint, set_epoch

DIGITS = DataConfig("DIGITS", None, False, 8, 72, 2, 1, 0, "none", 0.0, 0.0, augment_on=AugmentOn.GPU)


def test_held_out_images_have_the_bits_of_the_cpu(device):
    here, there = build_loaders(DIGITS, device), build_loaders(replace(DIGITS, augment_on=AugmentOn.CPU))
    for (images, labels), (wanted, wanted_labels) in zip(here.val, there.val, strict=True):
        assert images.device.type == device.type
        assert torch.equal(images.cpu(), wanted) and torch.equal(labels.cpu(), wanted_labels)
    assert fingerprint(DIGITS, here) == fingerprint(DIGITS, there) and here.num_classes == 10
    assert here.train.loader.num_workers == here.val.loader.num_workers == 0


def test_training_images_come_in_the_order_of_the_cpu(device):
    """Digits are neither shifted nor mirrored, so that the images are the same ones."""
    here, there = build_loaders(DIGITS, device), build_loaders(replace(DIGITS, num_workers=0, augment_on=AugmentOn.CPU))
    for loaders in (here, there):
        set_epoch(loaders.train, DIGITS, 3, first=15)
    for (images, labels), (wanted, wanted_labels) in zip(here.train, there.train, strict=True):
        assert torch.equal(images.cpu(), wanted) and torch.equal(labels.cpu(), wanted_labels)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_images_are_shifted_as_on_the_cpu(channels, device, monkeypatch):
    """Every shift of one image, against ShiftAndFlip with the same shift."""
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6, *channels), dtype=np.uint8)
    split = Resident(ArrayImages(images, np.arange(5), None, None), device, padding=2, drawer=None)
    places = torch.tensor([(i % 5, down, right) for i, (down, right) in enumerate(np.ndindex(5, 5))])
    taken = split.take(places.to(device)).cpu()
    assert taken.shape == (25, 3, 6, 6) and taken.dtype == torch.uint8
    monkeypatch.setattr(torch, "randint", lambda high, shape: places[:, 1:].T)
    unchanged = Preprocessing((0.0,) * 3, (1.0,) * 3)
    wanted = ShiftAndFlip(2, 0.0, unchanged)(torch.from_numpy(images)[places[:, 0]])
    assert torch.equal(taken.float() / 255, wanted.expand(-1, 3, -1, -1))


def test_shifts_follow_from_the_key_and_cover_all_places(device):
    images = np.zeros((3, 6, 6), np.uint8)
    split = Resident(ArrayImages(images, np.arange(3), None, None), device, padding=1, drawer=None)
    np.random.seed(0)
    batch = split.__getitems__([0, 1, 2] * 200)
    np.random.seed(0)
    assert torch.equal(batch.images, split.__getitems__([0, 1, 2] * 200).images)
    assert len(batch.images[:, 1:].unique(dim=0)) == 9 and batch.labels.tolist() == [0, 1, 2] * 200


@pytest.mark.parametrize("size", [8, 16, 40])
def test_a_set_is_augmented_at_any_size(size, device):
    """At another size than the images', the loader's processes resize; beyond 32 pixels they crop at random."""
    config = replace(DIGITS, input_size=size, num_workers=0, aa="rand-m9-mstd0.5-inc1", reprob=0.5)
    loaders = build_loaders(config, device)
    set_epoch(loaders.train, config, 0)
    first, again = next(iter(loaders.train))[0], next(iter(loaders.train))[0]
    assert first.shape == (72, 3, size, size) and torch.equal(first, again) and first.isfinite().all()
    assert isinstance(loaders.train.dataset.dataset, Resident) == (size == 8)
