"""Several processes under torchrun, with gloo on the CPU: they agree, they notice when they do not, and they end."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import engine
import timm
from datasets import DataConfig, build_loaders
from main import main
from quantization import Recipe, linear, quantize_mx
from runtime import processes
from runtime.errors import UserError
from tracking import oscillation_csv
from training.models import build_model
from training.options import parse_args
from training.setup import build_recipe

IMAGES, HELD_OUT = 200, 36  # of DIGITS here
COMMON = ["--quant", "mxfp4", "--device", "cpu", "--num-workers", "0", "--warmup-epochs", "0", "--lr", "0.2"]
# 32 images of 5 tokens fill groups of 32 tokens, so that a rank's groups are half of the groups of both.
NEAREST = [*COMMON, "--backward-rounding", "nearest", "--epochs", "2", "--lr", "3.5e-4"]
SHORT = [*COMMON, "--batch-size", "50", "--epochs", "2"]
ALL = ["--q-ema", "--q-ramping", "--q-ramping-steps", "2", "--model-ema-decay", "0.9", "--drop-path", "0.2"]
CLIPPED = ["--clip-grad", "0.1"]
TRACKED = [*COMMON, "--epochs", "2", "--batch-size", "33", "--clip-grad", "0.5", "--track-oscillation"]
SWIN = [*SHORT, *ALL, "--model", "swin_tiny_patch4_window7_224", "--input-size", "16", "--epochs", "1"]
SWIN += ["--keep-blocks", "0"]
STUDENT = [*SHORT, "--model", "deit_tiny_distilled_patch16_224", "--input-size", "32", "--epochs", "1"]
STUDENT += ["--distillation-type", "soft", "--teacher-path", "teacher.pth", "--teacher-model", "deit_micro_patch4_32"]
STUDENT += ["--heal", "1"]
RANDOM = [*SHORT, "--batch-size", "50", "--epochs", "1", "--drop-path", "0.5", "--mixup", "0.8", "--cutmix", "1"]

# Each process does the runs of runs.json, [arguments, more] each, in one process group: starting it takes longest.
# `more` is what goes wrong. Of each checkpoint every process hashes all weights, averages, periods and step sizes.
SCRIPT = """
import hashlib, json, os, random, signal, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
import engine, main, quantization.linear, timm
from data.in_memory import Digits
from runtime import processes, rank_check
from training import checkpoint, loop
from runtime.errors import UserError
from quantization.shards import is_sharded

quantization.linear.Q_EMA_START = 1

start, stop, device = processes.start, processes.stop, []
processes.start = lambda kind: device[0] if device else device.append(start(kind)) or device[0]
processes.stop = lambda: None
after_step, call, train = rank_check.RankCheck.after_step, engine.TrainStep.__call__, loop.train_one_epoch
parse, steps, digits, save = main.parse_args, 0, Digits.arrays, checkpoint.RunState.save
fresh_keys, drop, mix = quantization.linear.fresh_keys, timm.layers.DropPath.forward, timm.data.Mixup._params_per_batch
swin, create_swin = timm.models.swin_transformer, timm.models.swin_transformer._create_swin_transformer
create_deit = timm.models.deit._create_deit

def few_digits(self, training):
    images, labels = (array[: int(sys.argv[1 if training else 2])] for array in digits(self, training))
    return (images, labels) if training else (images[1:], labels[1:])

def small_deit(*arguments, **options):
    return create_deit(*arguments, **options | {"embed_dim": 32, "depth": 2, "num_heads": 2})

def small_swin(name, pretrained=False, **options):
    options |= {"embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 2}
    return create_swin(name, pretrained, **options)

def hashed(self, directory, best=False):
    digest = hashlib.sha256()
    for state in (self.model.state_dict(), *self.optimizer.state.values()):
        for value in state.values():
            digest.update((value.full_tensor() if is_sharded(value) else value).detach().numpy().tobytes())
    with open(directory / f"hashes-{processes.rank()}", "a") as file:
        print(digest.hexdigest(), file=file)
    save(self, directory, best)

def perturbed(self):
    if processes.rank() == more.get("rank", 1) and "perturb" in more and self.step == 2:
        value = dict(self._tensors())[more["perturb"]].data.view(-1)[:1]
        value.view(torch.int32).add_(256)  # one unit in the last place may be lost in the roundings of later steps
    after_step(self)

def stopped(self, batch):
    global steps
    steps += 1
    if processes.rank() == 1 and steps == 2:
        if more.get("end") == "raise":
            raise UserError("image 7 is not readable")
        if more.get("end") == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    return call(self, batch)

def recorded(arguments):
    options = parse(arguments)
    return replace(options, run=replace(options.run, cuda_graph="graph" in more))

def replayed(work, parameters, state):
    assert isinstance(work.__self__.model, timm.models.VisionTransformer)  # not DDP's
    return work

def interrupted(step, loader, epoch, *rest):
    if epoch == 1 and more.get("end") == "interrupt":
        raise KeyboardInterrupt
    if "draws" in more:
        drawn("generators", [torch.rand(()).item(), np.random.rand(), random.random()])
    return train(step, loader, epoch, *rest)

def drawn(what, numbers):
    if "draws" in more:
        draws.setdefault(what, []).append(numbers)

def keys(*arguments):
    new = fresh_keys(*arguments)
    drawn("keys", new.tolist())
    return new

def dropped(self, x):
    y = drop(self, x)
    if self.training and len(x) == 50:  # not the two images by which the model's coverage is measured
        drawn("dropped paths", (y == 0).flatten(1).all(1).tolist())
    return y

def mixed(self):
    share, use_cutmix = mix(self)
    drawn("mixtures", [float(share)])
    return share, use_cutmix

Digits.arrays, timm.models.deit._create_deit = few_digits, small_deit
# One held-out image is left out, so that rank 0 has 18 images to evaluate, rank 1 has 17.
# Without a GPU nothing is recorded, but all else is as with --cuda-graph.
main.parse_args, engine.CudaGraph = recorded, replayed
swin._create_swin_transformer, checkpoint.RunState.save = small_swin, hashed
rank_check.RankCheck.after_step, engine.TrainStep.__call__, loop.train_one_epoch = perturbed, stopped, interrupted
quantization.linear.fresh_keys, timm.layers.DropPath.forward, timm.data.Mixup._params_per_batch = keys, dropped, mixed
for arguments, more in json.loads(Path("runs.json").read_text()):
    draws = {}
    code = main.main(arguments)
    if draws:
        Path(arguments[-1], f"draws-{processes.rank()}.json").write_text(json.dumps(draws))
    with open(f"codes-{os.environ['RANK']}", "a") as file:
        print(code, file=file)
stop()
sys.exit(code)
"""


def launch(launcher, directory: Path, runs: list[tuple[list[str], dict]], processes: int = 2):
    """The runs in `directory`, in one process group, by `ranks` or `torchrun`; exit codes in codes-RANK."""
    (directory / "runs.json").write_text(json.dumps(runs))
    return launcher(directory, SCRIPT, str(IMAGES), str(HELD_OUT), processes=processes)


def codes(directory: Path, processes: int = 2) -> list[list[int]]:
    """The exit codes of the runs, by rank."""
    return [[int(code) for code in (directory / f"codes-{rank}").read_text().split()] for rank in range(processes)]


def hashes(directory: Path, processes: int = 2) -> list[list[str]]:
    """The hashes of a run's checkpoints, by rank."""
    return [(directory / f"hashes-{rank}").read_text().split() for rank in range(processes)]


def load(directory: Path) -> dict:
    return torch.load(directory / "checkpoint.pth", weights_only=True)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def log(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.txt").read_text().splitlines()]


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch, digits_cut_to):
    monkeypatch.chdir(tmp_path)
    with digits_cut_to(IMAGES, HELD_OUT):
        yield


RUNS = [  # directory, arguments, what goes wrong, exit code
    ("two", [*NEAREST, "--batch-size", "32"], {}, 0),
    ("two-clipped", [*NEAREST, *CLIPPED, "--batch-size", "32", "--fsdp"], {}, 0),
    ("plain", [*SHORT, "--epochs", "1"], {}, 0),
    ("plain-fsdp", [*SHORT, "--epochs", "1", "--fsdp", "--check-ranks", "1"], {}, 0),
    ("all", [*SHORT, *ALL, "--check-ranks", "1"], {}, 0),
    ("all-fsdp", [*SHORT, *ALL, "--fsdp", "--check-ranks", "1"], {}, 0),
    ("all-graph", [*SHORT, *ALL, "--check-ranks", "1"], {"graph": True}, 0),
    ("gathered", [*SHORT, *ALL, "--fsdp"], {"end": "interrupt"}, 130),
    ("gathered", [*SHORT, *ALL, "--resume", "auto"], {}, 0),
    ("scattered", [*SHORT, *ALL], {"end": "interrupt"}, 130),
    ("scattered", [*SHORT, *ALL, "--fsdp", "--resume", "auto"], {}, 0),
    ("swin", SWIN, {}, 0),
    ("swin-fsdp", [*SWIN, "--fsdp"], {}, 0),
    ("student", STUDENT, {}, 0),
    ("student-fsdp", [*STUDENT, "--fsdp"], {}, 0),
    ("tracked", [*TRACKED, "--q-ema", "--q-ramping", "--q-ramping-steps", "3"], {}, 0),
    ("tracked-int4", [*TRACKED, "--quant", "int4"], {}, 0),
    ("all", [*SHORT, "--q-ema", "--eval", "--fsdp", "--batch-size", "17", "--resume", "all/checkpoint.pth"], {}, 0),
    ("random", RANDOM, {"draws": True}, 0),
    ("statistics", [*COMMON[2:], "--model", "test_resnet", "--epochs", "1"], {}, 2),
    ("mistake", [*COMMON, "--epochs", "none"], {}, 2),
    ("bad", [*SHORT, "--check-ranks", "2"], {"perturb": "blocks.1.mlp.fc1.weight"}, 1),
]


@pytest.fixture(scope="module")
def two(tmp_path_factory, ranks) -> tuple[Path, subprocess.CompletedProcess]:
    """`RUNS` by two processes: where they are, and what was printed. Workers of pytest-xdist share one set of runs."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        directory = tmp_path_factory.mktemp("two")
        return directory, run_all(directory, ranks)
    directory = tmp_path_factory.getbasetemp().parent / "two"
    said = directory / "said.json"
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not said.is_file():
            directory.mkdir(exist_ok=True)
            result = run_all(directory, ranks)
            said.write_text(json.dumps([[], result.returncode, result.stdout, result.stderr]))
    return directory, subprocess.CompletedProcess(*json.loads(said.read_text()))


def run_all(directory: Path, ranks: Callable) -> subprocess.CompletedProcess:
    torch.manual_seed(0)
    teacher = build_model("deit_micro_patch4_32", 10, 32, 0.0, build_recipe(parse_args([]).precision))
    torch.save(teacher.state_dict(), directory / "teacher.pth")
    return launch(ranks, directory, [([*args, "--output-dir", name], more) for name, args, more, _ in RUNS])


def test_exit_codes_and_what_is_said_once(two):
    directory, result = two
    assert codes(directory) == [[code for *_, code in RUNS]] * 2, result.stderr
    differ = "main.py: ranks differ: after step 4 rank 1 holds another blocks.1.mlp.fc1.weight than rank 0; resume"
    assert result.stderr.count("ranks differ") == result.stderr.count(differ) == 1
    assert result.stderr.count("main.py: error: argument --epochs: needs a whole number at least 1") == 1
    assert (
        result.stderr.count("main.py: error: --model test_resnet has batch norms, whose statistics would differ") == 1
    )
    assert not (directory / "mistake").exists() and not (directory / "statistics").exists()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("plain", "plain-fsdp"),
        ("all", "all-fsdp"),
        ("all", "all-graph"),
        ("all", "gathered"),
        ("all", "scattered"),
        ("swin", "swin-fsdp"),
        ("student", "student-fsdp"),
    ],
)
def test_however_it_is_spread_the_checkpoint_is_the_same(name, other, two):
    """Bit for bit: adding up two gradients has one order only."""
    directory, _ = two
    whole, shards = load(directory / name), load(directory / other)
    for part in ("model", "model_ema", "optimizer", "rng", "identity"):
        assert same(whole[part], shards[part]), part
    logs = [log(directory / place) for place in (name, other)]
    lines = [
        [{k: v for k, v in line.items() if k not in ("img_per_s", "waited_for_data")} for line in lines]
        for lines in logs
    ]
    assert lines[0] == lines[1]
    assert name != "all" or lines[0][1]["mean_period"] > 1
    assert name != "swin" or "layers.1.downsample.reduction.weight_ema" in whole["model"]


def test_a_sharded_evaluation(two, monkeypatch, capsys):
    directory, result = two
    shown = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    assert shown["test_acc1"] == log(directory / "all")[1]["test_acc1"]
    monkeypatch.setattr(linear, "Q_EMA_START", 1)
    assert main([*SHORT, "--q-ema", "--eval", "--resume", str(directory / "all-fsdp/checkpoint.pth")]) == 0
    unsharded = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert unsharded["test_acc1"] * 36 / 100 == pytest.approx(shown["test_acc1"] * 35 / 100, abs=1.001)
    assert 0 < unsharded["test_loss"] * 36 - shown["test_loss"] * 35 < 20  # the loss of one image


def test_an_evaluation_counts_the_images_of_all_processes(two, evaluated):
    """The last log line of two processes that evaluate 18 and 17 images, from the saved weights in one process."""
    directory, _ = two
    model = timm.create_model("deit_micro_patch4_32", img_size=8, num_classes=10, quant=Recipe())
    model.load_state_dict(load(directory / "plain")["model"])
    plain = {"repeats": 1, "aa": "none", "color_jitter": 0.0, "reprob": 0.0, "num_workers": 0, "seed": 0}
    ((images, labels),) = build_loaders(DataConfig("DIGITS", None, False, 8, batch_size=50, **plain)).val
    wanted = {f"test_{name}": value for name, value in evaluated(model, images[1:], labels[1:]).items()}
    assert len(images) - 1 == 35
    found = log(directory / "plain")[-1]
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


COLLECTIVES = """
import torch
from runtime import processes

device = processes.start("cpu")
rank = processes.rank()
mine = torch.tensor([float(rank), 5.0])
copied = torch.full((2,), rank + 1.0)
processes.copy_from_main([copied], device)
averaged = [torch.tensor([rank * 4.0]), torch.tensor([[1.0 - rank]])]
processes.average(averaged)
print([
    processes.from_main(f"rank {rank}"),
    copied.tolist(),
    processes.all_reduce_sum(mine.clone()).tolist(),
    [value.item() for value in averaged],
    processes.any_of(torch.tensor(float(rank == 1))).item(),
    processes.gather(rank * 10),
    processes.all_gather(mine).tolist(),
])
processes.stop()
"""


def test_every_collective_gives_both_processes_its_result(tmp_path, ranks):
    result = ranks(tmp_path, COLLECTIVES)
    assert result.returncode == 0, result.stderr
    wanted = ["rank 0", [1.0, 1.0], [1.0, 10.0], [2.0, 0.5], 1.0, [0, 10], [[0.0, 5.0], [1.0, 5.0]]]
    assert result.stdout == f"{wanted}\n" * 2


@pytest.fixture
def by_one(monkeypatch):
    """by_one(name, *options): a run of `NEAREST` by one process on both ranks' batches, the images of rank 0 first."""
    call = engine.TrainStep.__call__
    rank_by_rank = lambda self, batch: call(self, [torch.cat((t[0::2], t[1::2])) for t in batch])  # noqa: E731
    monkeypatch.setattr(engine.TrainStep, "__call__", rank_by_rank)

    def run(name: str, *options: str) -> Path:
        assert main([*NEAREST, *options, "--batch-size", "64", "--output-dir", name]) == 0
        return Path(name)

    return run


def test_two_processes_train_as_one(two, by_one):
    directory, _ = two
    alone = by_one("one")
    for one_line, two_line in zip(log(alone), log(directory / "two"), strict=True):
        assert one_line["train_loss"] == pytest.approx(two_line["train_loss"], rel=1e-6)
    one, of_two = load(alone)["model"], load(directory / "two")["model"]
    options = parse_args(NEAREST)
    torch.manual_seed(options.training.seed)
    recipe = build_recipe(options.precision)
    model = build_model(options.model.model, 10, options.data.input_size, options.model.drop_path, recipe)
    start = model.state_dict()
    weights = [name for name in one if re.fullmatch(r"blocks\.\d+\.(attn|mlp)\.\w+\.weight", name)]
    assert len(weights) == 8
    for name in weights:
        a, b, before = (quantize_mx(model[name], -1) for model in (one, of_two, start))
        assert (a.codes != before.codes).double().mean() > 0.05  # decisions were there to be made
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8))


def test_the_learning_rate_is_that_of_the_images_of_all_processes(two):
    """--lr is for 512 images, and two processes train on 32 each. The second epoch is half way down to 1e-5."""
    directory, _ = two
    first = 3.5e-4 * 2 * 32 / 512
    assert [line["lr"] for line in log(directory / "two")] == pytest.approx([first, (first + 1e-5) / 2])


@pytest.mark.parametrize("what", ["generators", "keys", "dropped paths", "mixtures"])
def test_ranks_draw_different_random_numbers(what, two):
    """The test compares generators at the start of training, keys of stochastic rounding, dropped paths, and Mixup."""
    directory, _ = two
    first, second = (json.loads((directory / f"random/draws-{rank}.json").read_text())[what] for rank in range(2))
    assert len(first) == len(second) > 0
    if what == "dropped paths":  # two layers drop half of 50 images, in each of two steps
        assert len(first) == 4 and all(len(a) == len(b) == 50 and a != b for a, b in zip(first, second))
        assert all(14 < sum(paths) < 36 for paths in (*first, *second))
    else:
        numbers = [number for drawn in (*first, *second) for number in drawn]
        assert len(set(numbers)) == len(numbers)


def test_gradients_are_clipped_to_the_norm_over_all_shards(two, by_one):
    """Adam forgets a gradient's length, its first moment does not: a mean of gradients that all have the norm."""
    directory, _ = two
    alone = by_one("one", *CLIPPED)
    for one_line, two_line in zip(log(alone), log(directory / "two-clipped"), strict=True):
        assert one_line["train_loss"] == pytest.approx(two_line["train_loss"], rel=1e-6)
    one, clipped, free = (
        torch.cat([state["exp_avg"].flatten() for state in load(place)["optimizer"]["state"].values()])
        for place in (alone, directory / "two-clipped", directory / "two")
    )
    assert (clipped - one).norm() < 1e-4 * one.norm()
    assert one.norm() <= 0.1 < 2 * free.norm()


@pytest.mark.parametrize("name", ["all", "all-fsdp", "tracked", "tracked-int4"])
def test_two_processes_train_alike(name, two):
    """Both ranks hold the same weights, averages, periods and step sizes at the end of every epoch."""
    directory, _ = two
    first, second = hashes(directory / name)
    assert len(set(first)) == 2 and first == second


@pytest.mark.parametrize(("name", "recipe"), [("tracked", ["--q-ema"]), ("tracked-int4", ["--quant", "int4"])])
def test_a_tracked_run_of_two_processes(name, recipe, two):
    directory, result = two
    measured = oscillation_csv.read(directory / name / "oscillation.csv")
    assert [r.epoch for r in measured if (r.measure.value, r.where) == ("rate_w", "all")] == [0, 1]
    assert len(log(directory / name)) == 2 and "35 held-out images" in result.stdout
    assert main([*COMMON, *recipe, "--eval", "--resume", str(directory / name / "checkpoint.pth")]) == 0


def test_three_processes(tmp_path, ranks):
    """Most weights have rows that three cannot share evenly, and some have fewer rows than there are processes.

    Three processes' sums have another order when sharded, which stochastic rounding magnifies with the learning rate.
    """
    options = [*COMMON, *ALL, "--lr", "1e-4", "--batch-size", "33", "--epochs", "2", "--check-ranks", "1"]
    runs = [([*options, "--output-dir", "whole"], {}), ([*options, "--fsdp", "--output-dir", "shards"], {})]
    average, period = "blocks.0.mlp.fc1.weight_ema", "period of blocks.1.mlp.fc2.weight"
    runs.append(([*options, "--output-dir", "average"], {"perturb": average, "rank": 0}))
    runs.append(([*options, "--output-dir", "period"], {"perturb": period, "rank": 2}))
    result = launch(ranks, tmp_path, runs, processes=3)
    assert codes(tmp_path, processes=3) == [[0, 0, 1, 1]] * 3, result.stderr
    assert result.stderr.count(f"ranks differ: after step 3 rank 0 holds another {average} than rank 1; resume") == 1
    assert result.stderr.count(f"ranks differ: after step 3 rank 2 holds another {period} than rank 0; resume") == 1
    for name in ("whole", "shards"):
        first, second, third = hashes(tmp_path / name, processes=3)
        assert len(set(first)) == 2 and first == second == third
    assert log(Path("whole"))[1]["mean_period"] > 1
    for whole, shards in zip(log(Path("whole")), log(Path("shards")), strict=True):
        assert shards["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("end", "launcher"), [("raise", "ranks"), pytest.param("kill", "torchrun", marks=pytest.mark.long)]
)
def test_a_rank_that_fails_ends_the_job(end, launcher, tmp_path, request):
    """The other rank ends because its collective breaks off; a killed one is reported by torchrun."""
    launcher = request.getfixturevalue(launcher)
    started = time.monotonic()
    result = launch(launcher, tmp_path, [([*SHORT, "--output-dir", "out"], {"end": end})])
    assert result.returncode != 0 and time.monotonic() - started < 60
    if end == "raise":
        assert result.stderr.count("main.py: error: image 7 is not readable") == 1
        assert "[rank" not in result.stderr  # no traceback of the rank whose collective broke off
    else:
        assert re.search(r"rank\s*: 1 .*\n.*exitcode\s*: -9", result.stderr)


# The same steps on DDP's model and on a plain one, whose gradients the step averages; the latter as a graph on GPUs.
AVERAGED = """
import copy, sys
import torch, torch.nn.functional as F
import timm; from runtime import processes
from engine import EpochSums, TrainStep, train_one_epoch
from quantization import Recipe
from training.losses import OutputLoss

device = processes.start(sys.argv[1])
torch.use_deterministic_algorithms(True, warn_only=True)
torch.manual_seed(0)
plain = timm.create_model("deit_nano_patch4_32", num_classes=10, depth=2, quant=Recipe()).to(device)
model = copy.deepcopy(plain)

def train(parallel, model, micro_batches, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options |= {"accumulate_steps": micro_batches, "clip_grad": 0.5}
    step = TrainStep(parallel, OutputLoss(F.cross_entropy), optimizer, device, **options)
    torch.manual_seed(1 + processes.rank())
    losses = [step((torch.randn(4, 3, 32, 32), torch.arange(4)))[0] for _ in range(6)]
    return torch.stack(losses)

for micro_batches in (1, 2):
    ours = train(plain, plain, micro_batches, cuda_graph=device.type == "cuda")
    theirs = train(processes.data_parallel(model, device), model, micro_batches)
    assert torch.equal(ours, theirs), (ours, theirs)
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    losses = processes.all_gather(ours)
    assert not torch.equal(losses[0], losses[1])
    hashes = processes.gather([p.double().sum().item() for p in plain.parameters()])
    assert hashes[0] == hashes[1]
# 3 steps of 4 images by 2 processes in 100 seconds, of which most were before the run went on.
step = TrainStep(plain, OutputLoss(F.cross_entropy), torch.optim.AdamW(plain.parameters()), device)
batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))] * 2
numbers = train_one_epoch(step, batches, 0, 1, lambda: None, EpochSums(steps=1, images=4, seconds=100.0))
assert 24 / 150 < numbers["img_per_s"] < 24 / 100, numbers
if processes.rank() == 1:
    plain.norm.bias.requires_grad = False
try:
    train(plain, plain, 1)
except ValueError as error:
    print(error)
processes.stop()
"""


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_gradients_that_the_step_averages(kind, tmp_path, ranks):
    """Bit for bit what DDP makes of them, micro-batches included."""
    if kind == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("graphs of two processes need two GPUs")
    result = ranks(tmp_path, AVERAGED, kind)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("all processes must train the same parameters") == 2


@pytest.mark.parametrize(
    ("text", "small"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)", True),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...", True),
        ("unable to write to file </torch_1_2_0>: No space left on device (28)", True),
        ("[Errno 28] No space left on device: 'out/checkpoint.pth'", False),
        ("out of resource: shared memory, Required: 232448, Hardware limit: 101376", False),
        ("CUDA out of memory", False),
    ],
)
def test_a_small_dev_shm_is_told_from_other_failures(text, small):
    """PyTorch's messages where /dev/shm is full. A full disk and a kernel's memory are other matters."""
    assert processes.lacks_shared_memory(RuntimeError(text)) is small


STOPS = """
import os
import torch, torch.distributed as dist
from torch import nn
from runtime import processes

def train():
    parallel = processes.data_parallel(nn.Linear(3, 2), device)
    parallel(torch.ones(4, 3)).sum().backward()
    parallel.itself = parallel
    for _ in range(200):
        dist.all_reduce(torch.ones(300), async_op=True)

def threads():
    return [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]

device = processes.start("cpu")
train()
print(*threads())
processes.stop()
print(*threads())
"""


def test_more_processes_than_gpus_is_a_mistake(monkeypatch):
    there = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "999", "LOCAL_WORLD_SIZE": "999"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"--nproc-per-node must be at most the number of GPUs, \d, got 999"):
        processes.start("cuda")


def test_no_thread_of_the_process_group_outlives_it(tmp_path, ranks):
    """One that lets go of a tensor while Python shuts down ends the process by SIGABRT, here every other time."""
    result = ranks(tmp_path, STOPS, processes=1)
    assert result.returncode == 0, result.stderr
    before, after = result.stdout.splitlines()
    assert "gloo" in before and "gloo" not in after
