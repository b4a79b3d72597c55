"""Inside `quantization/`, imports point one way: each file imports only from files before it, folders likewise."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import quantization

ROOT = Path(quantization.__file__).parent
REMEDIES = sorted(
    path.stem for path in (ROOT / "remedies").glob("*.py") if path.stem not in ("__init__", "base", "cosine")
)
"""The files that a user adds: each may import everything before them, but no other remedy."""
ORDER = (
    *("shared_name", "formats", "recipe", "option_fields", "philox", "reference", "adamw_update"),
    *("triton.multi_tensor", "triton.tiles", "triton.rounding", "triton.philox", "triton.amax", "triton.rows"),
    *("triton.columns", "triton.kernels", "triton.adamw", "triton.lerp"),
    *("operators", "mx", "mx_file", "matmul", "shards", "averages", "baselines.int4", "linear"),
    *("families.base", "families.torch_modules", "families.torchvision_models", "families.timm_models"),
    *("swap", "weight_cache", "coverage", "create"),
    *("measures.latent", "measures.oscillation"),
    *("optim.step_count", "optim.rewound", "optim.ramping"),
    *("remedies.base", "remedies.nagel_schedule", *(f"remedies.{name}" for name in REMEDIES)),
    *("export.description", "export.trained", "export.packing", "export.stored_weight"),
    *("export.compressed_file", "export.torchao_file", "export.onnx_file"),
    *("export.writing", "export.load", "export.__main__"),
)


def own_imports(name: str) -> set[str]:
    """The files of the package that a file imports, those within functions included."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / (name.replace(".", "/") + ".py")).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "quantization" for alias in node.names), name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] != "quantization", name
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: len(name.split(".")) - node.level]
            base = ".".join([*package, *([node.module] if node.module else [])])
            inner = [".".join(filter(None, (base, alias.name))) for alias in node.names]
            found |= {module if module in ORDER else base for module in inner}
    return found


def test_every_file_has_its_place():
    files = {path.relative_to(ROOT).with_suffix("") for path in ROOT.rglob("*.py") if path.name != "__init__.py"}
    assert {".".join(path.parts) for path in files} == set(ORDER)


def test_the_imports_are_found():
    assert own_imports("operators") == {"reference", "formats", "recipe", "triton.kernels"}
    assert own_imports("remedies.q_ema") >= {"swap", "optim.step_count", "averages", "remedies.base"}
    assert own_imports("averages") == {"operators", "triton.lerp", "triton.multi_tensor"}


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_those_before_it(name):
    before = ORDER.index(name if name.rpartition(".")[2] not in REMEDIES else f"remedies.{REMEDIES[0]}")
    assert own_imports(name) <= set(ORDER[:before])


def test_a_folders_files_are_neighbours():
    """So the order of the files is an order of the folders, too."""
    folders = [name.partition(".")[0] for name in ORDER if "." in name]
    assert folders == sorted(folders, key=folders.index)


def test_the_docstring_lists_the_order():
    """Its table names every file of the top level and every folder, in this order."""
    lines = [line.split("  ")[2] for line in quantization.__doc__.splitlines() if line.startswith("    ")]
    listed = [name.strip().removesuffix("/") for line in lines for name in line.split(",")]
    assert listed == list(dict.fromkeys(name.partition(".")[0] for name in ORDER))


def test_mx_and_int4_do_not_import_each_other():
    assert all("baselines.int4" not in own_imports(name) for name in ORDER)
    assert own_imports("baselines.int4") == {"matmul", "recipe", "reference"}
