"""Several processes under torchrun, with gloo on the CPU: they agree, they notice when they do not, and they end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import engine
from main import build_model, main
from options import build_recipe, parse_args
from quantization import linear, quantize_mx

REPOSITORY = Path(__file__).resolve().parent.parent
COMMON = ["--quant", "mxfp4", "--device", "cpu", "--num-workers", "0", "--warmup-epochs", "0"]
# 224 images of 5 tokens fill groups of 32 tokens, so that a rank's groups are half of the groups of both.
NEAREST = [*COMMON, "--backward-rounding", "nearest", "--epochs", "2", "--lr", "1e-4"]
SHORT = [*COMMON, "--batch-size", "359", "--epochs", "2"]
ALL = ["--q-ema", "--q-ramping", "--q-ramping-steps", "2", "--model-ema-decay", "0.9", "--drop-path", "0.2"]

# Each process does the runs of runs.json, [arguments, more] each, in one process group: starting it takes longest.
# `more` is what goes wrong.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import datasets, distributed, engine, main, rank_check, quantization.linear
from errors import UserError

quantization.linear.Q_EMA_START = 1

start, stop, device = distributed.start, distributed.stop, []
distributed.start = lambda kind: device[0] if device else device.append(start(kind)) or device[0]
distributed.stop = lambda: None
after_step, call, train = rank_check.RankCheck.after_step, engine.TrainStep.__call__, main.train_one_epoch
steps, digits = 0, datasets._IN_MEMORY["DIGITS"]

def one_image_less(root, download, training):
    images, labels = digits(root, download, training)
    return (images, labels) if training else (images[1:], labels[1:])

def perturbed(self):
    if distributed.rank() == 1 and "perturb" in more and self.step == 2:
        value = dict(self._tensors())[more["perturb"]].data.view(-1)[:1]
        value.copy_(value.nextafter(value + 1))
    after_step(self)

def stopped(self, batch):
    global steps
    steps += 1
    if distributed.rank() == 1 and steps == 2:
        if more.get("end") == "raise":
            raise UserError("image 7 is not readable")
        if more.get("end") == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    return call(self, batch)

def interrupted(step, loader, epoch, *rest):
    if epoch == 1 and more.get("end") == "interrupt":
        raise KeyboardInterrupt
    return train(step, loader, epoch, *rest)

datasets._IN_MEMORY["DIGITS"] = one_image_less  # so that rank 0 has 180 images to evaluate, rank 1 has 179
rank_check.RankCheck.after_step, engine.TrainStep.__call__, main.train_one_epoch = perturbed, stopped, interrupted
for arguments, more in json.loads(Path("runs.json").read_text()):
    code = main.main(arguments)
    with open(f"codes-{os.environ['RANK']}", "a") as file:
        print(code, file=file)
stop()
sys.exit(code)
"""


@pytest.fixture
def in_two_processes(tmp_path, monkeypatch):
    """in_two_processes(*runs): their standard error; exit codes in codes-RANK."""
    monkeypatch.chdir(tmp_path)

    def launch(*runs: tuple[list[str], dict]) -> subprocess.CompletedProcess:
        Path("script.py").write_text(SCRIPT)
        Path("runs.json").write_text(json.dumps(runs))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
        env = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    return launch


def load(directory: str) -> dict:
    return torch.load(f"{directory}/checkpoint.pth", weights_only=True)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def log(directory: str) -> list[dict]:
    return [json.loads(line) for line in Path(directory, "log.txt").read_text().splitlines()]


def test_ranks_agree_with_one_process_with_each_other_and_sharded(in_two_processes, monkeypatch, capsys):
    runs = [
        ([*NEAREST, "--batch-size", "224", "--output-dir", "two"], {}),
        ([*SHORT, "--epochs", "1", "--output-dir", "plain"], {}),
        ([*SHORT, "--epochs", "1", "--fsdp", "--check-ranks", "1", "--output-dir", "plain-fsdp"], {}),
        ([*SHORT, *ALL, "--check-ranks", "1", "--output-dir", "all"], {}),
        ([*SHORT, *ALL, "--fsdp", "--check-ranks", "1", "--output-dir", "all-fsdp"], {}),
        ([*SHORT, *ALL, "--fsdp", "--output-dir", "gathered"], {"end": "interrupt"}),
        ([*SHORT, *ALL, "--output-dir", "gathered", "--resume", "auto"], {}),
        ([*SHORT, *ALL, "--output-dir", "scattered"], {"end": "interrupt"}),
        ([*SHORT, *ALL, "--fsdp", "--output-dir", "scattered", "--resume", "auto"], {}),
        ([*SHORT, "--q-ema", "--eval", "--fsdp", "--batch-size", "179", "--resume", "all/checkpoint.pth"], {}),
        ([*SHORT, "--check-ranks", "2", "--output-dir", "bad"], {"perturb": "blocks.1.mlp.fc1.weight"}),
    ]
    result = in_two_processes(*runs)
    codes = [Path(f"codes-{rank}").read_text().split() for rank in range(2)]
    assert codes == [["0"] * 5 + ["130", "0"] * 2 + ["0", "1"]] * 2, result.stderr
    differ = "main.py: ranks differ: after step 4 rank 1 holds another blocks.1.mlp.fc1.weight than rank 0; resume"
    assert result.stderr.count("ranks differ") == result.stderr.count(differ) == 1

    # Bit for bit: adding up two gradients has one order only.
    for name, other in (("plain", "plain-fsdp"), ("all", "all-fsdp"), ("all", "gathered"), ("all", "scattered")):
        whole, shards = load(name), load(other)
        assert all(same(whole[part], shards[part]) for part in ("model", "model_ema", "optimizer", "rng", "identity"))
        lines = [[{k: v for k, v in line.items() if k != "img_per_s"} for line in log(d)] for d in (name, other)]
        assert lines[0] == lines[1]
    assert log("all")[1]["mean_period"] > 1
    shown = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    assert shown["test_acc1"] == log("all")[1]["test_acc1"]
    monkeypatch.setattr(linear, "Q_EMA_START", 1)
    assert main([*SHORT, "--q-ema", "--eval", "--resume", "all-fsdp/checkpoint.pth"]) == 0
    unsharded = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert unsharded["test_acc1"] * 360 / 100 == pytest.approx(shown["test_acc1"] * 359 / 100, abs=1.001)

    # One process on both ranks' batches, the images of rank 0 first.
    call = engine.TrainStep.__call__
    rank_by_rank = lambda self, batch: call(self, [torch.cat((t[0::2], t[1::2])) for t in batch])  # noqa: E731
    monkeypatch.setattr(engine.TrainStep, "__call__", rank_by_rank)
    assert main([*NEAREST, "--batch-size", "448", "--output-dir", "one"]) == 0
    for one, two in zip(log("one"), log("two"), strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-6)
    one, two = load("one")["model"], load("two")["model"]
    args = parse_args(NEAREST)
    torch.manual_seed(args.seed)
    start = build_model(args.model, 10, args.input_size, args.drop_path, build_recipe(args)).state_dict()
    weights = [name for name in one if re.fullmatch(r"blocks\.\d+\.(attn|mlp)\.\w+\.weight", name)]
    assert len(weights) == 8
    for name in weights:
        a, b, before = (quantize_mx(model[name], -1) for model in (one, two, start))
        assert (a.codes != before.codes).double().mean() > 0.05  # decisions were there to be made
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8))


@pytest.mark.parametrize("end", ["raise", "kill"])
def test_a_rank_that_fails_ends_the_job(end, in_two_processes):
    started = time.monotonic()
    result = in_two_processes(([*SHORT, "--output-dir", "out"], {"end": end}))
    assert result.returncode != 0 and time.monotonic() - started < 60
    if end == "raise":
        assert result.stderr.count("main.py: error: image 7 is not readable") == 1
        assert "[rank" not in result.stderr  # no traceback of the rank whose collective broke off
    else:
        assert re.search(r"rank\s*: 1 .*\n.*exitcode\s*: -9", result.stderr)


def test_what_fails_everywhere_is_said_once(in_two_processes):
    result = in_two_processes(([*COMMON, "--epochs", "none"], {}))
    assert result.stderr.count("main.py: error: argument --epochs: needs a whole number at least 1") == 1
    assert [Path(f"codes-{rank}").read_text().split() for rank in range(2)] == [["2"]] * 2
