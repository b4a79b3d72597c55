"""Data sets: idx files, splits, padding, folders, transforms, samplers and their order."""

from __future__ import annotations

import gzip
import importlib
import pickle
import re
import struct
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment
from torchvision import transforms as T

import datasets
from data.base import register
from data.fractals import fractal_images
from data.in_memory import Digits, InMemory, ShiftAndFlip, read_idx
from data.transforms import RAND_AUGMENT, build_transform
from datasets import CALIBRATION_ORDER, DATA_SETS, DataConfig, build_loaders, fingerprint, set_epoch
from runtime.errors import UserError
from training.options import build_parser, parse_args

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours

DIGITS = DataConfig(
    name="DIGITS",
    path=None,
    download=False,
    input_size=8,
    batch_size=100,
    num_workers=0,
    repeats=1,
    seed=0,
    aa="none",
    color_jitter=0.0,
    reprob=0.0,
)


def normalized(pixels: np.ndarray | Image.Image) -> torch.Tensor:
    """Grey or coloured pixels as a model gets them: fp32 [3, height, width]."""
    colours = np.asarray(pixels, np.float64) / 255
    colours = colours if colours.ndim == 3 else np.stack([colours] * 3, -1)
    return torch.from_numpy((colours - MEAN) / STD).permute(2, 0, 1).float()


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bicubic, by Pillow."""
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """Fashion-MNIST's four files, of 60 and 20 random images, two of them gzipped."""
    generator = np.random.default_rng(0)
    for stem, count in (("train", 60), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_digits_split_is_fixed_stratified_and_disjoint():
    loaders = build_loaders(DIGITS)
    train, val = loaders.train.dataset.dataset, loaders.val.dataset.dataset
    assert (len(train), len(val), loaders.num_classes) == (1437, 360, 10)
    assert np.bincount(val.labels).min() >= 34
    images = np.concatenate((train.images, val.images)).reshape(1797, -1)
    from sklearn.datasets import load_digits

    everything = (load_digits().data * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, images)) == sorted(map(bytes, everything))


def test_the_fingerprint_of_digits_is_the_one_in_older_checkpoints():
    """A resumed run compares it with its checkpoint's, so another text would refuse every checkpoint there is."""
    wanted = "1437 images, sha256 dd57f179fb7f4867 + 360 images, sha256 679d8fbd7da50cb2"
    assert fingerprint(DIGITS, build_loaders(DIGITS)) == wanted


def test_data_sets_are_known_without_scikit_learn(monkeypatch):
    """Only DIGITS needs it, and only when it is opened."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("datasets", "data", "sklearn"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)  # importing it fails
    fresh = importlib.import_module("datasets")
    assert fresh is not datasets and fresh.DATA_SETS.keys() == DATA_SETS.keys()
    with pytest.raises(ModuleNotFoundError, match="sklearn"):
        fresh.build_loaders(DIGITS)


def test_every_held_out_image_is_evaluated_once():
    labels = torch.cat([labels for _, labels in build_loaders(DIGITS).val])
    assert len(labels) == 360


@pytest.mark.parametrize("half", ["train", "val"])
@pytest.mark.parametrize("size", [8, 16])
def test_digits_keep_their_labels_and_are_only_resized(half, size):
    """A mirrored or shifted digit may be another one, so neither a batch as a whole nor single images are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels_of = {(image * (255 / 16)).astype(np.uint8).tobytes(): n for image, n in zip(digits.images, digits.target)}
    loader = getattr(build_loaders(replace(DIGITS, input_size=size)), half)
    stored = loader.dataset.dataset.images
    order = list(loader.batch_sampler.sampler) if half == "train" else range(len(stored))
    images, labels = next(iter(loader))
    for image, label, index in zip(images, labels.tolist(), order):
        assert torch.allclose(image, normalized(resized(stored[index], size)), atol=1e-6)
        assert label == labels_of[stored[index].tobytes()]


def order(loader, config, epoch) -> list[int]:
    set_epoch(loader, config, epoch)
    return list(loader.batch_sampler.sampler)


def test_order_is_a_function_of_seed_and_epoch_and_calibration_has_its_own():
    loaders, again = build_loaders(DIGITS), build_loaders(DIGITS)
    first = order(loaders.train, DIGITS, 0)
    assert order(again.train, DIGITS, 0) == first and sorted(first) == list(range(1437))
    assert order(loaders.train, DIGITS, 1) != first
    assert order(loaders.train, replace(DIGITS, seed=1), 0) != first
    calibration = order(loaders.calibration, DIGITS, CALIBRATION_ORDER)
    assert calibration != first and sorted(calibration) == list(range(1437))
    assert loaders.calibration.dataset.dataset is loaders.train.dataset.dataset
    assert order(loaders.train, DIGITS, 0) == first


def test_no_seed_has_the_order_of_another_ones_epoch():
    """Neighbouring seeds and epochs, those of the calibration included."""
    loaders, orders = build_loaders(DIGITS), []
    for seed in range(3):
        config = replace(DIGITS, seed=seed)
        for loader, first in ((loaders.train, 0), (loaders.calibration, CALIBRATION_ORDER)):
            orders += [tuple(order(loader, config, first + epoch)) for epoch in range(3)]
    assert len(set(orders)) == len(orders) == 18


def test_workers_repeat_their_augmentation():
    config = replace(DIGITS, num_workers=2, reprob=0.9, batch_size=400)
    batches = []
    for _ in range(2):
        loader = build_loaders(config).train
        set_epoch(loader, config, 3)
        batches.append(next(iter(loader))[0])
    assert torch.equal(*batches)


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation_deals_every_image_so_many_times(repeats):
    loader = build_loaders(replace(DIGITS, repeats=repeats)).train
    indices = list(loader.batch_sampler.sampler)
    assert len(indices) == 1437 // 256 * 256  # as many as there are images, in whole 256s, like DeiT
    counts = np.bincount(indices)
    assert max(counts) == repeats and len(set(indices)) == -(-len(indices) // repeats)


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files(compressed, tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / ("x.gz" if compressed else "x")
    path.write_bytes(gzip.compress(idx(array)) if compressed else idx(array))
    assert np.array_equal(read_idx(path), array)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x08", b"hello world, this is text", idx(np.zeros((3, 4), np.uint8))[:-1], b"\0\0\x0d\x01\0\0\0\x01\0"],
    ids=["empty", "short", "text", "truncated", "floats"],
)
@pytest.mark.parametrize("name", ["x", "x.gz"])
def test_what_is_no_idx_file(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*fetch it again"):
        read_idx(tmp_path / name)


def test_fashion_is_padded_to_32_pixels(fashion):
    loaders = build_loaders(replace(DIGITS, name="FASHION", path=str(fashion), input_size=32, batch_size=10))
    assert loaders.train.dataset.dataset.images.shape == (60, 32, 32) and len(loaders.val.dataset) == 20
    assert (loaders.train.dataset.dataset.images[:, :2] == 0).all()
    images, labels = next(iter(loaders.train))
    assert images.shape == (10, 3, 32, 32) and labels.max() < 10


def test_held_out_images_are_not_augmented(fashion):
    """Training shifts and mirrors these images: as a batch at 32 pixels, one by one at 16; evaluation does neither."""
    config = replace(DIGITS, name="FASHION", path=str(fashion), input_size=32, batch_size=20)
    stored = read_idx(fashion / "t10k-images-idx3-ubyte.gz")
    padded = np.zeros((20, 32, 32), np.uint8)
    padded[:, 2:30, 2:30] = stored
    for size in (32, 16):
        loaders = build_loaders(replace(config, input_size=size))
        images, labels = next(iter(loaders.val))
        assert labels.tolist() == [i % 10 for i in range(20)]
        wanted = [normalized(resized(image, size)) for image in padded]
        assert torch.allclose(images, torch.stack(wanted), atol=1e-6)
        train = loaders.train.dataset.dataset
        plain = torch.stack([normalized(resized(image, size)) for image in train.images])
        torch.manual_seed(0)
        as_they_are = torch.isclose(train.__getitems__(range(60))[0], plain, atol=1e-6).all((1, 2, 3))
        assert as_they_are.sum() < 10  # of 81 shifts, mirrored or not, one is none


def test_fashion_labels_that_do_not_fit(fashion):
    (fashion / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(19, np.uint8)))
    with pytest.raises(UserError, match=r"as many labels 0..9 as images, got \(19,\) for \(20, 28, 28\)"):
        build_loaders(replace(DIGITS, name="FASHION", path=str(fashion), input_size=32, batch_size=10))


def test_cifar_as_torchvision_stores_it(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # ten random images have other checksums
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list):
        content = {"data": np.random.randint(0, 256, (10, 3072), np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setitem(CIFAR10.meta, "md5", None)
    config = replace(DIGITS, name="CIFAR10", path=str(tmp_path), input_size=32, batch_size=10)
    loaders = build_loaders(config)
    assert len(loaders.train.dataset) == 50 and next(iter(loaders.train))[0].shape == (10, 3, 32, 32)
    ((images, labels),) = loaders.val  # the last file's: all red, then green, then blue
    colours = content["data"].reshape(10, 3, 32, 32).transpose(0, 2, 3, 1)
    assert torch.allclose(images, torch.stack([normalized(image) for image in colours]), atol=1e-6)
    assert labels.tolist() == list(range(10))


def test_evaluation_crops_the_centre_of_large_images_only(tmp_path):
    from PIL import Image

    for half in ("train", "val"):
        (tmp_path / half / "a").mkdir(parents=True)
        Image.fromarray(np.zeros((300, 400, 3), np.uint8)).save(tmp_path / half / "a" / "1.png")
    large = build_loaders(replace(DIGITS, name="FOLDER", path=str(tmp_path), input_size=224, batch_size=1))
    assert [type(t).__name__ for t in large.val.dataset.dataset.transform.transforms][:2] == ["Resize", "CenterCrop"]
    assert large.val.dataset.dataset.transform.transforms[0].size == 256
    assert next(iter(large.val))[0].shape == (1, 3, 224, 224)


@pytest.mark.parametrize("size", [224, 32])
def test_held_out_images_are_resized_by_pillow_and_normalized(size, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    for half in ("train", "val"):
        (tmp_path / half / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / half / "a" / "1.png")
    loaders = build_loaders(replace(DIGITS, name="FOLDER", path=str(tmp_path), input_size=size, batch_size=1))
    wanted = resized(pixels, 256)[16:240, 16:240] if size == 224 else resized(pixels, size)
    assert torch.allclose(next(iter(loaders.val))[0][0], normalized(wanted), atol=1e-6)


def test_training_images_go_through_deits_augmentation(tmp_path):
    for half in ("train", "val"):
        (tmp_path / half / "a").mkdir(parents=True)
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / half / "a" / "1.png")
    folder = replace(DIGITS, name="FOLDER", path=str(tmp_path), input_size=224, batch_size=1, reprob=0.3)

    def steps(config: DataConfig) -> dict:
        return {type(t).__name__: t for t in build_loaders(config).train.dataset.dataset.transform.transforms}

    found = steps(replace(folder, aa=RAND_AUGMENT))
    assert found["RandomResizedCropAndInterpolation"].interpolation is T.InterpolationMode.BICUBIC
    assert tuple(found["RandomResizedCropAndInterpolation"].scale) == (0.08, 1.0)
    assert found["RandomHorizontalFlip"].p == 0.5
    assert {(op.magnitude, op.magnitude_std) for op in found["RandAugment"].ops} == {(9, 0.5)}
    assert found["Normalize"].mean.tolist() == pytest.approx(MEAN)
    assert found["Normalize"].std.tolist() == pytest.approx(STD)
    assert found["RandomErasing"].probability == 0.3 and found["RandomErasing"].per_pixel
    assert steps(replace(folder, color_jitter=0.2))["ColorJitter"].brightness == (0.8, 1.2)


@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "RGB"])
def test_a_batch_is_shifted_flipped_and_normalized_as_torchvision_does(channels):
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (64, 32, 32, *channels), dtype=np.uint8))
    torch.manual_seed(0)
    got = ShiftAndFlip(padding=4, flip=0.5)(images)
    assert got.is_contiguous()
    torch.manual_seed(0)
    down, right = torch.randint(9, (2, 64)).tolist()
    flips = torch.rand(64, 1, 1).flatten() < 0.5
    normalize = T.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    for i, image in enumerate(images):
        picture = T.functional.pad(Image.fromarray(image.numpy()).convert("RGB"), 4)
        picture = T.functional.crop(picture, down[i], right[i], 32, 32)
        picture = T.functional.hflip(picture) if flips[i] else picture
        assert torch.equal(got[i], normalize(T.functional.to_tensor(picture)))
    assert len(set(down)) == 9 and flips.any() and not flips.all()


@pytest.mark.parametrize("change", [{"aa": "rand-m9"}, {"reprob": 0.5}, {"color_jitter": 0.3}, {"input_size": 16}])
def test_whatever_else_an_image_goes_through_goes_one_by_one(change):
    loaders = build_loaders(replace(DIGITS, **change))
    assert loaders.train.dataset.dataset.batch_transform is None
    images, labels = next(iter(loaders.train))
    size = change.get("input_size", 8)
    assert images.shape == (100, 3, size, size) and labels.dtype == torch.int64


def test_fractals_are_a_data_set_of_their_own(monkeypatch):
    monkeypatch.setitem(DATA_SETS, "FRACTAL", replace(DATA_SETS["FRACTAL"], num_classes=5))
    loaders = build_loaders(replace(DIGITS, name="FRACTAL", input_size=32))
    assert (len(loaders.train.dataset), len(loaders.val.dataset), loaders.num_classes) == (300, 50, 5)
    assert next(iter(loaders.train))[0].shape == (100, 3, 32, 32)
    for loader, per_class, seed in ((loaders.train, 60, 1), (loaders.val, 10, 2)):
        images, labels = fractal_images(5, per_class, 32, seed)
        assert np.array_equal(loader.dataset.dataset.images, images)
        assert np.array_equal(loader.dataset.dataset.labels, labels)


@dataclass(frozen=True)
class Stripes(InMemory):
    """A data set as a user would add it: images of one colour per class, with a white left half."""

    name: str = "STRIPES"
    description: str = "stripes of three colours"
    num_classes: int = 3
    needs_path: bool = False
    flip: float = 0.0
    padding: int = 0
    options: dict = field(default_factory=lambda: {**datasets.SMALL_DATA, "epochs": 3})

    def open(self, config, transform, training):
        labels = np.arange(30 if training else 3) % 3
        images = np.zeros((len(labels), 8, 8, 3), np.uint8)
        images[np.arange(len(labels)), :, :, labels] = 255
        images[:, :, :4] = 255
        return self.serve(images, labels, config, transform, training)


@pytest.mark.parametrize("change", [{}, {"reprob": 1e-9}], ids=["by the batch", "one by one"])
def test_one_class_and_one_entry_add_a_data_set(change, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "STRIPES", Stripes())
    config = replace(DIGITS, name="STRIPES", batch_size=6, **change)
    loaders = build_loaders(config)
    assert loaders.num_classes == 3 and (loaders.train.dataset.dataset.batch_transform is None) == bool(change)
    batches = list(loaders.train)
    assert len(batches) == 5
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    for images, labels in batches:
        pixels = (images * std + mean).round(decimals=4)
        assert (pixels[:, :, :, :4] == 1).all()
        assert torch.equal(pixels[:, :, 0, 7], torch.nn.functional.one_hot(labels, 3).float())
    assert fingerprint(config, loaders).startswith("30 images, sha256 ")
    options = parse_args(["--data-set", "STRIPES"])
    assert (options.training.epochs, options.model.model) == (3, datasets.SMALL_DATA["model"])
    words = " ".join(build_parser().format_help().split())
    assert "STRIPES: stripes of three colours IMNET: ImageNet-1k" in words
    assert '"small data" in the defaults below means every data set but IMNET and FOLDER.' in words
    assert re.search(r"length of the run \(.*; small data: 40;.* DIGITS: 8;.* STRIPES: 3.*\)", words)
    assert words.count("; STRIPES: ") == 1  # no other option differs from small data


def test_a_data_set_of_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="a data set's name must be its own, got DIGITS, which another one has"):
        register(Digits())


@pytest.mark.parametrize("shape, labels", [((9, 8, 8), 9), ((9, 3, 8, 8), 9), ((9, 64), 9), ((9, 8, 8, 3), 8)], ids=str)
def test_arrays_that_do_not_fit_their_description(shape, labels):
    arrays = np.zeros(shape, np.uint8), np.zeros(labels, np.int64)
    with pytest.raises(
        ValueError, match=r"STRIPES must have uint8 images \[N, height, width, 3\] and labels \[N\], got"
    ):
        Stripes().serve(*arrays, DIGITS, None, training=True)


@pytest.mark.parametrize(
    "aa, name",
    [
        ("rand-m9", "Posterize"),
        ("rand-m9-mstd0.5-inc1", "PosterizeIncreasing"),
        ("original", "PosterizeOriginal"),
        ("augmix", "PosterizeIncreasing"),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_augmentation_that_keeps_no_bits_makes_black(aa, name, mode):
    """DeiT's augmentation draws 0 bits now and then, which newer releases of Pillow refuse."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).convert(mode)
    transform = build_transform(replace(DIGITS, aa=aa), Digits(), training=True)
    (augment,) = (step for step in transform.transforms if type(step).__module__ == auto_augment.__name__)
    operations = augment.ops if hasattr(augment, "ops") else [op for policy in augment.policy for op in policy]
    posterizes = [operation.aug_fn for operation in operations if operation.name == name]
    assert posterizes
    for posterize in posterizes:
        for bits in (0, 1, 4, 8):
            kept = np.asarray(posterize(image, bits, fillcolor=None))
            assert (kept == (np.asarray(image).astype(int) & (256 - 2 ** (8 - bits)))).all()


def test_timm_itself_is_left_as_it_is():
    build_transform(replace(DIGITS, aa="rand-m9"), Digits(), training=True)
    assert all(auto_augment.NAME_TO_OP[name] is auto_augment.posterize for name in ("Posterize", "PosterizeIncreasing"))
