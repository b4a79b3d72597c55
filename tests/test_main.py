"""The command line as a user meets it: training, logs, resuming, evaluation, and one clear line for every mistake."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import DropPath
from torch import Tensor, nn

import main as program
import timm
from datasets import DataConfig, build_loaders
from main import main
from quantization import (
    RECIPES,
    REMEDIES,
    Quantizer,
    RampingAdamW,
    Recipe,
    Remedies,
    RunLength,
    quant_linears,
    quantize_mx,
    restore_linears,
)
from tracking import oscillation_csv, tracker
from training import checkpoint, loop, setup
from training.models import build_model
from training.optimizer import build_optimizer
from training.options import build_parser, flag, parse_args
from training.run_log import table_row
from training.setup import build_recipe

TABLE_5 = list(product(("stochastic", "nearest"), ("double", "direct"), ("truncation_free", "floor")))
REPOSITORY = Path(__file__).resolve().parent.parent
IMAGES, HELD_OUT, BATCH = 150, 36, 48  # of DIGITS here: epochs of three steps, six images are left over
TINY = ["--quant", "mxfp4", "--epochs", "2", "--batch-size", str(BATCH), "--device", "cpu", "--warmup-epochs", "0"]
TINY += ["--lr", "0.2"]
ALL = ["--q-ema", "--q-ramping", "--q-ramping-steps", "3"]
OSCI_RESET = ["--osci-reset", "--osci-reset-start", "0.3", "--osci-reset-interval", "3", "--osci-reset-threshold", "2"]
RESUMED = {
    "plain": [],
    "q-ema": ["--q-ema"],
    "all": ALL,
    "mixup": ["--mixup", "0.8", "--cutmix", "1.0"],
    "ablation": ["--quantizers", "q2,q3", "--scaling", "floor"],
    "int4": ["--quant", "int4"],
    "dampen": ["--dampen", "0.1", "--dampen-reduction", "kernel_mean"],
    "freeze": ["--freeze", "0.002", "--batch-size", "16", "--lr", "1"],
    "micro-batches": ["--accumulate-steps", "2", "--checkpoint-activations", "--keep-last-batch", "--q-ema"],
    "osci-reset": OSCI_RESET,  # six steps: a window is open at the end of the first epoch
    "heal": ["--heal", "2", "--q-ema", "--accumulate-steps", "2"],
    "keep-blocks": ["--keep-blocks", "1", "--heal", "1"],
}


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def small_epochs(digits_cut_to):
    with digits_cut_to(IMAGES, HELD_OUT):
        yield


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(a, b) -> bool:
    """Nested containers of tensors and numbers, equal in every bit that matters; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def load(path: str) -> dict:
    return torch.load(path, weights_only=True)


def digits(input_size: int = 8) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """All training images with their labels, in some order, and all held-out ones."""
    no_augmentation = {"repeats": 1, "aa": "none", "color_jitter": 0.0, "reprob": 0.0}
    how = {"keep_last_batch": True, "num_workers": 0, "seed": 0, **no_augmentation}
    loaders = build_loaders(DataConfig("DIGITS", None, False, input_size, batch_size=1437, **how))
    ((images, labels),), ((held_out, their_labels),) = loaders.train, loaders.val
    return (images, labels), (held_out, their_labels)


@pytest.fixture
def few_digits(digits_cut_to):
    with digits_cut_to(24, 12):
        yield


def quantized(x: Tensor, scaling: str | None, ema: Tensor | None = None) -> Tensor:
    if scaling is None:
        return x
    return quantize_mx(x, scaling=scaling, rounding="nearest" if ema is None else "ema", ema=ema).dequantize()


def in_plain_lines(weights: dict[str, Tensor], scaling: str | None) -> nn.Module:
    """timm's DeiT with `weights`, whose blocks' linears compute Q1(X) Q2(W)^T + b, or X W^T + b without `scaling`.

    If `weights` have Q-EMA's averages, Q2 rounds towards them, as it should from the tenth update on.
    """
    model = timm.create_model("deit_micro_patch4_32", img_size=8, num_classes=10)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    for name, linear in model.blocks.named_modules():
        if isinstance(linear, nn.Linear):
            q2 = quantized(linear.weight.detach(), scaling, weights.get(f"blocks.{name}.weight_ema"))
            linear.forward = lambda x, q2=q2, bias=linear.bias: F.linear(quantized(x, scaling), q2, bias)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    """A FOLDER data set: two classes, five images each way."""
    generator = np.random.default_rng(0)
    for half in ("train", "val"):
        for label, brightness in (("dark", 0), ("light", 128)):
            directory = tmp_path / "images" / half / label
            directory.mkdir(parents=True)
            for i in range(5):
                pixels = generator.integers(brightness, brightness + 127, (40, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(directory / f"{i}.png")
    return tmp_path / "images"


def as_an_older_release_wrote_it(path: Path) -> None:
    """The state of the only remedy lay under one key, whatever it was called."""
    state = torch.load(path, weights_only=True)
    (remedy,) = state["more"].pop("remedies").values()
    state["more"]["oscillation"] = remedy
    torch.save(state, path)


class TestTraining:
    def test_logs_checkpoints_and_caveat(self, capsys):
        assert main([*TINY, *ALL, "--model-ema-decay", "0.9", "--output-dir", "out"]) == 0
        printed = capsys.readouterr().out
        assert "the paper does not study Q-EMA and Q-Ramping together" in printed
        assert "8 linears in mxfp4" in printed and "tetrajet, q_ema_beta=0.998" in printed
        log = lines_of(Path("out/log.txt"))
        wanted = {"epoch", "train_loss", "test_loss", "test_acc1", "test_acc5", "lr", "n_parameters", "img_per_s"}
        assert [line["epoch"] for line in log] == [0, 1] and wanted <= log[0].keys()
        assert "oscillating" not in log[0] and log[1]["mean_period"] >= 1
        assert "ema_acc1" in log[0] and log[0]["n_parameters"] == sum(
            p.numel() for p in timm.create_model("deit_micro_patch4_32", img_size=8, num_classes=10).parameters()
        )
        dll = Path("out/dllogger.json").read_text().splitlines()
        assert all(line.startswith("DLLL {") for line in dll)
        records = [json.loads(line[5:]) for line in dll]
        assert records[0]["step"] == "PARAMETER" and records[0]["data"]["quant"] == "mxfp4"
        assert records[1]["step"] == [0] and records[1]["data"] == log[0]
        assert {"timestamp", "datetime", "elapsedtime", "type"} <= records[1].keys()
        assert list(Path("out/tensorboard").glob("events.*"))
        assert Path("out/checkpoint.pth").is_file() and Path("out/best_checkpoint.pth").is_file()
        assert records[0]["data"]["command"] == shlex.join(sys.orig_argv)
        page = Path("out/report.html").read_text()
        best = max(line["test_acc1"] for line in log)
        assert "<td>2 of 2</td>" in page and f"<th>best top-1</th><td>{best:.2f} %</td>" in page

    @pytest.mark.parametrize("name", RESUMED)
    def test_resume_repeats_an_uninterrupted_run_bit_for_bit(self, name, interrupted_in_epoch, capsys):
        arguments = [*TINY, *RESUMED[name], "--drop-path", "0.2", "--model-ema-decay", "0.9"]
        assert main([*arguments, "--output-dir", "whole"]) == 0
        with interrupted_in_epoch(1):
            assert main([*arguments, "--output-dir", "parts"]) == 130
        assert "--resume auto --output-dir parts goes on" in capsys.readouterr().err
        assert len(lines_of(Path("parts/log.txt"))) == 1
        if name in ("dampen", "freeze", "osci-reset"):
            as_an_older_release_wrote_it(Path("parts/checkpoint.pth"))
        assert main([*arguments, "--output-dir", "parts", "--resume", "auto"]) == 0
        whole, parts = (torch.load(f"{d}/checkpoint.pth", weights_only=True) for d in ("whole", "parts"))
        for part in ("model", "model_ema"):
            assert all(torch.equal(parts[part][k], v) for k, v in whole[part].items())
        for key, state in whole["optimizer"]["state"].items():
            assert all(torch.equal(parts["optimizer"]["state"][key][k], v) for k, v in state.items())
        assert same(parts["more"], whole["more"])
        assert whole["more"]["remedies"].keys() == {
            flag for flag in REMEDIES if f"--{flag.replace('_', '-')}" in arguments
        }
        timing = {"img_per_s", "waited_for_data"}
        for a, b in zip(lines_of(Path("whole/log.txt")), lines_of(Path("parts/log.txt"))):
            assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}
        happened = {"dampen": "dampen_weight", "freeze": "frozen", "osci-reset": "resets", "heal": "quantized_acc1"}
        assert name not in happened or a[happened[name]] > 0

    def test_a_healed_checkpoint_is_evaluated_healed_and_quantized(self, evaluated, capsys):
        """Each by its own forward pass, in the log and by --eval: ordinary linears, and MX ones but in block 0."""
        options = [*TINY, "--heal", "2", "--keep-blocks", "0", "--model-ema-decay", "0.5", "--output-dir", "out"]
        assert main(options) == 0
        first, last = lines_of(Path("out/log.txt"))
        assert "quantized_acc1" not in first
        capsys.readouterr()
        assert main(["--eval", "--device", "cpu", "--resume", "out/checkpoint.pth"]) == 0
        shown = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert shown == {name: last[name] for name in shown} and len(shown) == 6
        images, labels = digits()[1]
        state = torch.load("out/checkpoint.pth", weights_only=True)
        for prefix in ("test", "quantized", "ema"):
            recipe = Recipe() if prefix == "quantized" else RECIPES["none"]
            model = build_model("deit_micro_patch4_32", 10, 8, 0.0, recipe)
            if prefix == "quantized":
                restore_linears(model, [name for name in quant_linears(model) if name.startswith("blocks.0.")])
            weights = state["model_ema" if prefix == "ema" else "model"]
            model.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
            wanted = {f"{prefix}_{name}": value for name, value in evaluated(model, images, labels).items()}
            assert {name: last[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
        fails([*TINY, "--eval", "--resume", "out/checkpoint.pth"], "same --heal: this run has None, .* has 2", capsys)
        torch.save(state | {"more": 7}, "damaged.pth")
        fails(["--eval", "--device", "cpu", "--resume", "damaged.pth"], "--resume found a damaged checkpoint", capsys)

    def test_a_recipe_made_by_switches_is_the_checkpoints(self, evaluated, capsys):
        switches = ["--backward-rounding", "nearest", "--backward-operands", "direct", "--scaling", "floor"]
        assert main([*TINY, *switches, "--epochs", "1", "--output-dir", "out"]) == 0
        assert "recipe  microscaling, multiplied in fp32" in capsys.readouterr().out
        assert main([*TINY, "--quant", "microscaling", "--eval", "--resume", "out/checkpoint.pth"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        found = evaluated(in_plain_lines(load("out/checkpoint.pth")["model"], "floor"), *digits()[1])
        assert result == pytest.approx({f"test_{name}": value for name, value in found.items()}, rel=1e-4)
        wanted = (
            r"recipe: this run has q1,q2=e2m1/floor/nearest, q3,q4,q5,q6=e2m1/floor/stochastic, double=False, .* has m"
        )
        fails([*TINY, *switches[2:], "--resume", "out/checkpoint.pth"], wanted, capsys)

    def test_resume_auto_starts_where_there_is_nothing(self):
        assert main([*TINY, "--epochs", "1", "--output-dir", "new", "--resume", "auto"]) == 0
        assert load("new/checkpoint.pth")["epoch"] == len(lines_of(Path("new/log.txt"))) == 1

    def test_eval_repeats_the_last_epoch_and_writes_nothing(self, evaluated, capsys):
        assert main([*TINY, "--epochs", "1", "--output-dir", "out"]) == 0
        before = sorted(p.stat().st_mtime_ns for p in Path("out").rglob("*"))
        capsys.readouterr()
        assert main([*TINY, "--eval", "--resume", "out/checkpoint.pth"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        log = lines_of(Path("out/log.txt"))[-1]
        assert result == {name: log[name] for name in ("test_loss", "test_acc1", "test_acc5")}
        assert before == sorted(p.stat().st_mtime_ns for p in Path("out").rglob("*")) and not Path("runs").exists()
        assert main([*TINY, "--eval", "--finetune", "out/checkpoint.pth"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
        found = evaluated(in_plain_lines(load("out/checkpoint.pth")["model"], "truncation_free"), *digits()[1])
        assert result == pytest.approx({f"test_{name}": value for name, value in found.items()}, rel=1e-4)

    def test_default_output_directory(self):
        assert main([*TINY, "--epochs", "1"]) == 0
        assert [re.sub(r"\d+-\d+", "TIME", p.name) for p in Path("runs").iterdir()] == [
            "TIME-deit_micro_patch4_32-mxfp4"
        ]

    @pytest.mark.parametrize("classes", [10, 2])
    def test_finetune_starts_from_the_weights_and_a_head_for_other_classes_from_the_seed(self, classes, folder):
        """With a learning rate of 0, the checkpoint holds the weights that training started from, bit for bit."""
        given = timm.create_model("deit_micro_patch4_32", img_size=8, num_classes=classes).state_dict()
        torch.save({"model": given}, "weights.pth")
        options = ["--data-set", "FOLDER", "--data-path", str(folder), "--batch-size", "4", "--input-size", "8"]
        options += ["--model", "deit_micro_patch4_32", "--num-workers", "0", "--repeats", "1", "--epochs", "1"]
        options += ["--lr", "0", "--warmup-epochs", "0", "--seed", "3", "--device", "cpu", "--output-dir", "out"]
        assert main([*options, "--finetune", "weights.pth"]) == 0
        torch.manual_seed(3)
        own = timm.create_model("deit_micro_patch4_32", img_size=8, num_classes=2).state_dict()
        assert not torch.equal(own["head.weight"], given["head.weight"])
        saved = load("out/checkpoint.pth")["model"]
        assert saved.keys() == given.keys()
        for name, value in saved.items():
            wanted = own if classes == 10 and name.startswith("head.") else given
            assert torch.equal(value, wanted[name]), name

    @pytest.mark.usefixtures("few_digits")
    @pytest.mark.parametrize("kind", ["soft", "hard"])
    def test_distillation(self, kind, evaluated, monkeypatch):
        """With a learning rate of 0, the logged loss follows from the saved weights and the formula, in float64."""
        create, small = timm.models.deit._create_deit, {"embed_dim": 32, "depth": 2, "num_heads": 2}
        monkeypatch.setattr(timm.models.deit, "_create_deit", lambda *args, **more: create(*args, **more | small))
        teacher = timm.create_model("deit_micro_patch4_32", img_size=32, num_classes=10)
        nn.init.normal_(teacher.head.weight, std=0.3)  # almost uniform probabilities would hide the temperature
        torch.save(teacher.state_dict(), "teacher.pth")
        options = ["--model", "deit_tiny_distilled_patch16_224", "--input-size", "32", "--distillation-type", kind]
        options += ["--teacher-model", "deit_micro_patch4_32", "--teacher-path", "teacher.pth", "--batch-size", "24"]
        options += ["--distillation-alpha", "0.3", "--smoothing", "0.2", "--lr", "0"]
        options += ["--distillation-tau", "2"] if kind == "soft" else []
        assert main([*TINY, *options, "--epochs", "1", "--output-dir", "out"]) == 0
        (log,) = lines_of(Path("out/log.txt"))
        (images, labels), held_out = digits(32)
        student = timm.create_model(options[1], img_size=32, num_classes=10, quant=Recipe())
        student.load_state_dict(load("out/checkpoint.pth")["model"])
        assert log["test_loss"] == pytest.approx(evaluated(student, *held_out)["loss"], rel=1e-4)
        student.set_distilled_training(True)
        with torch.no_grad():
            logits, distilled = (z.double() for z in student.train()(images))
            taught = teacher.eval()(images).double()
        smoothed = 0.8 * F.one_hot(labels, 10) + 0.02
        base = -(smoothed * logits.log_softmax(dim=1)).sum(dim=1).mean()
        if kind == "soft":
            p, q = (taught / 2).softmax(dim=1), (distilled / 2).softmax(dim=1)
            second = 2**2 * (p * (p.log() - q.log())).mean()
        else:
            second = -distilled.log_softmax(dim=1)[torch.arange(24), taught.argmax(dim=1)].mean()
        assert log["train_loss"] == pytest.approx(float(0.7 * base + 0.3 * second), rel=1e-4)
        assert abs(second - base) > 0.01

    @pytest.mark.usefixtures("few_digits")
    def test_every_quant_choice_trains_and_evaluates_by_its_own_forward_pass(self, evaluated):
        """The held-out numbers follow from the saved weights by Q1 and Q2 in plain lines, not by another choice's."""
        choices = {"none": None, "microscaling": "floor", "tetrajet": "truncation_free", "mxfp4": "truncation_free"}
        options = ["--epochs", "1", "--lr", "0.5", "--output-dir"]
        _, held_out = digits()
        torch.manual_seed(0)
        start, weights = timm.create_model("deit_micro_patch4_32", img_size=8, num_classes=10).state_dict(), {}
        for quant, scaling in choices.items():
            how = ["--q-ema", "--batch-size", "2"] if quant == "mxfp4" else ["--batch-size", "12"]  # 12 steps, or 2
            assert main([*TINY, "--quant", quant, *how, *options, quant]) == 0
            (log,), weights[quant] = lines_of(Path(quant, "log.txt")), load(f"{quant}/checkpoint.pth")["model"]
            found = evaluated(in_plain_lines(weights[quant], scaling), *held_out)
            assert {name: log[f"test_{name}"] for name in found} == pytest.approx(found, rel=1e-4), quant
            for other in {None, "floor", "truncation_free"} - {scaling}:
                different = evaluated(in_plain_lines(weights[quant], other), *held_out)["loss"]
                # Twice what counts as equal above; Q-EMA's weights are nearly on the grids of both scale rules.
                assert abs(different - found["loss"]) > 2e-4 * found["loss"], quant
            moved = [name for name, value in start.items() if not torch.equal(weights[quant][name], value)]
            assert moved == list(start)
        averages = {name: value for name, value in weights["mxfp4"].items() if "ema" in name}
        assert len(averages) == 2 * 8
        without = evaluated(in_plain_lines(weights["mxfp4"] | dict.fromkeys(averages), "truncation_free"), *held_out)
        assert abs(without["loss"] - found["loss"]) > 1e-3 * found["loss"]
        for one, other in combinations(choices, 2):
            assert all(not torch.equal(weights[one][name], weights[other][name]) for name in start), (one, other)

    def test_same_seed_same_run_other_seed_other_run(self):
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
            assert main([*TINY, "--epochs", "1", "--seed", seed, "--output-dir", name]) == 0
        a, b, c = (lines_of(Path(name, "log.txt"))[0]["train_loss"] for name in "abc")
        assert a == b != c


@pytest.fixture
def short_windows(monkeypatch):
    """Epochs of `TRACKED` have 2 steps: a window that opens within the epoch, as it does in a real one."""
    monkeypatch.setattr(tracker, "TRACKED_STEPS", 1)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, digits_cut_to) -> Path:
    directory = tmp_path_factory.mktemp("tracked")
    with digits_cut_to(IMAGES, HELD_OUT), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, "TRACKED_STEPS", 1)
        assert main([*TRACKED, "--track-oscillation", "--output-dir", str(directory)]) == 0
    return directory


TRACKED = [*TINY, "--model", "deit_micro_patch4_32", "--input-size", "8", "--batch-size", "72", "--num-workers", "0"]
TRACKED += ["--q-ema", "--q-ramping", "--q-ramping-steps", "1", "--drop-path", "0.2"]


@pytest.mark.usefixtures("short_windows")
class TestTrackOscillation:
    def test_training_is_the_same_bit_for_bit(self, tracked):
        assert main([*TRACKED, "--output-dir", "plain"]) == 0
        assert not Path("plain/oscillation.csv").exists()
        hashes, logs = [], []
        for directory in (Path("plain"), tracked):
            # Weights, averages, optimizer, random generators.
            hashes.append(digest(torch.load(directory / "checkpoint.pth", weights_only=True)))
            lines = lines_of(directory / "log.txt")
            logs.append(
                [{k: v for k, v in line.items() if k not in ("img_per_s", "waited_for_data")} for line in lines]
            )
        assert hashes[0] == hashes[1] and logs[0] == logs[1]

    def test_every_measure_of_every_epoch_is_in_the_file(self, tracked):
        rows = oscillation_csv.read(tracked / "oscillation.csv")
        assert {(r.epoch, r.step, r.window) for r in rows} == {(0, 2, 1), (1, 4, 1)}
        assert {r.measure for r in rows} == set(oscillation_csv.Measure)
        assert {r.where for r in rows if r.measure.value == "rate_y"} == {"blocks.1"}
        for measure in ("rate_w", "rate_q2", "oscillating", "confidence"):
            of_last = {r.where: r.value for r in rows if r.measure.value == measure and r.epoch == 1}
            assert len(of_last) == 9 and all(np.isfinite(value) and value >= 0 for value in of_last.values())
        for measure, count in (("latent_histogram", 128), ("confidence_histogram", 32)):
            shares = [r.value for r in rows if r.measure.value == measure and r.epoch == 1]
            assert len(shares) == count and sum(shares) == pytest.approx(1)
        assert [r.x for r in rows if r.measure.value == "trajectory_q2" and r.epoch == 1] == [0, 1] * 4
        (events,) = (tracked / "tensorboard").glob("events.*")
        assert all(tag in events.read_bytes() for tag in (b"rate_q2/all", b"oscillating/all", b"latent_histogram"))

    def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(self, tracked, interrupted_in_epoch, capsys):
        options = [*TRACKED, "--track-oscillation", "--output-dir", "parts"]
        with interrupted_in_epoch(1):
            assert main(options) == 130
        whole, parts = (tracked / "oscillation.csv").read_text(), Path("parts/oscillation.csv")
        first = parts.read_text()
        assert whole.startswith(first) and first.count("\n") > 100
        # As if the second epoch had been measured, and half a line of it written, but no checkpoint saved.
        parts.write_text(first + "1,4,1,rate_w,all,,0.5\n1,4,1,rate_")
        assert main([*options, "--resume", "auto"]) == 0
        assert parts.read_text() == whole

    def test_full_precision_has_weights_and_outputs_only(self):
        options = [*TINY, "--quant", "none", "--epochs", "1", "--track-oscillation", "--output-dir", "out"]
        assert main(options) == 0
        rows = oscillation_csv.read(Path("out/oscillation.csv"))
        assert {r.measure.value for r in rows} == {"rate_w", "rate_y"} and len(rows) == 10

    def test_a_run_that_goes_on_with_it_after_an_epochs_last_step(self, monkeypatch, capsys):
        options = [*TINY, "--save-steps", "3", "--save-epochs", "2", "--output-dir", "out"]

        def interrupted(*arguments) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(loop, "evaluate", interrupted)
            assert main(options) == 130
        assert main([*options, "--track-oscillation", "--resume", "auto"]) == 0
        rows = oscillation_csv.read(Path("out/oscillation.csv"))
        assert {(r.epoch, r.window) for r in rows} == {(1, 1)} and all(r.value == r.value for r in rows)

    def test_a_file_of_another_kind_is_left_alone(self, capsys):
        Path("out").mkdir()
        Path("out/oscillation.csv").write_text("a,b\n1,2\n")
        fails([*TINY, "--track-oscillation", "--output-dir", "out"], "cannot go on with its file: .* got 'a,b'", capsys)


def digest(value) -> str:
    """SHA-256 of everything in a checkpoint."""
    found = hashlib.sha256()

    def add(part) -> None:
        if isinstance(part, torch.Tensor):
            found.update(part.numpy().tobytes())
        elif isinstance(part, dict):
            for name, item in part.items():
                found.update(repr(name).encode())
                add(item)
        elif isinstance(part, (list, tuple)):
            for item in part:
                add(item)
        else:
            found.update(repr(part).encode())

    add(value)
    return found.hexdigest()


MISTAKES = {
    "batch size 0": (["--batch-size", "0"], r"--batch-size: needs a whole number at least 1, got '0'"),
    "save epochs": (["--save-epochs", "0"], r"--save-epochs: needs a whole number at least 1, got '0'"),
    "save steps": (["--save-steps", "-1"], r"--save-steps: needs a whole number at least 0, got '-1'"),
    "keep": (["--keep-checkpoints", "0"], r"--keep-checkpoints: needs a whole number at least 1, got '0'"),
    "epochs": (["--epochs", "two"], r"--epochs: needs a whole number at least 1, got 'two'"),
    "lr": (["--lr", "nan"], r"--lr: needs a number at least 0, got 'nan'"),
    "lr infinite": (["--lr", "inf"], r"--lr: needs a number at least 0, got 'inf'"),
    "drop path": (["--drop-path", "1"], r"--drop-path: needs a number from 0 to 1, exclusive, got '1'"),
    "unknown option": (["--bits", "4"], r"unrecognized arguments: --bits 4"),
    "unknown quant": (["--quant", "fp3"], r"invalid choice: 'fp3'"),
    "unknown model": (["--model", "deit_smal_patch16_224"], r"did you mean deit_small_patch16_224"),
    "hopeless model": (["--model", "zzz"], r"--model must be a model of timm, got 'zzz'"),
    "cnn": (
        ["--quant", "mxfp4", "--model", "resnet18"],
        r"--quant cannot quantize --model resnet18: ResNet has no linear layer named .*docs/models.md",
    ),
    "input size": (["--input-size", "9"], r"multiple of deit_micro_patch4_32's patch size 4, got 9"),
    "tiny input": (["--model", "deit_tiny_patch16_224", "--input-size", "8"], r"(multiple|cannot be built).* 8"),
    "swin input size": (
        ["--model", "swin_tiny_patch4_window7_224", "--input-size", "34"],
        r"multiple of swin_tiny_patch4_window7_224's patch size 4, got 34",
    ),
    "clip grad": (["--clip-grad", "-1"], r"--clip-grad: needs a number at least 0, got '-1'"),
    "no data path": (["--data-set", "FOLDER"], r"--data-set FOLDER needs --data-path"),
    "missing path": (["--data-set", "IMNET", "--data-path", "nowhere"], r"must be a directory, got nowhere"),
    "empty path": (["--data-set", "IMNET", "--data-path", "."], r"must hold train/ and val/, found no train/"),
    "empty fashion": (["--data-set", "FASHION", "--data-path", "."], r"must hold train-images-idx3-ubyte or .*\.gz"),
    "empty cifar": (["--data-set", "CIFAR10", "--data-path", "."], r"must hold cifar-10-batches-py"),
    "classes": (["--num-classes", "5"], r"--num-classes 5 does not fit the data, which has 10 classes"),
    "large batch": (["--batch-size", "5000"], r"at least one batch: DIGITS gives 150 training images"),
    "gpu": (["--device", "cuda"], r"--device cuda needs a GPU"),
    "q-ema alone": (["--q-ema"], r"--q-ema needs quantized weights, got --quant none"),
    "q-ramping alone": (["--q-ramping"], r"--q-ramping needs quantized weights, got --quant none"),
    "beta alone": (["--quant", "mxfp4", "--q-ema-beta", "0.9"], r"--q-ema-beta 0.9 has no effect without --q-ema"),
    "switch of none": (
        ["--scaling", "floor"],
        r"--scaling changes an MXFP4 recipe, got --quant none; add",
    ),
    "switch of int4": (
        ["--quant", "int4", "--quantizers", "q1"],
        r"--quantizers changes an MXFP4 recipe, got --quant int4",
    ),
    "unknown quantizer": (
        ["--quant", "mxfp4", "--quantizers", "q1,w"],
        r"--quantizers: needs some of q1,q2,q3,q4,q5,q6, got 'w'",
    ),
    "no quantizer": (["--quant", "mxfp4", "--quantizers", ","], r"--quantizers: needs some of .* got ''"),
    "nothing": (["--resume", ""], r"--resume needs a value, got an empty one; is a variable of the shell not set\?"),
    "nothing assigned": (["--output-dir="], r"--output-dir needs a value, got an empty one"),
    "lr beyond fp32": (["--lr", "1e300"], r"--lr: needs a number at least 0 and at most 1e\+30, got '1e300'"),
    "dampen by nothing": (["--dampen", "0"], r"--dampen needs quantized weights, got --quant none; add --quant mxfp4"),
    "augmentation that fails": (["--aa", "augmix-a0"], r"--aa must be none or one of timm's, .*, got 'augmix-a0'"),
    "no stochastic depth": (
        ["--model", "vgg11", "--input-size", "224", "--drop-path", "0.1"],
        r"--model vgg11 has no stochastic depth, got --drop-path 0.1; give 0",
    ),
    "q-ema without q2": (
        ["--quant", "mxfp4", "--q-ema", "--quantizers", "q1,q3"],
        r"--q-ema is about weights that q2 quantizes, got --quantizers q1,q3; add q2",
    ),
    "freeze without q2": (
        ["--quant", "mxfp4", "--freeze", "0.01", "--quantizers", "q1"],
        r"--freeze is about weights that q2",
    ),
    "q-ema of int4": (["--quant", "int4", "--q-ema"], r"--q-ema needs quantized weights, got --quant int4"),
    "q-ramping of int4": (["--quant", "int4", "--q-ramping"], r"--q-ramping needs quantized weights, got --quant int4"),
    "dampen alone": (["--dampen", "1"], r"--dampen needs quantized weights, got --quant none; add --quant mxfp4"),
    "freeze of int4": (["--freeze", "0.01", "--quant", "int4"], r"--freeze needs quantized weights, got --quant int4"),
    "osci-reset alone": (["--osci-reset"], r"--osci-reset needs quantized weights, got --quant none"),
    "two answers": (
        ["--quant", "mxfp4", "--q-ema", "--freeze", "0.01"],
        r"--q-ema and --freeze are two remedies for oscillation that no paper combines; drop one",
    ),
    "heal after the run": (
        ["--quant", "mxfp4", "--epochs", "3", "--heal", "4"],
        r"--heal must be an epoch of the run, from 1 to 3, got 4",
    ),
    "heal alone": (["--heal", "1"], r"--heal needs quantized weights, got --quant none; add --quant mxfp4"),
    "a block too many": (
        ["--quant", "mxfp4", "--keep-blocks", "0,2"],
        r"--keep-blocks takes numbers from 0 to 1 for this model, got 2",
    ),
    "all blocks": (["--quant", "mxfp4", "--keep-blocks", "0,1"], r"--keep-blocks must leave a block, got all 2; use"),
    "no block": (
        ["--quant", "mxfp4", "--keep-blocks", "x"],
        r"--keep-blocks: needs numbers of blocks from 0, .* got 'x'",
    ),
    "a window longer than the interval": (
        ["--quant", "mxfp4", "--osci-reset", "--osci-reset-window", "9", "--osci-reset-interval", "8"],
        r"--osci-reset-window must be at most --osci-reset-interval, 8, got 9; lower it",
    ),
    "a start after the run": (
        ["--quant", "mxfp4", "--epochs", "1", "--osci-reset", "--osci-reset-start", "1500"],
        r"--osci-reset-start must leave the window of \d+ steps within the run's \d+, got 1500; lower it",
    ),
    "a start between": (
        ["--quant", "mxfp4", "--osci-reset", "--osci-reset-start", "1.5"],
        r"--osci-reset-start: needs a share of the run from 0 to 1, or a whole number of steps, got '1.5'",
    ),
    "freeze at one oscillation": (
        ["--quant", "mxfp4", "--freeze", "0.001"],
        r"--freeze: needs a number from 0.002 to 0.1, got '0.001'",
    ),
    "reduction alone": (
        ["--quant", "mxfp4", "--dampen-reduction", "sum"],
        r"--dampen-reduction sum has no effect without --dampen; add it",
    ),
    "interval alone": (
        ["--quant", "mxfp4", "--osci-reset-interval", "5"],
        r"--osci-reset-interval 5 has no effect without --osci-reset; add it",
    ),
    "matmul of int4": (
        ["--matmul", "bf16", "--quant", "int4"],
        r"--matmul bf16 multiplies quantized operands, got --quant int4; add",
    ),
    "matmul alone": (["--matmul", "bf16"], r"--matmul bf16 multiplies quantized operands, got --quant none; add"),
    "fp8 on a cpu": (
        ["--quant", "mxfp4", "--matmul", "fp8", "--device", "cpu"],
        r"--matmul fp8 needs a GPU with FP8 tensor cores \(compute capability 8.9 .*\), got cpu; use auto or bf16",
    ),
    "graph on a cpu": (["--cuda-graph", "--device", "cpu"], r"--cuda-graph needs a GPU, got --device cpu"),
    "fsdp of one": (["--fsdp"], r"--fsdp is for several processes, got one; start main.py by torchrun or drop it"),
    "check one rank": (["--check-ranks", "5"], r"--check-ranks is for several processes, got one; start"),
    "k2 alone": (["--quant", "mxfp4", "--q-ramping-k2", "4"], r"--q-ramping-k2 4 has no effect without --q-ramping"),
    "odd mixup": (["--mixup", "0.8", "--batch-size", "7"], r"--batch-size must be even, got 7"),
    "uneven micro-batches": (
        ["--accumulate-steps", "3", "--batch-size", "32"],
        r"--accumulate-steps must divide --batch-size, got 3 for 32; change one of them",
    ),
    "no micro-batch": (["--accumulate-steps", "0"], r"--accumulate-steps: needs a whole number at least 1, got '0'"),
    "cannot recompute": (
        ["--checkpoint-activations", "--model", "pit_ti_224", "--input-size", "224"],
        r"--checkpoint-activations needs a model that timm can recompute, got --model pit_ti_224",
    ),
    "old model name": (["--model", "xception"], r"--model must be a model of timm, got 'xception'; did you mean"),
    "download nothing": (["--download"], r"--download fetches FASHION, CIFAR10, CIFAR100, got --data-set DIGITS; drop"),
    "path of digits": (["--data-path", "."], r"--data-path has no effect on --data-set DIGITS, .*; drop it"),
    "alpha alone": (["--distillation-alpha", "0"], r"--distillation-alpha 0.0 has no effect without --distillation-t"),
    "teacher alone": (["--teacher-path", "a-file"], r"--teacher-path a-file has no effect without --distillation-type"),
    "temperature of hard": (
        ["--distillation-type", "hard", "--distillation-tau", "2"],
        r"--distillation-tau 2.0 is the temperature of --distillation-type soft, got hard; drop it",
    ),
    "rounding of nothing": (
        ["--quant", "mxfp4", "--quantizers", "q1,q2", "--backward-rounding", "nearest"],
        r"--backward-rounding is about q3,q4,q5,q6, got --quantizers q1,q2; add one of them",
    ),
    "operands of nothing": (
        ["--quant", "mxfp4", "--quantizers", "q1,q2", "--backward-operands", "direct"],
        r"--backward-operands direct is about q4 and q6, got --quantizers q1,q2; add one of them",
    ),
    "element of nothing": (
        ["--quant", "mxfp4", "--quantizers", "q3", "--forward-element", "e3m0"],
        r"--forward-element is about q1,q2, got --quantizers q3; add one of them",
    ),
    "teacher": (["--distillation-type", "soft"], r"needs --teacher-model and --teacher-path"),
    "resume what": (["--resume", "nothing.pth"], r"a checkpoint must be a file, got nothing.pth"),
    "resume auto": (["--resume", "auto"], r"--resume auto looks into --output-dir"),
    "track a cnn": (
        ["--track-oscillation", "--model", "resnet18", "--input-size", "224"],
        r"--track-oscillation needs a model whose blocks have the linears attn.qkv, .* ResNet has none; choose",
    ),
    "track an evaluation": (
        ["--track-oscillation", "--eval", "--finetune", "a-file"],
        r"--track-oscillation measures training, got --eval; leave one of them out",
    ),
    "both": (["--resume", "a", "--finetune", "b"], r"give one of them"),
    "eval what": (["--eval"], r"--eval needs weights; give --resume, --finetune or --pretrained"),
    "eval auto": (
        ["--eval", "--resume", "auto", "--output-dir", "none"],
        r"needs none/checkpoint.pth, which is missing",
    ),
    "output is a file": (
        ["--output-dir", "a-file"],
        r"--output-dir must be a directory that can be written, got a-file",
    ),
    "seed": (["--seed", "99999999999999999999"], r"--seed: needs a whole number from 0 to 2147483647"),
    "workers": (["--num-workers", "1000000"], r"--num-workers: needs a whole number from 0 to 512"),
    "model tag": (
        ["--model", "deit_tiny_patch16_224.nope"],
        r"has a tag that timm does not know; it knows deit_tiny_patch16_224.fb_in1k",
    ),
    "two sources of weights": (["--pretrained", "--finetune", "x.pth"], r"--pretrained and a file are two sources"),
    "weights of nothing": (["--weights", "ema"], r"--weights ema chooses from the file of --finetune or of --eval"),
    "mean of two": (["--mean", "0.5", "0.5"], r"--mean: expected 3 arguments"),
    "std of zero": (["--std", "0", "1", "1"], r"--std: needs a number at least 1e-06, got '0'"),
    "orientation of digits": (["--exif-orientation"], r"is about image files \(IMNET, FOLDER\), got --data-set DIGITS"),
    "long warm-up": (
        ["--epochs", "3", "--warmup-epochs", "3", "--no-warmup-prefix"],
        r"--warmup-epochs must be less than --epochs 3, got 3: --lr would never be reached; lower it",
    ),
    "long path": (["--output-dir", "x" * 300], r"File name too long"),
    "bad images": (["--bad-images", "skip"], r"is about image files \(IMNET, FOLDER\), got --data-set DIGITS; drop it"),
    "augmentation": (["--aa", "sharpen"], r"--aa must be none or one of timm's, .* got 'sharpen'"),
}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--freeze", "0.01", "--quant", "mxfp4"], "--freeze"),
        (["--dampen", "1", "--quant", "mxfp4"], "--dampen"),
        (["--osci-reset", "--quant", "mxfp4"], "--osci-reset"),
        (["--track-oscillation"], "--track-oscillation"),
        (["--compile"], "--compile"),
        (["--quant", "int4"], "--quant int4"),
    ],
)
def test_what_does_not_go_with_sharded_weights(options, named, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(["--fsdp", *options], f"--fsdp shards the weights, and {named} needs whole ones; drop one", capsys)


def test_sharded_weights_are_not_recorded(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(["--fsdp", "--cuda-graph"], "--fsdp gathers weights during the passes that --cuda-graph would record", capsys)


def fails(arguments: list[str], message: str, capsys) -> None:
    """Exit code 2, one line that matches, no file written or changed."""
    before = {p: p.is_file() and p.stat().st_mtime_ns for p in Path().rglob("*")}
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert error.startswith("main.py: error: ") and "\n" not in error
    assert re.search(message, error), error
    assert before == {p: p.is_file() and p.stat().st_mtime_ns for p in Path().rglob("*")}


def without_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith("head.")}


class TestMistakes:
    @pytest.mark.parametrize("name", MISTAKES)
    def test_one_line_exit_code_2_nothing_written(self, name, capsys):
        if name == "gpu" and torch.cuda.is_available():
            pytest.skip("this machine has the GPU")
        Path("a-file").write_text("")
        fails(*MISTAKES[name], capsys)

    def test_in_a_real_process_too(self):
        command = [sys.executable, str(REPOSITORY / "main.py"), "--data-set", "FOLDER", "--data-path", "nowhere"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1

    def test_folders_that_do_not_fit(self, folder, capsys):
        base = ["--data-path", str(folder), "--num-workers", "0", "--data-set"]
        fails([*base, "IMNET"], "IMNET has 1000 classes, .* has 2; use --data-set FOLDER", capsys)
        (folder / "val" / "grey").mkdir()
        fails([*base, "FOLDER"], "must hold the same classes; only one of them has grey", capsys)
        (folder / "train" / "grey").mkdir()
        fails([*base, "FOLDER"], "every class must be a folder with images in it", capsys)

    def test_resume_of_something_else(self, capsys):
        assert main([*TINY, "--epochs", "1", "--output-dir", "out"]) == 0
        assert main([*TINY, "--epochs", "1", "--quant", "none", "--output-dir", "other"]) == 0
        capsys.readouterr()
        ours = ["--resume", "out/checkpoint.pth"]
        fails(
            [*TINY, *ours, "--q-ema"], "same recipe: this run has tetrajet, q_ema_beta=0.998, .* has tetrajet;", capsys
        )
        fails([*TINY, *ours, "--quant", "microscaling"], "same recipe: this run has microscaling", capsys)
        fails([*TINY, *ours, "--quant", "int4"], "same recipe: this run has int4", capsys)
        fails(
            [*TINY, *ours, "--epochs", "1", "--dampen", "0.1"], "same --dampen: this run has 0.1, .* has None", capsys
        )
        fails(
            [*TINY, *ours, "--epochs", "1", "--freeze", "0.1"], "same --freeze: this run has 0.1, .* has None", capsys
        )
        fails([*TINY, *ours, "--epochs", "1", *OSCI_RESET], "same --osci-reset: this run has True", capsys)
        fails([*TINY, *ours, "--q-ramping"], "same optimizer: this run has RampingAdamW", capsys)
        fails([*TINY, *ours, "--model", "deit_tiny_patch16_224", "--input-size", "32"], "same model", capsys)
        fails([*TINY, *ours, "--input-size", "16"], "same input size", capsys)
        fails(
            [*TINY, *ours, "--epochs", "1", "--model-ema-decay", "0.9"],
            "same --model-ema-decay: this run has 0.9",
            capsys,
        )
        fails([*TINY, *ours, "--lr", "0.5", "--epochs", "1"], "same --lr: this run has 0.5", capsys)
        fails([*TINY, *ours, "--clip-grad", "5", "--epochs", "1"], "same --clip-grad: this run has 5.0", capsys)
        fails([*TINY, *ours, "--epochs", "6"], "same --epochs: this run has 6, .* has 1;", capsys)
        fails([*TINY, "--eval", "--resume", "other/checkpoint.pth"], "same recipe", capsys)
        fails([*TINY, "--output-dir", "out"], "out holds a run; pass --resume auto", capsys)
        shutil.copytree("out", "third")
        fails([*TINY, "--output-dir", "third", *ours, "--epochs", "1"], "third holds a run; pass --resume auto", capsys)
        for name in ("checkpoint.pth", "log.txt"):
            Path("third", name).unlink()
        fails([*TINY, "--output-dir", "third"], "third holds a run; pass --resume auto", capsys)
        content = torch.load("out/checkpoint.pth", weights_only=True)
        for part in ("identity", "rng", "model", "optimizer"):
            torch.save({k: v for k, v in content.items() if k != part}, "damaged.pth")
            fails([*TINY, "--epochs", "1", "--resume", "damaged.pth"], "damaged", capsys)
        torch.save({"model": {}}, "stock.pth")
        fails(
            [*TINY, "--resume", "stock.pth"], "stock.pth is not one. Weights of a stock model go to --finetune", capsys
        )
        torch.save([1, 2], "list.pth")
        fails([*TINY, "--resume", "list.pth"], "it holds a list", capsys)
        Path("text.pth").write_text("hello")
        fails([*TINY, "--resume", "text.pth"], "not a readable checkpoint", capsys)
        Path("cut.pth").write_bytes(Path("out/checkpoint.pth").read_bytes()[:5000])
        fails([*TINY, "--resume", "cut.pth"], "not a readable checkpoint", capsys)

    def test_another_process_works_there(self, busy, capsys):
        with busy(Path("out")):
            fails([*TINY, "--output-dir", "out"], "--output-dir out must be free, another process works there", capsys)
        assert main([*TINY, "--epochs", "1", "--output-dir", "out"]) == 0 and not Path("out/.lock").exists()

    def test_another_process_was_there_until_now(self, monkeypatch, capsys):
        assert main([*TINY, "--epochs", "1", "--output-dir", "out"]) == 0
        build = setup.build_criterion

        def slow(*arguments):
            os.utime("out/checkpoint.pth")  # written again, between our look at it and the lock
            return build(*arguments)

        monkeypatch.setattr(setup, "build_criterion", slow)
        before = {p: p.read_bytes() for p in Path("out").iterdir() if p.is_file()}
        arguments = [*TINY, "--epochs", "1", "--track-oscillation", "--output-dir", "out", "--resume", "auto"]
        monkeypatch.setattr(checkpoint.RunState, "restore", lambda self, state: None)  # else it would be done already
        assert main(arguments) == 2 and "another process was there until now" in capsys.readouterr().err
        assert before == {p: p.read_bytes() for p in Path("out").iterdir() if p.is_file()}

    def test_weights_without_the_head_are_for_training_alone(self, capsys):
        model = timm.create_model("deit_micro_patch4_32", img_size=8, num_classes=17, quant=Recipe())
        torch.save(model.state_dict(), "w.pth")
        fails([*TINY, "--eval", "--finetune", "w.pth"], "--finetune w.pth does not fit the model: .*head", capsys)
        assert main([*TINY, "--epochs", "1", "--lr", "0", "--finetune", "w.pth", "--output-dir", "out"]) == 0
        assert "w.pth has no head for these classes; the model's begins at random" in capsys.readouterr().out
        saved = load("out/checkpoint.pth")["model"]
        assert saved["head.weight"].shape == (10, 128) and len(saved["head.weight"].unique()) > 1000
        assert same(without_head(saved), without_head(model.state_dict()))

    def test_a_log_of_something_else_is_left_alone(self, capsys):
        for content in ("hello\n", "[1]\n", '{"loss": 1}\n', "no end"):
            Path("out").mkdir(exist_ok=True)
            Path("out/log.txt").write_text(content)
            fails([*TINY, "--output-dir", "out"], "out holds a run; pass --resume auto", capsys)
            arguments = [*TINY, "--output-dir", "out", "--resume", "auto"]
            fails(arguments, "out/log.txt must be a run's log, it holds something else", capsys)
            assert [path.name for path in Path("out").iterdir()] == ["log.txt"]
            assert Path("out/log.txt").read_text() == content
        Path("out/log.txt").write_bytes(bytes(9))  # which some file systems leave where power fails
        assert main([*TINY, "--epochs", "1", "--output-dir", "out", "--resume", "auto"]) == 0
        printed = capsys.readouterr().out
        assert "out holds a run without a checkpoint to go on from; it begins anew" in printed
        assert len(lines_of(Path("out/log.txt"))) == 1

    def test_weights_that_do_not_fit(self, capsys):
        torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), "tiny.pth")
        fails([*TINY, "--finetune", "tiny.pth"], "does not fit the model", capsys)
        torch.save({"head.weight": torch.zeros(10, 128)}, "head.pth")
        fails([*TINY, "--finetune", "head.pth"], "does not fit the model: it lacks", capsys)
        for content in ({"epoch": 3}, {"model": None}, {1: torch.ones(1)}):
            torch.save(content, "numbers.pth")
            fails([*TINY, "--finetune", "numbers.pth"], "is neither", capsys)

    def test_a_teacher_for_a_student_without_its_token(self, capsys):
        torch.save(timm.create_model("deit_micro_patch4_32", img_size=8).state_dict(), "t.pth")
        options = ["--distillation-type", "hard", "--teacher-model", "deit_micro_patch4_32", "--teacher-path", "t.pth"]
        fails([*TINY, *options], "needs a model with a distillation token", capsys)

    def test_a_teacher_that_does_not_fit(self, capsys):
        torch.save(timm.create_model("deit_micro_patch4_32", img_size=32, num_classes=7).state_dict(), "seven.pth")
        options = ["--model", "deit_tiny_distilled_patch16_224", "--input-size", "32", "--distillation-type", "hard"]
        teacher = ["--teacher-model", "deit_micro_patch4_32", "--teacher-path", "seven.pth"]
        fails([*TINY, *options, *teacher], "--teacher-path seven.pth does not fit the model", capsys)
        teacher = ["--teacher-model", "x", "--teacher-path", "y"]
        fails([*TINY, *options, *teacher], "--teacher-model must be a model of timm", capsys)

    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_a_broken_image_is_named(self, workers, folder, capsys):
        (folder / "train" / "dark" / "3.png").write_bytes(b"no image")
        options = ["--data-set", "FOLDER", "--data-path", str(folder), "--batch-size", "2", "--input-size", "8"]
        options += ["--model", "deit_micro_patch4_32", "--num-workers", workers, "--repeats", "1", "--device", "cpu"]
        assert main([*options, "--epochs", "1", "--output-dir", "out"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(r"main.py: error: \S+3\.png is not a readable image", error)

    def test_a_finished_run_has_nothing_to_do(self, capsys):
        assert main([*TINY, "--epochs", "1", "--output-dir", "out"]) == 0
        assert main([*TINY, "--epochs", "1", "--resume", "out/checkpoint.pth", "--output-dir", "other"]) == 0
        assert "all its 1 epochs done" in capsys.readouterr().out and not Path("other").exists()

    def test_a_loss_that_is_not_finite(self, capsys):
        assert main([*TINY, "--lr", "1e30", "--epochs", "5", "--output-dir", "out"]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(r"diverged: .* not finite in 10 steps .* epoch 4, step 2, learning rate [\d.e+]+, loss", error)
        assert error.endswith("lower --lr, lengthen --warmup-epochs, or look at the data")


@pytest.mark.compiles
def test_a_compiled_run_is_a_run_like_any_other(monkeypatch, capsys):
    """The graph without the code generator, which takes minutes: same keys, same numbers, resumable uncompiled."""
    compile_module, build = torch.nn.Module.compile, setup.build_model
    compiled = []

    def build_one_block(*arguments, **options):
        model = build(*arguments, **options)
        model.blocks = model.blocks[:1]
        return model

    def without_code_generator(module):
        compiled.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_code_generator)
    monkeypatch.setattr(setup, "build_model", build_one_block)
    options = [*TINY, "--epochs", "1"]
    assert main([*options, "--output-dir", "eager"]) == main([*options, "--compile", "--output-dir", "graph"]) == 0
    assert len(compiled) == 1
    eager, graph = (torch.load(f"{name}/checkpoint.pth", weights_only=True)["model"] for name in ("eager", "graph"))
    assert eager.keys() == graph.keys()
    for name, value in eager.items():
        assert torch.allclose(value, graph[name], rtol=1e-3, atol=1e-4), name
    assert main([*options, "--resume", "graph/checkpoint.pth"]) == 0
    assert "has all its 1 epochs done" in capsys.readouterr().out


def test_lost_groups_are_logged(capsys):
    assert main([*TINY, "--epochs", "1", "--output-dir", "out"]) == 0
    assert json.loads(Path("out/log.txt").read_text().splitlines()[0])["lost_groups"] == 0
    row = {"epoch": 0, "train_loss": 1, "test_loss": 1, "test_acc1": 1, "test_acc5": 1, "img_per_s": 1, "lr": 1}
    row |= {"skipped_steps": 0, "bad_images": 0}
    assert table_row(row | {"lost_groups": 1234}, 1).endswith("1,234 groups out of FP8's range became zero")


def test_options_are_these():
    """An option is a promise: a change of them is one of this list, the README and a test. Remedies may be added."""
    options = {text for action in build_parser()._actions for text in action.option_strings if text.startswith("--")}
    of_remedies = {flag(f.name) for one in REMEDIES.values() for f in fields(one.options)}
    assert of_remedies >= set(
        """--q-ema --q-ema-beta --q-ramping --q-ramping-k1 --q-ramping-k2 --q-ramping-steps --dampen --dampen-reduction
        --freeze --osci-reset --osci-reset-interval --osci-reset-window --osci-reset-threshold --osci-reset-start --heal
        --keep-blocks""".split()
    )
    assert options - of_remedies == set(
        """--help --quant --model --drop-path --finetune --data-set --data-path --download --num-classes --input-size
        --num-workers --repeats --aa --color-jitter --reprob --mixup --cutmix --epochs --batch-size --lr --min-lr
        --warmup-lr --warmup-epochs --weight-decay --smoothing --model-ema-decay --seed --distillation-type
        --distillation-alpha --distillation-tau --teacher-model --teacher-path --device --output-dir --resume --eval
        --matmul --compile --cuda-graph --clip-grad --track-oscillation --quantizers --backward-rounding
        --backward-operands --scaling --forward-element --backward-element --bad-images
        --save-epochs --save-steps --keep-checkpoints --deterministic
        --accumulate-steps --checkpoint-activations --keep-last-batch --fsdp --check-ranks
        --pretrained --weights --mean --std --exif-orientation --warmup-prefix --no-warmup-prefix
        --augment-on""".split()
    )


@pytest.mark.parametrize(("rounding", "operands", "scaling"), TABLE_5)
def test_switches_make_the_rows_of_table_5(rounding, operands, scaling):
    switches = ["--backward-rounding", rounding, "--backward-operands", operands, "--scaling", scaling]
    forward, backward = Quantizer(scaling=scaling), Quantizer(scaling=scaling, rounding=rounding)
    wanted = Recipe(forward, forward, *[backward] * 4, double=operands == "double")
    for quant in ("mxfp4", "tetrajet", "microscaling"):
        assert build_recipe(parse_args(["--quant", quant, *switches]).precision) == wanted


def test_switches_make_the_other_tables():
    def made(*switches):
        return build_recipe(parse_args(["--quant", "mxfp4", *switches]).precision)

    off, e3m0 = Quantizer(enabled=False), Quantizer(element="e3m0")
    assert made("--quantizers", "q6,q5,q4,q3") == replace(Recipe(), q1=off, q2=off)  # Table 6
    assert made("--forward-element", "e3m0") == replace(Recipe(), q1=e3m0, q2=e3m0)  # Table 7
    backward = Quantizer(element="e3m0", rounding="stochastic")
    assert made("--backward-element", "e3m0") == Recipe(Quantizer(), Quantizer(), *[backward] * 4)
    assert made("--quantizers", "q2") == Recipe().with_only(["q2"])
    assert made() == RECIPES["tetrajet"]


def test_defaults_are_deits_recipe_on_imagenet():
    values = parse_args(["--data-set", "IMNET", "--data-path", "x"]).flat()
    wanted = {"model": "deit_small_patch16_224", "epochs": 90, "batch_size": 256, "lr": 5e-4, "min_lr": 1e-5}
    wanted |= {"warmup_lr": 1e-6, "warmup_epochs": 5, "weight_decay": 0.05, "drop_path": 0.1, "smoothing": 0.1}
    wanted |= {"mixup": 0.8, "cutmix": 1.0, "aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "reprob": 0.25}
    wanted |= {"repeats": 3, "model_ema_decay": 0.99996, "q_ema_beta": 0.998, "q_ramping_k1": 16, "q_ramping_k2": 5}
    wanted |= {"clip_grad": 0.0}
    assert {name: values[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("model", "drop_path"),
    [
        ("swin_tiny_patch4_window7_224", 0.2),
        ("swin_small_patch4_window7_224", 0.3),
        ("swin_base_patch4_window7_224", 0.5),
    ],
)
def test_defaults_of_swin_on_imagenet(model, drop_path):
    """Liu et al. 2021, A2.1; 90 epochs instead of 300. What they share with DeiT is DeiT's."""
    deit, swin = (
        parse_args(["--data-set", "IMNET", "--data-path", "x", *options]).flat() for options in ([], ["--model", model])
    )
    different = {name: value for name, value in swin.items() if value != deit[name]}
    wanted = {"model": model, "warmup_epochs": 20, "warmup_prefix": True, "clip_grad": 5.0, "drop_path": drop_path}
    assert different == wanted | {"repeats": 1, "model_ema_decay": 0.0}


def test_the_users_options_come_before_the_data_sets_and_those_before_the_models():
    swin = ["--model", "swin_tiny_patch4_window7_224"]
    values = parse_args(swin).flat()  # DIGITS
    assert [values[name] for name in ("clip_grad", "warmup_epochs", "drop_path", "weight_decay")] == [5.0, 2, 0.0, 0.05]
    values = parse_args([*swin, "--clip-grad", "0", "--warmup-epochs", "7"]).flat()
    assert [values[name] for name in ("clip_grad", "warmup_epochs", "drop_path")] == [0.0, 7, 0.0]
    assert parse_args([]).training.clip_grad == 0.0  # the model of DIGITS is a DeiT


def test_checkpoint_is_written_in_one_piece(monkeypatch, capsys):
    """A crash while writing the second checkpoint leaves the first."""
    save = torch.save

    def crash(state, path):
        if state["epoch"] == 1:
            return save(state, path)
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", crash)
    assert main([*TINY, "--output-dir", "out"]) == 2
    assert capsys.readouterr().err.strip().endswith("main.py: error: disk full")
    assert torch.load("out/checkpoint.pth", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs SIZE and VARIANT, such as small mxfp4, got 0 arguments"),
        (["huge", "mxfp4"], "SIZE must be tiny, small, base, swin_tiny or swin_small, got huge"),
        (["small", "fp4"], "VARIANT must be mxfp4, mxfp4_q_ema or mxfp4_q_ramping, got fp4"),
    ],
)
def test_a_script_called_wrongly(arguments, message):
    script = Path(program.__file__).parent / "scripts" / "train.sh"
    result = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == f"train.sh: error: {message}\n"


def test_a_script_with_a_wrong_number_of_gpus():
    script = Path(program.__file__).parent / "scripts" / "train.sh"
    for number in ("none", "0", "-1"):
        command, env = ["bash", script, "small", "mxfp4"], os.environ | {"NUM_GPUS": number}
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        assert result.returncode == 2 and f"NUM_GPUS must be a whole number from 1 on, got {number};" in result.stderr


def test_without_drop_path_no_model_has_stochastic_depth():
    """Swin's own default is another; a model that has none takes 0."""
    for name in ("swin_tiny_patch4_window7_224", "deit_micro_patch4_32"):
        model = build_model(name, 10, 224, 0.0, RECIPES["none"])
        assert not any(isinstance(module, DropPath) and module.drop_prob for module in model.modules())
        model = build_model(name, 10, 224, 0.2, RECIPES["none"])
        assert any(isinstance(module, DropPath) and module.drop_prob for module in model.modules())
    assert build_model("repvit_m0_9", 10, 224, 0.0, RECIPES["none"]).num_classes == 10


def test_a_model_with_a_number_as_its_patch_size():
    assert build_model("xcit_nano_12_p8_224", 10, 224, 0.0, RECIPES["none"]).num_classes == 10


OPTIMIZED = {
    "deit_micro_patch4_32": ["--input-size", "8", "--quant", "none"],
    "deit_nano_patch4_32": ["--input-size", "8", "--quant", "mxfp4", "--q-ema", "--q-ramping"],
    "vit_tiny_patch16_224": ["--input-size", "32", "--quant", "int4"],
    "deit_tiny_distilled_patch16_224": ["--input-size", "32", "--quant", "mxfp4", "--q-ramping"],
    "swin_tiny_patch4_window7_224": ["--input-size", "224", "--quant", "mxfp4"],
}


@pytest.mark.parametrize("name", OPTIMIZED)
def test_weights_of_linears_and_of_the_patch_embedding_decay_and_nothing_else(name):
    """Biases, norms, tokens, position embeddings and the step sizes of INT4 do not decay. Other settings are DeiT's."""
    given = ["--lr", "0.004", "--weight-decay", "0.07", "--batch-size", "96", "--device", "cpu"]
    options = parse_args(["--model", name, *OPTIMIZED[name], *given])
    model = build_model(name, 10, options.data.input_size, 0.0, build_recipe(options.precision))
    remedies = Remedies.from_options(options.remedies, RunLength(1, 1))
    optimizer = build_optimizer(options, model, torch.device("cpu"), remedies.optimizer_class)
    assert type(optimizer) is (RampingAdamW if "--q-ramping" in OPTIMIZED[name] else torch.optim.AdamW)

    layers = [layer for layer, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    wanted = {name: 0.0 for name, _ in model.named_parameters()} | {f"{layer}.weight": 0.07 for layer in layers}
    names = {p: parameter for parameter, p in model.named_parameters()}
    decays = [(names[p], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(decays) == len(names)  # each parameter once
    assert {name: decay for name, decay in decays if decay != wanted[name]} == {}
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.004 * 96 / 512, rel=1e-12)
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
        assert not group.get("amsgrad") and not group.get("maximize")


@pytest.mark.usefixtures("few_digits")
def test_the_first_step_of_a_run_is_adamws_in_float64():
    """AdamW's first step is w (1 - lr decay) - lr g / (|g| + eps), with the gradient g of the smoothed loss over all
    images and the learning rate scaled by the batch size."""
    options = ["--epochs", "1", "--batch-size", "24", "--lr", "0.01", "--weight-decay", "4", "--smoothing", "0.2"]
    assert main([*TINY, "--quant", "none", *options, "--output-dir", "out"]) == 0
    torch.manual_seed(0)
    model = timm.create_model("deit_micro_patch4_32", img_size=8, num_classes=10).double()
    (images, labels), _ = digits()
    smoothed = 0.8 * F.one_hot(labels, 10) + 0.02
    loss = -(smoothed * model(images.double()).log_softmax(dim=1)).sum(dim=1).mean()
    loss.backward()
    assert lines_of(Path("out/log.txt"))[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    saved, lr = load("out/checkpoint.pth")["model"], 0.01 * 24 / 512
    for name, w in model.named_parameters():
        decay = 4.0 if w.ndim > 1 and name not in ("cls_token", "pos_embed") else 0.0
        wanted = w.detach() * (1 - lr * decay) - lr * w.grad / (w.grad.abs() + 1e-8)
        clear = w.grad.abs() > 1e-5
        assert clear.any() and torch.allclose(saved[name].double()[clear], wanted[clear], rtol=0, atol=0.01 * lr), name
