"""Every option of main.py is read by the program and met by a test; the plainest of them change what a run logs."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch

from main import main
from quantization import REMEDIES, Recipe, Remedies, RunLength
from runtime.errors import UserError
from training.option_rules import RECIPE_SWITCHES
from training.options import FIELDS, SAME_ON_RESUME, LowPrecisionOptions, build_parser, flag, parse_args
from training.setup import build_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = {action.dest: action.option_strings[-1] for action in build_parser()._actions if action.dest != "help"}
# Tests that name all options, whatever they are for.
LISTS = ("test_options_are_these", "test_fuzz.py")


@cache
def read_options() -> set[str]:
    """Options that the code which trains or evaluates reads: those that are only parsed and checked have no effect."""
    paths = [
        path for path in (REPOSITORY / "training").glob("*.py") if path.name not in ("options.py", "option_rules.py")
    ]
    paths += (REPOSITORY / "quantization/remedies").glob("*.py")
    nodes = [node for path in (*paths, REPOSITORY / "main.py") for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


@cache
def words_in_tests() -> set[str]:
    """Every option that stands in a string of a test, but for the tests that name them all."""
    words = set()
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        if path.name in LISTS:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if getattr(node, "name", "") not in LISTS]
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.update(node.value.split())
    return words


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_has_an_effect(name):
    assert name in read_options() | REMEDIES.keys(), f"{OPTIONS[name]} is parsed, but nothing reads it"


@pytest.mark.parametrize("option", OPTIONS.values())
def test_an_option_is_tested(option):
    assert option in words_in_tests(), f"no test gives {option}"


def test_every_switch_of_a_recipe_is_known_as_one():
    """`--quant` chooses the recipe, and the last two of the group leave it as it is; all other options change it."""
    group = {f.name for f in fields(LowPrecisionOptions)}
    assert set(RECIPE_SWITCHES) == group - {"quant", "matmul", "track_oscillation"}
    assert len(RECIPE_SWITCHES) == len(set(RECIPE_SWITCHES)) == 6


def test_a_help_that_quotes_its_default_quotes_the_fields():
    for name, field in FIELDS.items():
        text = field.metadata["help"]
        quoted = re.search(r"\(?default: ([\w.]+)\)?$", text) if isinstance(text, str) else None
        assert not isinstance(text, str) or "{" not in text, name
        if quoted and not field.metadata.get("own_default") and field.default not in (None, "auto"):
            numeric = isinstance(field.default, (int, float)) and not isinstance(field.default, bool)
            assert (float(quoted[1]) if numeric else quoted[1]) == field.default, name


def test_every_option_has_a_help():
    assert all(action.help for action in build_parser()._actions)


RUN = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "72", "--lr", "0.3", "--device", "cpu"]
EFFECTS = {  # an option with another value than its default, and a number of log.txt that it changes
    "--min-lr": ("0.01", "lr"),
    "--warmup-lr": ("0.01", "lr"),
    "--weight-decay": ("5", "test_loss"),
    "--smoothing": ("0.3", "train_loss"),
    "--color-jitter": ("0.9", "train_loss"),
    "--reprob": ("1", "train_loss"),
    "--seed": ("3", "train_loss"),
}


@pytest.fixture(scope="module")
def small_runs(digits_cut_to):
    """Epochs of two steps."""
    with digits_cut_to(150, 36):
        yield


def logged(directory: Path, *options: str) -> list[dict]:
    assert main([*RUN, *options, "--output-dir", str(directory)]) == 0
    return [json.loads(line) for line in (directory / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def usual(tmp_path_factory, small_runs) -> list[dict]:
    return logged(tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("option", EFFECTS)
def test_another_value_makes_another_run(option, usual, tmp_path):
    value, number = EFFECTS[option]
    assert [line[number] for line in logged(tmp_path, option, value)] != [line[number] for line in usual]


def test_another_k1_makes_other_periods(tmp_path, small_runs):
    """Ratios over a thousandth: every weight that moved over a step is given the longest period, two steps."""
    ramping = ["--quant", "mxfp4", "--q-ramping", "--q-ramping-steps", "1"]
    periods = [
        logged(tmp_path / k1, *ramping, "--q-ramping-k1", k1)[1]["mean_period"] for k1 in ("0.001", "1000000000")
    ]
    assert periods[0] > 1 == periods[1]


def test_defaults_that_papers_give():
    """TetraJet's detection and Q-EMA, TetraJet-v2's OsciReset, DeiT's soft distillation."""
    mxfp4 = parse_args(["--quant", "mxfp4", "--q-ema", "--q-ramping"]).remedies
    assert (mxfp4.q_ema_beta, mxfp4.q_ramping_k1, mxfp4.q_ramping_k2, mxfp4.q_ramping_steps) == (0.998, 16, 5, 30)
    reset = parse_args(["--quant", "mxfp4", "--osci-reset"]).remedies
    assert (reset.osci_reset_threshold, reset.osci_reset_start, reset.osci_reset_interval) == (16, 0.6, None)
    student = parse_args(["--distillation-type", "soft", "--teacher-model", "x", "--teacher-path", "y"]).distillation
    assert (student.distillation_alpha, student.distillation_tau) == (0.5, 1.0)


def test_remedies_that_do_not_act_on_q2_need_none():
    options = parse_args(["--quant", "mxfp4", "--quantizers", "q1", "--heal", "1", "--keep-blocks", "0"])
    assert (options.remedies.heal, options.remedies.keep_blocks) == (1, (0,))


ZEROS = {
    "--q-ema-beta": ["--quant", "mxfp4", "--q-ema"],
    "--q-ramping-k2": ["--quant", "mxfp4", "--q-ramping"],
    "--osci-reset-start": ["--quant", "mxfp4", "--osci-reset"],
    "--dampen": ["--quant", "mxfp4"],
    "--distillation-alpha": ["--distillation-type", "hard", "--teacher-model", "x", "--teacher-path", "y"],
    "--warmup-epochs": [],
    "--smoothing": [],
    "--num-workers": ["--data-set", "IMNET"],
    "--model-ema-decay": ["--data-set", "IMNET"],
}


@pytest.mark.parametrize("option", ZEROS)
def test_zero_is_a_value_of_its_own(option):
    """Not the default, which is another number."""
    assert parse_args([*ZEROS[option], option, "0"]).flat()[option[2:].replace("-", "_")] == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--quantizers", "q1"),
        ("--backward-rounding", "nearest"),
        ("--backward-operands", "direct"),
        ("--scaling", "floor"),
        ("--forward-element", "e3m0"),
        ("--backward-element", "e3m0"),
    ],
)
@pytest.mark.parametrize("quant", ["none", "int4"])
def test_a_switch_of_a_recipe_is_never_ignored(option, value, quant):
    with pytest.raises(UserError, match=f"^{option} changes an MXFP4 recipe, got --quant {quant}"):
        parse_args(["--quant", quant, option, value])


def test_the_recipe_has_the_users_beta():
    options = parse_args(["--quant", "mxfp4", "--q-ema", "--q-ema-beta", "0.75"])
    remedies = Remedies.from_options(options.remedies, RunLength(1, 1))
    assert remedies.change_recipe(build_recipe(options.precision)) == Recipe(q_ema_beta=0.75)


@pytest.mark.parametrize("options", [["--mixup", "0.8"], ["--cutmix", "1"]])
def test_images_that_are_mixed_come_in_pairs(options):
    with pytest.raises(UserError, match="^Mixup and CutMix pair images, so --batch-size must be even, got 7"):
        parse_args(["--batch-size", "7", *options])


def test_a_model_of_the_users_choice_has_its_own_input_size():
    """The data set's goes with the data set's model."""
    fashion, other = ["--data-set", "FASHION"], ["--model", "deit_tiny_patch16_224"]
    assert parse_args(fashion).data.input_size == 32
    assert parse_args([*fashion, *other]).data.input_size is None
    assert parse_args([*fashion, *other, "--input-size", "64"]).data.input_size == 64


@pytest.mark.parametrize("stored", ["options", "identity"])
def test_an_evaluation_does_not_ask_for_what_only_training_needs(stored, tmp_path):
    """A student's checkpoint names no file of a teacher, and data that was downloaded is not downloaded again."""
    student = {"model": "deit_tiny_distilled_patch16_224", "input_size": 32, "data_set": "CIFAR10", "data_path": "x"}
    student |= {"distillation_type": "soft", "teacher_model": "deit_micro_patch4_32", "batch_size": 5}
    if stored == "options":
        content = {"options": student | {"download": True}}
    else:
        identity = {flag(name): value for name, value in student.items() if name in SAME_ON_RESUME}
        content = {"identity": identity | {"model": student["model"], "input size": 32, "recipe": "tetrajet"}}
    torch.save(content, tmp_path / "checkpoint.pth")
    options = parse_args(["--eval", "--resume", str(tmp_path / "checkpoint.pth"), "--data-path", "y"])
    assert (options.model.model, options.data.input_size, options.training.batch_size) == (student["model"], 32, 5)
    assert (options.data.data_path, options.data.download, options.distillation.distillation_type) == (
        "y",
        False,
        "none",
    )
