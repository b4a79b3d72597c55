"""The examples of docs/extending.md, applied to a copy of the repository, pass their own tests there."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantization import REMEDIES
from quantization.remedies.base import go_together

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENT = (REPOSITORY / "docs/extending.md").read_text(encoding="utf-8")
ROOMS = ("quantization", "timm", "runtime", "data", "tracking", "training", "tests")
SECTIONS = {title: text for title, _, text in (part.partition("\n") for part in DOCUMENT.split("\n## ")[1:])}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def apply_diff(diff: str, root: Path) -> None:
    """Each hunk's old lines stand in the file exactly once; no line numbers are needed."""
    for part in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
        name, hunk = re.match(r"(\S+)\n\+\+\+ b/\1\n@@\n(.*)", part, re.DOTALL).groups()
        lines = hunk.splitlines()
        old, new = ("".join(line[1:] + "\n" for line in lines if line[:1] != sign) for sign in "+-")
        content = (root / name).read_text(encoding="utf-8")
        assert content.count(old) == 1, f"{name} has these lines {content.count(old)} times:\n{old}"
        (root / name).write_text(content.replace(old, new), encoding="utf-8")


@pytest.fixture
def copy(tmp_path) -> Path:
    root = tmp_path
    for name in ROOMS:
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("main.py", "engine.py", "datasets.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, root)
    return root


def add(title: str, root: Path) -> list[str]:
    """Apply the examples of a section; returns its test files."""
    written = []
    for block in blocks(SECTIONS[title], "python"):
        path = re.match(r"# (\S+)\n", block)[1]
        assert not (root / path).exists(), f"{path} is in the repository"
        (root / path).write_text(block, encoding="utf-8")
        written.append(path)
    for diff in blocks(SECTIONS[title], "diff"):
        apply_diff(diff, root)
    return [path for path in written if path.startswith("tests/")]


def run_tests(root: Path, paths: list[str]) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_examples_pass_their_tests(copy):
    """All of them at once, in groups of 16, which takes one start of Python."""
    tests = [path for title in SECTIONS for path in add(title, copy)]
    assert len(SECTIONS) == len(tests) == 6
    tests.append("tests/quantization/test_imports.py::test_every_file_has_its_place")
    assert "10 passed" in run_tests(copy, tests)


@pytest.mark.parametrize(("title", "row"), [("A remedy", "a remedy for oscillation"), ("A data set", "a data set")])
def test_one_file_of_code_and_one_test_file(title, row):
    """And the table has the number of its lines that are not empty."""
    code, test = blocks(SECTIONS[title], "python")
    assert code.startswith("# quantization/") or code.startswith("# data/")
    assert test.startswith("# tests/") and not blocks(SECTIONS[title], "diff")
    lines = sum(bool(line.strip()) for line in code.splitlines())
    cells = re.search(rf"^\| \[{row}\].*$", DOCUMENT, re.MULTILINE)[0].split("|")
    assert int(cells[3]) == lines


def test_the_table_of_what_goes_together_is_the_registrys():
    def flag(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    wanted = []
    for name, one in REMEDIES.items():
        others = [other for other in REMEDIES if other != name and go_together(name, other)]
        together = "all others" if len(others) == len(REMEDIES) - 1 else ", ".join(map(flag, others))
        wanted.append(f"| {flag(name)} | {together} | {'yes' if one.can_shard else 'no'} |")
    rows = re.findall(r"^\| --\w.*$", DOCUMENT, re.MULTILINE)
    assert len(rows) >= 7 and sorted(rows) == sorted(wanted)


def test_every_file_that_is_named_exists():
    names = set(re.findall(r"`((?:[a-z_]+/)*[a-z_0-9]+\.(?:py|md))`", DOCUMENT))
    assert len(names) > 15 and not [name for name in names if not (REPOSITORY / name).is_file()]


def names_in(path: Path) -> set[str]:
    """The names that a Python file defines at any depth: functions, classes, arguments, variables, attributes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.keyword):
            found.add(node.arg)
    return found


TABLE_OF_CHANGES = DOCUMENT.partition("| to change | open |\n| --- | --- |\n")[2].partition("\n\n")[0]
CHANGES = re.findall(r"^\| (.+?) \| (.*) \|$", TABLE_OF_CHANGES, re.MULTILINE)
PYTHON_FILE = re.compile(r"(?:[a-z_]+/)*[a-z_0-9]+\.py")
USED = {"swap_linears", "multiply", "state_dict", "param_groups_weight_decay"}
"""Names that the files of a row use without defining them."""


@pytest.mark.parametrize(("change", "answer"), CHANGES, ids=[change[:40] for change, _ in CHANGES])
def test_what_the_table_names_is_in_the_files_of_its_row(change, answer):
    quoted = re.findall(r"`([^`]+)`", answer)
    files = [REPOSITORY / text for text in quoted if PYTHON_FILE.fullmatch(text)]
    names = {text for text in quoted if re.fullmatch(r"[A-Za-z_]\w*", text)} - {"other", "q_ema_beta"}
    assert files and all(file.is_file() for file in files)
    known = set().union(*map(names_in, files))
    assert names - USED <= known, f"{change}: {names - USED - known}"
    for name in names & USED:
        assert any(name in file.read_text(encoding="utf-8") for file in files), f"{change}: {name}"


def test_the_table_of_changes_is_read():
    assert len(CHANGES) > 15 and sum(len(re.findall("`", answer)) for _, answer in CHANGES) > 60
