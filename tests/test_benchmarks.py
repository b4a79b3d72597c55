"""The benchmarks run, check and write what they say; on a CPU their times mean nothing."""

from __future__ import annotations

import ast
import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
WAYS = [("1", "alone"), ("2", "DDP"), ("2", "FSDP2")]
# What compiles a model takes the graph and leaves out the code generator, which takes a minute; several processes are
# forked, where scaling.py starts them anew. The long tests have it all.
SCRIPT = """
import functools, runpy, sys
import torch

compile_module = torch.nn.Module.compile
torch.nn.Module.compile = lambda module: compile_module(module, backend="aot_eager")
torch.multiprocessing.spawn = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
path, *sys.argv = sys.argv[1:]
sys.path.insert(0, path)
runpy.run_path(f"{path}/{sys.argv[0]}", run_name="__main__")
"""


@pytest.fixture
def run(start, tmp_path):
    """run(script, *arguments): that benchmark in a process of its own."""
    return lambda script, *arguments: start(tmp_path, SCRIPT, str(BENCHMARKS), script, *arguments).result()


def run_it_all(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, BENCHMARKS / script, *arguments], capture_output=True, text=True)


def test_train_step_on_a_cpu(tmp_path, run):
    check_train_step(run, tmp_path)


@pytest.mark.long
def test_train_step_on_a_cpu_with_compiled_code(tmp_path):
    check_train_step(run_it_all, tmp_path)


def test_input_on_a_cpu(tmp_path, run):
    small = ["--models", "deit_micro_patch4_32", "--batch-size", "2", "--steps", "2", "--cpu-steps", "2"]
    small += ["--workers", "1", "--device", "cpu", "--seconds", "0.01", "--csv", str(tmp_path / "input.csv")]
    result = run("input.py", *small)
    assert result.returncode == 0, result.stderr
    rows = {row["what"]: float(row["value"]) for row in csv.DictReader(open(tmp_path / "input.csv"))}
    assert {"decoding by torchvision", "transform on the CPU", "CPU part of gpu", "step alone"} <= rows.keys()
    assert {f"{what}, {on}" for what in ("loader alone", "end to end") for on in ("cpu", "gpu")} <= rows.keys()
    assert min(rows.values()) > 0 and "GPU part, ms" in rows
    assert 60 < int(re.search(r"weight of a file \| (\d+) KB", result.stdout)[1]) < 100


def check_train_step(run, tmp_path: Path) -> None:
    variants = ["bf16", "TetraJet", "TetraJet, reference", "TetraJet, graph"]
    variants += [f"TetraJet + {method}, compiled, graph" for method in ("Q-EMA", "Q-Ramping")]
    small = ["--models", "deit_micro_patch4_32", "--batch-size", "2", "--steps", "1", "--device", "cpu"]
    small += ["--lock", str(tmp_path / "lock")]
    result = run("train_step.py", *small, "--variants", *variants, "--csv", str(tmp_path / "new" / "step.csv"))
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(open(tmp_path / "new" / "step.csv")))
    assert [row["variant"] for row in rows] == variants
    assert all(float(row["ms"]) > 0 and row["torch"] == torch.__version__ for row in rows)
    assert all(f"| {variant} |" in result.stdout for variant in variants)


def test_kernels_on_a_cpu(tmp_path, run):
    small = ["--shapes", "64x32", "33x70", "--tokens", "64", "--width", "32", "--repeats", "1", "--device", "cpu"]
    result = run("kernels.py", *small, "--csv", str(tmp_path / "kernels.csv"))
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(open(tmp_path / "kernels.csv")))
    assert len(rows) == 2 * 10 + 2 * 12 and all(float(row["us"]) > 0 for row in rows)
    assert "| all of a block |" in result.stdout


def test_profile_step_on_a_cpu(tmp_path, run):
    """Without a GPU there are no kernels to tell apart, and the operators' time is `other`."""
    small = ["--model", "deit_micro_patch4_32", "--batch-size", "2", "--steps", "1", "--device", "cpu"]
    result = run("profile_step.py", *small, "--variants", "bf16", "TetraJet", "--csv", str(tmp_path / "profile.csv"))
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(open(tmp_path / "profile.csv")))
    times = {(row["variant"], row["kind"]): float(row["ms"]) for row in rows}
    assert len(times) == 2 * 10 and all((ms > 0) == (kind == "other") for (_, kind), ms in times.items())
    assert times["TetraJet", "other"] > times["bf16", "other"]  # the quantizers are seen
    assert "| all kernels |" in result.stdout


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("_quantize_dense_kernel", "Q3 + Q5"),
        ("_add_up_kernel", "Q3 + Q5"),
        ("_quantize_packed_kernel", "Q4, Q6"),
        ("_quantize_kernel", "Q1, Q2"),
        ("triton_poi_fused_gelu_0", "elementwise, compiled"),
        ("nvjet_qqtst_128x256_128x6_2x1_v_bz_coopB_TNN", "matmuls"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::reduce_kernel<512, 1, ...>", "other"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    source = (BENCHMARKS / "profile_step.py").read_text("utf-8")
    assignment = next(node for node in ast.parse(source).body if getattr(node, "targets", [None])[0] is not None)
    kinds = ast.literal_eval(assignment.value)
    assert next(k for k, pattern in kinds.items() if re.search(pattern, kernel, re.IGNORECASE)) == kind


def test_tracking_on_a_cpu(tmp_path, run):
    small = ["--model", "deit_micro_patch4_32", "--batch-size", "2", "--rounds", "2", "--steps", "2", "--device", "cpu"]
    result = run("tracking.py", *small, "--csv", str(tmp_path / "tracking.csv"))
    assert result.returncode == 0, result.stderr
    rows = {row["kind"]: row for row in csv.DictReader(open(tmp_path / "tracking.csv"))}
    assert list(rows) == [
        *("without", "outside a window", "within a window", "opening a window", "measuring at its end")
    ]
    assert all(float(row["ms"]) > 0 for row in rows.values()) and float(rows["without"]["ratio"]) == 1
    assert float(rows["within a window"]["ms"]) > float(rows["without"]["ms"])  # it is seen
    assert "A window of 30 steps costs" in result.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU records no graph")
def test_tracking_with_a_graph(run):
    small = ["--model", "deit_micro_patch4_32", "--batch-size", "64", "--rounds", "1", "--steps", "2", "--graph"]
    result = run("tracking.py", *small)
    assert result.returncode == 0, result.stderr
    assert ", CUDA graph, " in result.stdout and "| outside a window |" in result.stdout


@pytest.mark.long
def test_scaling_on_a_cpu(tmp_path, run):
    small = ["--model", "deit_micro_patch4_32", "--batch-size", "2", "--steps", "2", "--device", "cpu"]
    result = run("scaling.py", *small, "--csv", str(tmp_path / "scaling.csv"))
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(open(tmp_path / "scaling.csv")))
    made = [(row["processes"], row["how"], row["recipe"]) for row in rows]
    assert made == [(*way, recipe) for way in WAYS for recipe in ("bf16", "TetraJet")]
    for row, alone in zip(rows, 3 * rows[:2]):
        assert float(row["ms"]) > 0
        assert float(row["ratio"]) == pytest.approx(int(row["img_per_s"]) / int(alone["img_per_s"]), abs=0.01)
    assert result.stdout.count("| TetraJet | ") == 3


@pytest.mark.long
def test_scaling_of_compiled_models(tmp_path):
    small = ["--model", "deit_micro_patch4_32", "--batch-size", "2", "--steps", "1", "--device", "cpu"]
    file = tmp_path / "scaling.csv"
    result = run_it_all("scaling.py", *small, "--compile", "--recipes", "TetraJet", "--csv", str(file))
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(open(file)))
    assert [(row["processes"], row["how"]) for row in rows] == WAYS[:2]
    assert all(row["compiled"] == "True" and float(row["ms"]) > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two GPUs")
def test_scaling_without_two_gpus_one_line(run):
    result = run("scaling.py")
    wanted = r"scaling.py: error: several processes need a GPU each, PyTorch finds [01]; --device cpu needs none\n"
    assert result.returncode == 2 and re.fullmatch(wanted, result.stderr)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "train_step.py",
            ["--models", "nosuch"],
            "must be a model of timm that can be quantized, got nosuch: Unknown model",
        ),
        (
            "train_step.py",
            ["--models", "resnet18"],
            "must be a model of timm that can be quantized, got resnet18: ResNet has no linear layer",
        ),
        ("kernels.py", ["--csv", "."], "must be a file, got the directory ."),
        ("kernels.py", ["--shapes", "64"], "must be ROWSxCOLUMNS, such as 25216x3072, got 64"),
        ("tracking.py", ["--rounds", "0"], "must be at least 1, got 0"),
        ("tracking.py", ["--device", "cpu", "--graph"], "--graph records what a GPU does; leave it out"),
        ("scaling.py", ["--device", "cpu", "--processes", "1"], "--processes must be at least 2"),
        ("scaling.py", ["--device", "cpu", "--graph"], "--graph records what a GPU does; leave it out"),
    ],
)
def test_a_mistake_is_one_line(script, arguments, message, run):
    result = run(script, *arguments)
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["train_step.py", "kernels.py", "tracking.py", "profile_step.py"])
def test_without_a_gpu_one_line(script, run):
    result = run(script)
    what = "profiling kernels" if script == "profile_step.py" else "timing"
    assert result.returncode == 2 and result.stderr == f"{script}: error: {what} needs a GPU, PyTorch finds none\n"
