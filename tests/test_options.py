"""Every option of main.py is read by the program and met by a test; the plainest of them change what a run logs."""

from __future__ import annotations

import ast
import json
from functools import cache
from pathlib import Path

import pytest

from main import main
from options import build_parser

REPOSITORY = Path(__file__).resolve().parent.parent
OPTIONS = {action.dest: action.option_strings[-1] for action in build_parser()._actions if action.dest != "help"}
# Where options are checked and defaults filled in: to be read there alone is to have no effect on a run.
CHECKS = ("build_parser", "parse_args", "check_low_precision", "check_nothing_in_vain", "check_processes")
# Tests that name all options, whatever they are for.
LISTS = ("test_options_are_these", "test_fuzz.py")


@cache
def read_options() -> set[str]:
    """Options that a function of main.py or options.py other than the checks reads from `args`."""
    trees = [ast.parse((REPOSITORY / name).read_text(encoding="utf-8")) for name in ("main.py", "options.py")]
    functions = [node for tree in trees for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    nodes = [node for function in functions if function.name not in CHECKS for node in ast.walk(function)]
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
        if isinstance(node.ctx, ast.Load)
    }


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
    assert name in read_options(), f"{OPTIONS[name]} is parsed, but nothing that trains or evaluates reads it"


@pytest.mark.parametrize("option", OPTIONS.values())
def test_an_option_is_tested(option):
    assert option in words_in_tests(), f"no test gives {option}"


def test_every_option_has_a_help():
    assert all(action.help for action in build_parser()._actions)


RUN = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "718", "--device", "cpu"]
EFFECTS = {  # an option with another value than its default, and a number of log.txt that it changes
    "--min-lr": ("0.01", "lr"),
    "--warmup-lr": ("0.01", "lr"),
    "--weight-decay": ("5", "test_loss"),
    "--smoothing": ("0.3", "train_loss"),
    "--color-jitter": ("0.9", "train_loss"),
    "--reprob": ("1", "train_loss"),
    "--seed": ("3", "train_loss"),
}


def logged(directory: Path, *options: str) -> list[dict]:
    assert main([*RUN, *options, "--output-dir", str(directory)]) == 0
    return [json.loads(line) for line in (directory / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> list[dict]:
    return logged(tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("option", EFFECTS)
def test_another_value_makes_another_run(option, usual, tmp_path):
    value, number = EFFECTS[option]
    assert [line[number] for line in logged(tmp_path, option, value)] != [line[number] for line in usual]


def test_another_k1_makes_other_periods(tmp_path):
    """Ratios over a thousandth: every weight that moved over a step is given the longest period, two steps."""
    ramping = ["--quant", "mxfp4", "--q-ramping", "--q-ramping-steps", "1"]
    periods = [
        logged(tmp_path / k1, *ramping, "--q-ramping-k1", k1)[1]["mean_period"] for k1 in ("0.001", "1000000000")
    ]
    assert periods[0] > 1 == periods[1]
