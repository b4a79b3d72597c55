"""Image files that cannot be read: which images take their place, and how they are counted and reported."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import ToTensor

import engine
import timm
from data.image_files import LEFT_OUT, BadImage, ImageFiles, ImageFilesLoader, read_image
from datasets import BadImages, DataConfig, Preprocessing, build_loaders, set_epoch, take_bad_images
from engine import evaluate
from main import main
from runtime import processes
from runtime.errors import UserError
from training import setup
from training.options import parse_args
from training.setup import preprocessing

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

    def build_poisoned(*arguments, **options):
        model = build(*arguments, **options)
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


WHITE = {
    "L": np.full((4, 4), 255, np.uint8),
    "RGB": np.full((4, 4, 3), 255, np.uint8),
    "16-bit PNG": np.full((4, 4), 65535, np.uint16),
    "16-bit TIFF": np.full((4, 4), 65535, np.uint16),
    "16-bit PGM": np.full((4, 4), 65535, np.uint16),
}
SUFFIXES = {"16-bit TIFF": "tiff", "16-bit PGM": "pgm"}


@pytest.mark.parametrize("kind", WHITE)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_brightness_does_not_depend_on_the_depth(kind, share, tmp_path):
    pixels = (WHITE[kind] * share).astype(WHITE[kind].dtype)
    path = tmp_path / f"image.{SUFFIXES.get(kind, 'png')}"
    if kind == "16-bit PGM":
        path.write_bytes(b"P5 4 4 65535\n" + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(path)
    image = read_image(str(path))
    assert image.mode == "RGB" and abs(np.asarray(image).astype(float) / 255 - share).max() < 1 / 255


@pytest.mark.parametrize(
    ("bits", "pixels", "white_is_zero", "wanted"),
    [
        (12, bytes([0x40, 0x04, 0x00]), False, 64),
        (16, bytes([0x00, 0x40, 0x00, 0x40]), False, 64),
        (16, bytes([0x00, 0x40, 0x00, 0x40]), True, 255 - 64),
    ],
)
def test_a_tiff_says_which_value_is_white(bits, pixels, white_is_zero, wanted, tmp_path):
    """Two pixels of a quarter of the largest value; those of 12 bits lie in three bytes."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    head = b"II" + struct.pack("<HI", 42, 8 + len(pixels))
    path = tmp_path / "image.tiff"
    path.write_bytes(head + pixels + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert (np.asarray(read_image(str(path))) == wanted).all()


@pytest.mark.parametrize(("dtype", "what"), [(np.int32, "32-bit integers"), (np.float32, "floating-point numbers")])
def test_an_unknown_white_is_refused_by_name(dtype, what, folder):
    Image.fromarray(np.ones((4, 4), dtype)).save(folder / "val" / "dark" / "1.tiff")
    files = ImageFiles(folder / "val", ToTensor(), BadImages.STOP, training=False)
    with pytest.raises(UserError, match=rf"dark.1.tiff is not a readable image \(its pixels are {what}, whose white"):
        files[2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_image_stands_upright_if_the_option_asks_for_it(orientation, tmp_path):
    """EXIF says where the picture's first row and column are stored; the test stores the picture so by hand."""
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "image.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "image.png"), upright=True))[..., 0], upright)
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "image.png")))[..., 0], stored)


def test_hidden_folders_and_files_are_passed_over_others_are_told(folder, capsys):
    """Links that lead back, one of them to the images of all classes, and a link to another folder, which counts."""
    for half in ("train", "val"):
        (folder / half / ".ipynb_checkpoints").mkdir()
        (folder / half / ".ipynb_checkpoints" / "0.png").write_bytes(b"")
        (folder / half / "dark" / "._0.png").write_bytes(b"")
        (folder / half / "dark" / "notes.txt").write_text("no image")
        (folder / half / "dark" / "back").symlink_to(folder / half / "dark")
        (folder / half / "light" / "up").symlink_to(folder)
        (folder / half / "light" / "more").symlink_to(folder / half / "dark" / "sub")
        (folder / half / "dark" / "sub").mkdir()
        (folder / half / "dark" / "sub" / "3.PNG").write_bytes((folder / half / "dark" / "0.png").read_bytes())
    loaders = build_loaders(replace(CONFIG, path=str(folder)))
    found = [Path(path).relative_to(folder / "train") for path, _ in loaders.train.dataset.dataset.samples]
    wanted = ["dark/0.png", "dark/1.png", "dark/2.png", "dark/sub/3.PNG"]
    wanted += ["light/0.png", "light/1.png", "light/2.png", "light/more/3.PNG"]
    assert [str(path) for path in found] == wanted and loaders.classes == ("dark", "light")
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in told] == [["note", "3", "files", "or"]] * 2 and str(folder) in told[0]


def test_a_name_that_is_not_utf8_is_printed_with_an_escape(folder, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdout", stream)
    processes.say("note    caf\udce9.jpg")
    stream.flush()
    assert stream.buffer.getvalue() == b"note    caf\\udce9.jpg\n"


RUN = [
    "--data-set",
    "FOLDER",
    "--input-size",
    "8",
    "--num-workers",
    "0",
    "--repeats",
    "1",
    "--device",
    "cpu",
    "--aa",
    "none",
]
RUN += ["--mixup", "0", "--cutmix", "0", "--batch-size", "2", "--epochs", "1", "--model-ema-decay", "0.5"]
MICRO = ["--model", "deit_micro_patch4_32"]


def numbers(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_evaluation_takes_its_options_from_the_checkpoint(folder, capsys):
    """It needs no training images, no batch that fits and no option but the file and the directory."""
    run = [*RUN, *MICRO, "--quant", "mxfp4", "--q-ema", "--mean", "0.1", "0.2", "0.3", "--data-path", str(folder)]
    assert main([*run, "--output-dir", "out"]) == 0
    capsys.readouterr()
    logged = json.loads(Path("out/log.txt").read_text())
    shutil.rmtree(folder / "train")
    evaluation = ["--eval", "--resume", "out/checkpoint.pth", "--device", "cpu"]
    assert main(evaluation) == 0
    assert numbers(capsys)["test_loss"] == logged["test_loss"]
    assert main([*evaluation, "--weights", "ema", "--batch-size", "5", "--data-path", str(folder)]) == 0
    assert numbers(capsys)["test_loss"] == pytest.approx(logged["ema_loss"], rel=1e-5)
    assert main([*evaluation, "--mean", "0.5", "0.5", "0.5", "--exif-orientation"]) == 0
    assert numbers(capsys)["test_loss"] != logged["test_loss"]
    assert main([*evaluation, "--quant", "none"]) == 2  # a recipe of the user's own is chosen as a whole
    assert "the same recipe: this run has none, " in capsys.readouterr().err


def test_an_older_checkpoints_options_come_from_its_identity(folder, capsys):
    """It has no options and no names of classes; its images were normalized by ImageNet's numbers."""
    run = [*RUN, "--model", "vit_tiny_patch16_224", "--input-size", "16", "--data-path", str(folder)]
    run += ["--mean", *map(str, IMAGENET_DEFAULT_MEAN), "--std", *map(str, IMAGENET_DEFAULT_STD)]
    assert main([*run, "--quant", "microscaling", "--output-dir", "out"]) == 0
    capsys.readouterr()
    logged, state = json.loads(Path("out/log.txt").read_text()), torch.load("out/checkpoint.pth", weights_only=True)
    assert state["identity"]["mean"] == IMAGENET_DEFAULT_MEAN and state["identity"]["classes"] == ("dark", "light")
    del state["options"]
    for key in ("mean", "std", "classes", "--exif-orientation", "--warmup-prefix"):
        del state["identity"][key]
    torch.save(state, "old.pth")
    assert main(["--eval", "--resume", "old.pth", "--data-path", str(folder), "--device", "cpu"]) == 0
    assert numbers(capsys)["test_loss"] == logged["test_loss"]


def test_classes_with_other_names_are_refused_by_the_first_difference(folder, capsys):
    run = [*RUN, *MICRO, "--data-path", str(folder), "--output-dir", "out"]
    assert main(run) == 0
    for half in ("train", "val"):
        (folder / half / "light").rename(folder / half / "bright")
    teacher = ["--teacher-path", "out/checkpoint.pth", "--teacher-model", MICRO[1]]
    student = ["--model", "deit_tiny_distilled_patch16_224", "--distillation-type", "hard", *teacher]
    for more in (
        ["--eval", "--resume", "out/checkpoint.pth"],
        ["--eval", "--finetune", "out/checkpoint.pth"],
        ["--resume", "auto"],
        [*student, "--input-size", "16", "--output-dir", "other"],
    ):
        assert main([*run, *more]) == 2
        assert "trained on other classes: label 0 is bright here and was dark; give" in capsys.readouterr().err


def test_non_finite_weights_end_an_evaluation_with_null_and_exit_code_1(folder, capsys):
    model = timm.create_model("deit_micro_patch4_32", img_size=8, num_classes=2)
    torch.nn.init.constant_(model.head.bias, torch.nan)
    torch.save(model.state_dict(), "nan.pth")
    assert main([*RUN, *MICRO, "--eval", "--finetune", "nan.pth", "--data-path", str(folder)]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["test_loss"] is None
    assert "main.py: diverged: the held-out loss is nan" in printed.err


@pytest.mark.parametrize(
    ("model", "mean", "crop"),
    [
        ("vit_tiny_patch16_224", 0.5, 0.9),
        ("deit_tiny_patch16_224", 0.485, 0.875),
        ("deit_micro_patch4_32", 0.485, 0.875),
        ("swin_tiny_patch4_window7_224.ms_in1k", 0.485, 0.9),
        ("resnet18", 0.485, 0.95),
    ],
)
def test_image_folders_are_prepared_as_the_models_configuration_says(model, mean, crop, folder):
    options = parse_args(["--data-set", "FOLDER", "--data-path", str(folder), "--model", model])
    found = preprocessing(options)
    assert (found.mean[0], found.crop, found.interpolation) == (mean, crop, "bicubic")
    options = parse_args(["--data-set", "FASHION", "--data-path", "x", "--model", model, "--std", "0.5", "0.25", "1"])
    assert preprocessing(options) == Preprocessing(std=(0.5, 0.25, 1.0))


def test_a_held_out_image_is_resized_cropped_and_normalized_so(folder, tmp_path):
    """At 224 px and a crop of 0.9 the shorter side becomes 248, timm's whole number."""
    how = Preprocessing((0.5, 0.5, 0.5), (0.25, 0.5, 1.0), "bilinear", 0.9)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "val" / "dark" / "0.png")
    loaders = build_loaders(replace(CONFIG, path=str(folder), input_size=224, preprocessing=how))
    resized = np.asarray(Image.fromarray(pixels).resize((248, 248), Image.Resampling.BILINEAR))[12:236, 12:236]
    wanted = (resized / 255 - 0.5) / np.array([0.25, 0.5, 1.0])
    image = next(iter(loaders.val))[0][0]
    assert torch.allclose(image, torch.from_numpy(wanted).permute(2, 0, 1).float(), atol=1e-6)
