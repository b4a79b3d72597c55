"""Image files that cannot be read: which images take their place, and how they are counted and reported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ToTensor

import engine
from data.image_files import LEFT_OUT, BadImage, ImageFiles, ImageFilesLoader
from datasets import BadImages, DataConfig, build_loaders, set_epoch, take_bad_images
from engine import evaluate
from main import main
from runtime.errors import UserError
from training import setup

CONFIG = DataConfig("FOLDER", None, False, 8, 3, 0, 1, 0, "none", 0.0, 0.0, BadImages.SKIP)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Six images a half, three of each class; image i of a class is grey all over, with i in its brightness."""
    monkeypatch.chdir(tmp_path)
    for half in ("train", "val"):
        for label, brightness in (("dark", 0), ("light", 128)):
            directory = tmp_path / "images" / half / label
            directory.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((20, 20, 3), brightness + 20 * i, np.uint8)).save(directory / f"{i}.png")
    return tmp_path / "images"


def spoil(folder: Path, *names: str) -> set[str]:
    """Truncated in the middle, no image at all, and empty, in turn."""
    for i, name in enumerate(names):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes((content[: len(content) // 2], b"no image", b"")[i % 3])
    return {str(folder / name) for name in names}


@pytest.mark.parametrize("training", [True, False])
def test_the_next_readable_image_takes_the_place(training, folder):
    """Files in order: dark 0 1 2, light 0 1 2. The first file follows the last."""
    spoil(folder, "train/dark/2.png", "train/light/0.png", "train/light/2.png")
    files = ImageFiles(folder / "train", ToTensor(), BadImages.SKIP, training)
    used, brightness = [0, 1, 4, 4, 4, 0], [0, 20, 40, 128, 148, 168]
    dark_2, light_0, light_2 = (str(folder / "train" / f"{name}.png") for name in ("dark/2", "light/0", "light/2"))
    bad = {2: BadImage(dark_2, (light_0,)), 3: BadImage(light_0, ()), 5: BadImage(light_2, ())}
    labels = [LEFT_OUT if index in bad and not training else int(used[index] >= 3) for index in range(6)]
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 3, 1], [4]):
        batch = files.__getitems__(order)
        assert [round(float(image.mean() * 255)) for image in batch.images] == [brightness[used[i]] for i in order]
        assert batch.labels.tolist() == [labels[i] for i in order] and batch.labels.dtype == torch.int64
        assert batch.bad == tuple(bad[i] for i in order if i in bad)
    assert [files[index][1] for index in range(6)] == labels
    files.bad_images = BadImages.STOP
    with pytest.raises(UserError, match=r"light.0\.png is not .*; replace or remove it, or pass --bad-images skip"):
        files[3]


def test_no_readable_image_at_all(folder):
    spoil(folder, *(f"val/{label}/{i}.png" for label in ("dark", "light") for i in range(3)))
    with pytest.raises(UserError, match=r"none of its 6 files is a readable one"):
        ImageFiles(folder / "val", None, BadImages.SKIP, training=False)[1]


def test_files_that_were_tried_in_vain_are_named_too(folder):
    """One place counts as one bad image; an epoch that stops early has not tried the other two for themselves."""
    spoiled = spoil(folder, "train/dark/1.png", "train/dark/2.png", "train/light/0.png")
    files = ImageFiles(folder / "train", ToTensor(), BadImages.SKIP, training=True)
    loader = ImageFilesLoader(files, sampler=[0, 1], batch_size=2, collate_fn=lambda batch: batch)
    ((images, labels),) = loader
    assert labels.tolist() == [0, 1] and take_bad_images(loader) == (1, spoiled)


def test_an_image_takes_as_long_in_a_folder_of_any_size(folder):
    class Many(list):
        def __len__(self) -> int:
            return 2**62

    files = ImageFiles(folder / "train", ToTensor(), BadImages.SKIP, training=True)
    files.samples = Many(files.samples)
    assert files[1][1] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_count_exactly_and_give_ordinary_labels(workers, folder):
    spoiled = spoil(folder, "train/dark/1.png", "train/dark/2.png", "val/light/2.png")
    config = DataConfig(**{**vars(CONFIG), "path": str(folder), "num_workers": workers})
    loaders = build_loaders(config)
    for epoch in range(2):
        set_epoch(loaders.train, config, epoch)
        order = list(loaders.train.batch_sampler.sampler)
        assert torch.cat([labels for _, labels in loaders.train]).tolist() == [int(index > 0) for index in order]
        count, paths = take_bad_images(loaders.train)
        assert count == 2 and paths == {path for path in spoiled if "train" in path}
    assert torch.cat([labels for _, labels in loaders.val]).tolist() == [0, 0, 0, 1, 1, LEFT_OUT]
    assert take_bad_images(loaders.val) == (1, {path for path in spoiled if "val" in path})
    assert take_bad_images(loaders.val)[0] == 0 and take_bad_images(loaders.calibration)[0] == 0


def test_a_held_out_image_that_is_left_out_is_neither_right_nor_wrong(folder, device):
    """The same numbers as without the file."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)).to(device)
    config = DataConfig(**{**vars(CONFIG), "path": str(folder)})
    (spoiled,) = spoil(folder, "val/light/1.png")
    with_it = evaluate(model, build_loaders(config).val, device)
    Path(spoiled).unlink()
    assert with_it == pytest.approx(evaluate(model, build_loaders(config).val, device))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_skips_counts_and_names_each_once(workers, folder, capsys):
    spoiled = spoil(folder, "train/dark/1.png", "val/light/2.png")
    options = ["--data-set", "FOLDER", "--data-path", str(folder), "--batch-size", "2", "--input-size", "8"]
    options += ["--model", "deit_micro_patch4_32", "--num-workers", workers, "--repeats", "1", "--device", "cpu"]
    options += ["--epochs", "2", "--warmup-epochs", "0", "--output-dir", "out", "--model-ema-decay", "0.9"]
    assert main(options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"main.py: error: \S+\.png is not a readable image .* or pass --bad-images skip", error)
    assert main([*options, "--bad-images", "skip", "--resume", "auto"]) == 0
    printed = capsys.readouterr().out
    assert [line["bad_images"] for line in map(json.loads, Path("out/log.txt").read_text().splitlines())] == [2, 2]
    assert printed.count("2 images were not readable") == 2
    for path in spoiled:
        assert printed.count(f"note    {path} is not a readable image and was left out") == 1


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_that_goes_on_within_an_epoch_counts_what_was_before(workers, folder, monkeypatch):
    """Interrupted before the third of three steps, then before the second and third of the next epoch."""
    spoil(folder, "train/dark/0.png", "train/dark/1.png", "train/dark/2.png", "val/light/2.png")
    options = ["--data-set", "FOLDER", "--data-path", str(folder), "--batch-size", "2", "--input-size", "8"]
    options += ["--model", "deit_micro_patch4_32", "--num-workers", workers, "--repeats", "1", "--device", "cpu"]
    options += ["--epochs", "2", "--warmup-epochs", "0", "--bad-images", "skip"]
    command = [*options, "--output-dir", "out", "--resume", "auto", "--save-steps", "1"]
    step = engine.TrainStep.__call__
    for last in (3, 3, 2):
        calls = iter(range(1, 100))

        def interrupted(self, batch, calls=calls, last=last):
            if next(calls) == last:
                raise KeyboardInterrupt
            return step(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(engine.TrainStep, "__call__", interrupted)
            assert main(command) == 130
    assert main(command) == 0
    assert [line["bad_images"] for line in map(json.loads, Path("out/log.txt").read_text().splitlines())] == [4, 4]


def test_a_detection_does_not_count_them(folder):
    """It takes training images before the second epoch, whose line counts those of the epoch alone."""
    spoil(folder, "train/dark/1.png", "val/light/2.png")
    options = ["--data-set", "FOLDER", "--data-path", str(folder), "--batch-size", "2", "--input-size", "8"]
    options += ["--model", "deit_micro_patch4_32", "--num-workers", "0", "--repeats", "1", "--device", "cpu"]
    options += ["--epochs", "2", "--warmup-epochs", "0", "--bad-images", "skip", "--output-dir", "out"]
    assert main([*options, "--quant", "mxfp4", "--q-ramping", "--q-ramping-steps", "3"]) == 0
    assert [line["bad_images"] for line in map(json.loads, Path("out/log.txt").read_text().splitlines())] == [2, 2]


def test_steps_that_will_be_repeated_do_not_count(folder, monkeypatch):
    """A diverged run goes back ten steps, here to the beginning of an epoch, and with them over what they counted."""
    spoil(folder, "train/dark/1.png", "train/light/0.png", "train/light/2.png")
    build = setup.build_model

    def build_poisoned(*arguments):
        model = build(*arguments)
        model.head.register_forward_hook(lambda layer, _, output: output * float("inf") if layer.training else None)
        return model

    monkeypatch.setattr(setup, "build_model", build_poisoned)
    options = ["--data-set", "FOLDER", "--data-path", str(folder), "--batch-size", "1", "--input-size", "8"]
    options += ["--model", "deit_micro_patch4_32", "--num-workers", "0", "--repeats", "1", "--device", "cpu"]
    options += ["--epochs", "3", "--warmup-epochs", "0", "--output-dir", "out", "--bad-images", "skip"]
    options += ["--mixup", "0", "--cutmix", "0"]
    assert main(options) == 1
    (sums,) = torch.load("out/checkpoint.pth", weights_only=True)["sums"]
    assert sums["steps"] == sums["skipped_steps"] == sums["bad_images"] == 0
    (first,) = map(json.loads, Path("out/log.txt").read_text().splitlines())
    assert first["bad_images"] == 3 and first["skipped_steps"] == 6


@pytest.mark.parametrize("half", ["train", "val"])
def test_a_run_with_loaders_processes_ends(half, folder, start):
    """They ignore SIGTERM, so nothing may leave them for Python to end."""
    spoil(folder, f"{half}/dark/1.png")
    command = ["--data-set", "FOLDER", "--data-path", str(folder), "--device", "cpu"]
    command += ["--model", "deit_nano_patch4_32", "--input-size", "8", "--batch-size", "2", "--repeats", "1"]
    command += ["--num-workers", "2", "--epochs", "1", "--output-dir", "out"]
    result = start(Path(), "import main, sys\nsys.exit(main.main(sys.argv[1:]))", *command).result()
    assert result.returncode == 2, result.stderr
    assert re.search(r"main.py: error: \S+dark/1.png is not a readable image .*\n$", result.stderr)


def test_a_link_to_nothing_is_a_bad_image(folder, capsys):
    (folder / "train" / "dark" / "9.png").symlink_to("nowhere")
    options = ["--data-set", "FOLDER", "--data-path", str(folder), "--model", "deit_nano_patch4_32", "--device", "cpu"]
    options += ["--input-size", "8", "--batch-size", "2", "--epochs", "1", "--num-workers", "0", "--output-dir", "out"]
    options += ["--repeats", "1", "--keep-last-batch"]
    assert main(options) == 2
    assert re.search(r"error: \S+dark/9.png is not a readable image", capsys.readouterr().err)
    assert main([*options, "--output-dir", "other", "--bad-images", "skip"]) == 0
    assert "dark/9.png is not a readable image and was left out" in capsys.readouterr().out
