"""The shell scripts: which command each of them ends in, and which requirements are missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from reproduction.protocols import PROTOCOLS

REPOSITORY = Path(__file__).resolve().parent.parent
SIZES = {
    "deit_tiny": "DeiT-T",
    "deit_small": "DeiT-S",
    "deit_base": "DeiT-B",
    "swin_tiny": "Swin-T",
    "swin_small": "Swin-S",
}
VARIANTS = ("mxfp4", "mxfp4_q_ema", "mxfp4_q_ramping")
GPUS = 4
# Whatever a script starts prints its command, an argument a line; PyTorch finds four GPUs.
STUBS = {
    "main.py": "import sys\nprint('python', *sys.argv[1:], sep='\\n')\n",
    "reproduction.py": "import os, sys\nprint(os.environ.get('DATA_PATH'), *sys.argv[1:], sep='\\n')\n",
    "stubs/torch.py": f"class cuda:\n    device_count = staticmethod(lambda: {GPUS})\n",
    "pytest.py": "import sys\nprint('pytest', *sys.argv[1:], sep='\\n')\n",
    "bin/torchrun": "#!/bin/bash\nprintf '%s\\n' torchrun \"$@\"\n",
    "scripts/setup.sh": "",
}


@pytest.fixture
def started(tmp_path):
    """started(script, *arguments, **environment): the command in which the script ends, called from elsewhere."""
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
    for name, text in STUBS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    for half in ("train", "val"):
        (tmp_path / "here" / "images" / half).mkdir(parents=True)
    env = {name: value for name, value in os.environ.items() if name not in ("DATA_PATH", "NUM_GPUS")}
    env["PATH"] = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{env['PATH']}"
    env["PYTHONPATH"] = str(tmp_path / "stubs")

    def start(script: str, *arguments: str, **environment: str) -> list[str]:
        command, where = ["bash", f"../scripts/{script}", *arguments], tmp_path / "here"
        result = subprocess.run(command, cwd=where, env=env | environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return start


def options(command: list[str]) -> dict[str, str | None]:
    """Values by option, None for one without a value."""
    found, names = {}, [i for i, part in enumerate(command) if part.startswith("--")]
    for i in names:
        found[command[i]] = command[i + 1] if i + 1 < len(command) and i + 1 not in names else None
    return found


def test_every_script_trains_as_the_protocol_says(started):
    """The paper's models on four GPUs; the numbers of the protocol are tested against the paper elsewhere."""
    scripts = {f"train_{size}_{variant}.sh" for size in SIZES for variant in VARIANTS}
    assert scripts == {path.name for path in (REPOSITORY / "scripts").glob("train_*.sh")}
    for size, model in SIZES.items():
        setup = PROTOCOLS["imagenet"].setups[model]
        for variant in VARIANTS:
            launcher, *command = started(f"train_{size}_{variant}.sh", DATA_PATH="images")
            found = options(command)
            assert launcher == "torchrun" and "--standalone" in found and found["--nproc_per_node"] == str(GPUS)
            assert found["--model"] == setup.model and found["--quant"] == "mxfp4"
            assert (found["--data-set"], found["--data-path"]) == ("IMNET", "images")
            assert int(found["--epochs"]) == PROTOCOLS["imagenet"].epochs
            assert int(found["--batch-size"]) * GPUS == setup.global_batch
            assert float(found["--lr"]) == setup.lr
            assert ("--cuda-graph" in found) == ("--cuda-graph" in setup.options)
            beta, k2 = (found.get(name) for name in ("--q-ema-beta", "--q-ramping-k2"))
            if variant == "mxfp4_q_ema":
                assert "--q-ema" in found and float(beta) == setup.tuning.q_ema_beta and k2 is None
            elif variant == "mxfp4_q_ramping":
                assert "--q-ramping" in found and found["--q-ramping-k1"] == "16" and beta is None
                assert int(k2) == setup.tuning.q_ramping_k2
            else:
                assert beta is k2 is None


def test_the_users_options_come_last_and_limit_the_gpus(started):
    launcher, *command = started("train.sh", "tiny", "mxfp4", "--lr", "0.1", DATA_PATH="images", NUM_GPUS="2")
    assert launcher == "torchrun" and options(command)["--nproc_per_node"] == "2"
    assert command[-2:] == ["--lr", "0.1"] and command.count("--lr") == 2
    launcher, *command = started("train.sh", "tiny", "mxfp4", "--fsdp", DATA_PATH="images", NUM_GPUS="1")
    assert launcher == "python" and command[-1] == "--fsdp" and "--cuda-graph" not in command


def test_without_images_it_is_an_epoch_of_digits(started):
    lines = started("train_deit_small_mxfp4_q_ema.sh")
    found = options(lines[lines.index("python") :])
    assert (found["--data-set"], found["--epochs"], found["--q-ema-beta"]) == ("DIGITS", "1", "0.9972")
    assert "--data-path" not in found


def test_the_long_tests_are_those_that_the_others_leave_out(started):
    usual, long = started("test.sh", "-x"), started("test.sh", "--long", "-x")
    assert usual[-1] == "-x" and "-m" not in usual
    assert long[-3:] == ["-m", "long", "-x"] and long[:-3] == usual[:-1]


def test_reproduction_finds_a_relative_data_path_and_gets_all_arguments(started, tmp_path):
    images = str(tmp_path / "here" / "images")
    assert started("reproduce.sh", "table1", "a b", DATA_PATH="images") == [images, "table1", "a b"]
    assert started("reproduce.sh", "--list") == ["None", "--list"]


def named_in(file: str) -> dict[str, SpecifierSet]:
    lines = (line.partition("#")[0].strip() for line in (REPOSITORY / file).read_text("utf-8").splitlines())
    return {found.name: found.specifier for found in map(Requirement, filter(None, lines))}


def test_ci_pins_a_version_of_every_requirement_within_its_bounds():
    pinned, wanted = named_in("requirements-ci.txt"), named_in("requirements.txt")
    versions = {name: str(specifier).removeprefix("==") for name, specifier in pinned.items()}
    assert all(str(specifier) == f"=={versions[name]}" for name, specifier in pinned.items())
    assert wanted.keys() <= pinned.keys() and all(wanted[name].contains(versions[name]) for name in wanted)
    assert {"compressed-tensors", "torchao", "onnx", "onnxruntime"} <= pinned.keys()
    assert "REQUIREMENTS=requirements-ci.txt" in (REPOSITORY / ".ci" / "run").read_text("utf-8")
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    for name in ("torch", "timm", "numpy"):  # the package has the bounds of the program
        assert f'"{name}{wanted[name]}"' in project


def test_setup_takes_the_file_of_requirements_that_it_is_given(tmp_path):
    """An environment that has the given file's packages is left alone; a file that is missing is named."""
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("no-such-package\n")
    (tmp_path / "mine.txt").write_text("pytest\n")
    prefix = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{prefix}:{os.environ['PATH']}", "VIRTUAL_ENV": str(prefix.parent)}
    results = {
        name: subprocess.run(
            ["bash", "scripts/setup.sh"], cwd=tmp_path, env=env | {"REQUIREMENTS": name}, capture_output=True, text=True
        )
        for name in ("mine.txt", "none.txt")
    }
    assert results["mine.txt"].returncode == 0 and not (tmp_path / ".venv").exists(), results["mine.txt"].stderr
    assert results["none.txt"].returncode == 2
    assert "REQUIREMENTS must be a file of the repository, got none.txt" in results["none.txt"].stderr


def test_requirements_that_are_not_met_are_named(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("check", REPOSITORY / "scripts" / "check_requirements.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    nightly = tmp_path / "nightly-3.0.dev1.dist-info"
    nightly.mkdir()
    (nightly / "METADATA").write_text("Metadata-Version: 2.1\nName: nightly\nVersion: 3.0.dev1\n")
    monkeypatch.syspath_prepend(tmp_path)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        "# what follows is there\n"
        "numpy >= 1.0  # any\n\n"
        "torch >= 1.0\n"
        "nightly >= 2.0\n"
        "no-such-package; python_version < '3'\n"
        "no-such-package >= 2\n"
        "numpy >= 999\n"
    )
    wanted = ["no-such-package is not installed", f"numpy {version('numpy')} does not satisfy >=999"]
    assert check.problems(requirements) == wanted
