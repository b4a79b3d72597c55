"""The package `tetrajet`: what the wheel holds, and that it works without this repository beside stock packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import quantization

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = {path.relative_to(REPOSITORY / "quantization") for path in (REPOSITORY / "quantization").rglob("*.py")}
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
CLEAN = """
import datasets, importlib, pkgutil, sys
import tetrajet, timm, torch

assert tetrajet.__file__.startswith(sys.argv[1]), tetrajet.__file__
assert datasets.NAME == "not ours" and "quantization" not in sys.modules and not hasattr(timm, "_overlay")
names = [m.name for m in pkgutil.walk_packages(tetrajet.__path__, "tetrajet.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names), torch.float4_e2m1fn_x2 is not None)

name, options = "deit_tiny_patch16_224", {"depth": 1, "img_size": 32, "num_classes": 3}
model = tetrajet.create_model(name, tetrajet.Recipe(), **options)
optimizer = tetrajet.RampingAdamW(model.parameters(), lr=1e-3)
images = torch.randn(4, 3, 32, 32)
before = model.blocks[0].mlp.fc1.weight.clone()
torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
optimizer.step()
assert not torch.equal(before, model.blocks[0].mlp.fc1.weight)
tetrajet.export_model(model.eval(), sys.argv[3] + "/exported", "compressed-tensors", name, **options)
with torch.no_grad():
    assert torch.equal(tetrajet.load(sys.argv[3] + "/exported")(images), model(images))

import quantization  # another project's: it lies on the path
assert quantization.NAME == "theirs"
del sys.modules["quantization"]
sys.path = [sys.argv[2]] + [entry for entry in sys.path if entry != sys.argv[3]]
import quantization.mx, quantization.remedies.q_ema as q_ema
assert quantization is tetrajet and quantization.mx is tetrajet.mx and q_ema.QEma is tetrajet.QEma
assert tetrajet.mx.__spec__.name == "tetrajet.mx" and callable(quantization.coverage)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the tree, unpacked as pip does it."""
    directory = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, directory / name)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "quantization", directory / "quantization", ignore=ignore)
    command = [sys.executable, "-c", BUILD, str(directory)]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (built,) = directory.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(directory / "installed")
    return directory / "installed"


def test_the_wheel_holds_one_package_with_every_file(wheel):
    assert {path.relative_to(wheel / "tetrajet") for path in (wheel / "tetrajet").rglob("*.py")} == SOURCES
    assert sorted(path.name.partition("-")[0] for path in wheel.iterdir()) == ["tetrajet", "tetrajet"]


def test_it_works_without_this_repository_beside_packages_of_the_names_used_here(wheel, tmp_path):
    """Every subpackage imports; a stock DeiT trains, is exported and loads; another `quantization` stays what it is."""
    for name, own in (("datasets", "not ours"), ("quantization", "theirs")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"NAME = {own!r}\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(wheel), str(tmp_path)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CLEAN, str(wheel), str(REPOSITORY), str(tmp_path)]
    result = subprocess.run(command, cwd=wheel, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) >= len(SOURCES) - 2


def test_both_names_lead_to_the_same_modules():
    import tetrajet
    import tetrajet.coverage
    import tetrajet.remedies.heal as heal

    assert tetrajet is quantization and heal is sys.modules["quantization.remedies.heal"]
    assert quantization.__spec__.name == "quantization" and heal.__spec__.name == "quantization.remedies.heal"
    assert callable(quantization.coverage), "the import of a submodule took the place of the function of its name"
    with pytest.raises(ModuleNotFoundError, match="tetrajet.no_such"):
        import tetrajet.no_such  # noqa: F401
