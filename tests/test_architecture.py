"""The imports point one way: from main.py down to quantization/, without a cycle."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = (
    *("quantization", "timm", "runtime", "data", "datasets", "tracking", "engine", "training", "main"),
    *("reproduction", "benchmarks"),
)
"""From the lowest to the highest: a module imports from its own room and from those before it."""


def modules() -> dict[str, Path]:
    """The repository's modules by their dotted names."""
    paths = [path for path in REPOSITORY.rglob("*.py") if path.relative_to(REPOSITORY).parts[0].split(".")[0] in ROOMS]
    names = {path: ".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


MODULES = modules()


def without_type_checking(tree: ast.Module) -> list[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, which are never executed."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            found += [node, *without_type_checking(node)]
    return found


def imported_by(name: str) -> set[str]:
    """Modules of this repository that a module imports, also within its functions."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in without_type_checking(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return {module for module in found if module in MODULES} - {name}


IMPORTS = {name: imported_by(name) for name in MODULES}


def test_the_modules_are_found():
    assert {"main", "engine", "quantization.linear", "training.setup", "runtime.errors"} <= MODULES.keys()
    assert {"training.setup", "runtime.processes"} <= IMPORTS["main"]
    assert "quantization.formats" in IMPORTS["quantization.reference"]


def test_imports_have_no_cycle():
    inside = {name: used for name, used in IMPORTS.items() if MODULES[name].name != "__init__.py"}
    tuple(TopologicalSorter(inside).static_order())  # raises CycleError, which names the modules


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_those_below_it(room):
    level = ROOMS.index(room)
    for name in (name for name in MODULES if name.split(".")[0] == room):
        above = [used for used in IMPORTS[name] if ROOMS.index(used.split(".")[0]) > level]
        assert not above, f"{name} imports {above[0]}, which is above {room}"


def test_only_these_modules_stand_at_the_top():
    """Names at the top level collide with other packages, so everything else has a room."""
    assert sorted(path.name for path in REPOSITORY.glob("*.py")) == ["datasets.py", "engine.py", "main.py"]


def test_a_checkpoint_is_read_without_what_only_some_runs_need():
    script = "import sys, training.checkpoint; print({'sklearn', 'tensorboardX'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "set()\n"), result.stderr
