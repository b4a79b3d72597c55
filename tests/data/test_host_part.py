"""The CPU's part of --augment-on gpu: crops, draws, bad images, and runs that resume. The rest runs on a CPU, too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from data.augmentation.draws import crop_numbers, random_box
from data.decode import Pixels
from data.epoch_order import drawing_from
from data.host_part import CentralCrop, RandomResizedCrop, ShiftedCrop, shorter_side
from data.transforms import build_host_part, build_transform
from datasets import DATA_SETS, AugmentOn, BadImages, DataConfig, build_loaders, set_epoch, take_bad_images
from main import main
from runtime.errors import UserError

CONFIG = DataConfig(
    *("FOLDER", None, False, 40, 4, 0, 1, 0, "rand-m9-mstd0.5-inc1", 0.3, 0.25, BadImages.SKIP),
    augment_on=AugmentOn.GPU,
)
SHAPES = [(48, 70), (90, 50), (64, 64), (41, 300)]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Eight JPEGs of different shapes to train on and four held-out ones, in two classes."""
    monkeypatch.chdir(tmp_path)
    for half, count in (("train", 4), ("val", 2)):
        for label in ("a", "b"):
            directory = tmp_path / "images" / half / label
            directory.mkdir(parents=True)
            for i in range(count):
                picture(*SHAPES[i], seed=i + ord(label)).save(directory / f"{i}.jpg", quality=95)
    return tmp_path / "images"


def assert_near(image: torch.Tensor, wanted: Image.Image) -> None:
    """torchvision's resize rounds its weights otherwise than Pillow's."""
    apart = (image.permute(1, 2, 0).int() - torch.from_numpy(np.array(wanted)).int()).abs()
    assert apart.max() <= 2 and (apart > 0).float().mean() < 0.05


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_are_those_of_the_transform_for_single_images(interpolation):
    how = replace(CONFIG.preprocessing, interpolation=interpolation)
    config = replace(CONFIG, preprocessing=how)
    resample = Image.Resampling[interpolation.upper()]
    crop, drawer = build_host_part(config, DATA_SETS["FOLDER"], training=True)
    assert isinstance(crop, RandomResizedCrop) and drawer.size == 40 and drawer.flip == 0.5
    with drawing_from((0,)):
        numbers = crop_numbers(len(SHAPES)).tolist()
    for shape, own in zip(SHAPES, numbers):
        top, left, height, width = random_box(crop.crop, own, *shape)
        wanted = picture(*shape).crop((left, top, left + width, top + height)).resize((40, 40), resample)
        assert_near(crop(Pixels.of(picture(*shape)), own), wanted)
    central, none = build_host_part(config, DATA_SETS["FOLDER"], training=False)
    steps = build_transform(config, DATA_SETS["FOLDER"], training=False).transforms
    assert isinstance(central, CentralCrop) and none is None
    for shape in SHAPES:
        wanted = steps[1](steps[0](picture(*shape)))
        assert_near(central(Pixels.of(picture(*shape)), ()), wanted)


def test_small_images_are_shifted():
    crop, _ = build_host_part(replace(CONFIG, name="CIFAR10", input_size=32), DATA_SETS["CIFAR10"], training=True)
    assert crop == ShiftedCrop(32, 4, "bicubic")
    image = Pixels.of(picture(32, 32))
    assert torch.equal(crop(image, (4, 4)), image.values)
    shifted = crop(image, (0, 7))
    assert torch.equal(shifted[:, 4:, :29], image.values[:, :28, 3:]) and shifted[:, :4].max() == 0
    places = crop.draw(5000)
    assert places.min() == 0 and places.max() == 8 and len(np.unique(places, axis=0)) == 81


def test_a_reduced_image_is_cropped_in_the_same_place():
    image = picture(240, 320)
    crop = build_host_part(replace(CONFIG, input_size=40), DATA_SETS["FOLDER"], training=True)[0]
    numbers = [(0.9, 0.4, 0.3, 0.6)] * 10
    whole = Pixels.of(image)
    assert crop.reduction(numbers, 240, 320) > 4
    reduced = Pixels(Pixels.of(image.reduce(4)).values, 240, 320)
    apart = (crop(reduced, numbers).int() - crop(whole, numbers).int()).abs().float()
    assert apart.mean() < 2
    assert CentralCrop(40, shorter_side(40, 0.875), "bicubic").reduction((), 240, 320) == 240 / 45


def batches(config: DataConfig, epoch: int = 0, first: int = 0) -> list:
    loaders = build_loaders(config)
    set_epoch(loaders.train, config, epoch, first)
    return list(loaders.train)


def test_batches_do_not_depend_on_the_workers_or_on_the_first_one(folder):
    config = replace(CONFIG, path=str(folder))
    wanted = batches(config)
    assert wanted[0][0].shape == (4, 3, 40, 40) and wanted[0][0].dtype == torch.float32
    for got in (batches(replace(config, num_workers=2)), batches(config)):
        assert all(torch.equal(a, b) for ours, theirs in zip(got, wanted) for a, b in zip(ours, theirs))
    (last,) = batches(config, first=1)
    assert torch.equal(last[0], wanted[1][0])
    assert not torch.equal(batches(config, epoch=1)[0][0], wanted[0][0])
    assert not torch.equal(batches(replace(config, seed=1))[0][0], wanted[0][0])


def test_an_image_does_not_depend_on_the_others(folder):
    """Another image of another shape in the same batch, or one that cannot be read, changes that one alone."""
    config = replace(CONFIG, path=str(folder), batch_size=8)
    ((before, labels),) = batches(config)
    loaders = build_loaders(config)
    set_epoch(loaders.train, config, 0)
    order = list(loaders.train.batch_sampler.sampler)
    path, label = loaders.train.dataset.dataset.dataset.samples[order[2]]
    picture(300, 41, seed=9).save(path)
    ((after, _),) = batches(config)
    same = [torch.equal(a, b) for a, b in zip(before, after)]
    assert same == [i != 2 for i in range(8)]
    Path(path).write_bytes(b"no image")
    ((after, _),) = list(loaders.train)
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [i != 2 for i in range(8)]
    assert take_bad_images(loaders.train) == (1, {path}) and take_bad_images(loaders.train)[0] == 0
    with pytest.raises(UserError, match=r"is not a readable image .* or pass --bad-images skip"):
        batches(replace(config, bad_images=BadImages.STOP))


def test_repeated_augmentation_draws_for_each_copy(folder):
    config = replace(CONFIG, path=str(folder), batch_size=8, repeats=2)
    loaders = build_loaders(config)
    set_epoch(loaders.train, config, 0)
    order = list(loaders.train.batch_sampler.sampler)
    ((images, _),) = list(loaders.train)
    pairs = [(i, j) for i in range(8) for j in range(i) if order[i] == order[j]]
    assert pairs and not any(torch.equal(images[i], images[j]) for i, j in pairs)


def test_held_out_images_are_near_those_of_the_cpu(folder):
    config = replace(CONFIG, path=str(folder))
    ours, labels = default_collate([image for batch in build_loaders(config).val for image in zip(*batch)])
    theirs = torch.cat([images for images, _ in build_loaders(replace(config, augment_on=AugmentOn.CPU)).val])
    assert labels.tolist() == [0, 0, 1, 1]
    assert (ours - theirs).abs().max() * 255 * 0.229 <= 2.01  # levels of a value


def test_a_killed_run_goes_on_with_the_same_bits(folder, interrupted_at_step):
    options = ["--data-set", "FOLDER", "--data-path", str(folder), "--batch-size", "2", "--input-size", "16"]
    options += ["--model", "deit_micro_patch4_32", "--num-workers", "0", "--repeats", "1", "--device", "cpu"]
    options += ["--epochs", "2", "--warmup-epochs", "0", "--augment-on", "gpu", "--model-ema-decay", "0"]
    assert main([*options, "--output-dir", "whole"]) == 0
    with interrupted_at_step(7):
        assert main([*options, "--output-dir", "parts", "--save-steps", "1"]) == 130
    assert main([*options, "--output-dir", "parts", "--resume", "auto"]) == 0
    logs = [
        [json.loads(line) for line in Path(name, "log.txt").read_text().splitlines()] for name in ("whole", "parts")
    ]
    assert [[{**line, "img_per_s": 0} for line in log] for log in logs][0] == [{**x, "img_per_s": 0} for x in logs[1]]
    models = [torch.load(Path(name, "checkpoint.pth"), weights_only=True)["model"] for name in ("whole", "parts")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_a_run_does_not_go_on_with_other_images(folder, capsys):
    options = ["--data-set", "FOLDER", "--data-path", str(folder), "--batch-size", "2", "--input-size", "8"]
    options += ["--model", "deit_micro_patch4_32", "--num-workers", "0", "--repeats", "1", "--device", "cpu"]
    options += ["--epochs", "1", "--warmup-epochs", "0", "--output-dir", "out"]
    assert main([*options, "--augment-on", "auto"]) == 0  # which is the CPU
    assert main([*options, "--augment-on", "gpu", "--resume", "auto"]) == 2
    assert "the same --augment-on: this run has gpu" in capsys.readouterr().err
    state = torch.load("out/checkpoint.pth", weights_only=True)
    del state["identity"]["--augment-on"]  # as in a checkpoint from before the option, whose images came from the CPU
    torch.save(state, "old.pth")
    on_cpu, on_gpu = ([*options[:-1], "other", "--augment-on", on, "--resume", "old.pth"] for on in ("cpu", "gpu"))
    assert main(on_gpu) == 2
    assert "the same --augment-on: this run has gpu" in capsys.readouterr().err
    assert main(on_cpu) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--aa", "augmix-m3"],
            "--augment-on gpu augments batches, which --data-set DIGITS with --aa augmix-m3 cannot",
        ),
        (["--aa", "nonsense"], "--aa must be none or one of timm's"),
    ],
)
def test_what_batches_cannot_have_is_refused(options, message, capsys):
    assert main(["--augment-on", "gpu", "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


def test_an_interpolation_without_a_counterpart_is_refused(folder):
    config = replace(CONFIG, path=str(folder), preprocessing=replace(CONFIG.preprocessing, interpolation="lanczos"))
    with pytest.raises(UserError, match="--augment-on gpu resizes by bilinear or bicubic .* is lanczos; pass"):
        build_loaders(config)
