"""The command as a user meets it, on real runs of seconds: skipping, failing, resuming, refusing."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from reproduction import runner
from reproduction.__main__ import main
from reproduction.protocols import PROTOCOLS, ModelSettings
from reproduction.runner import Machine
from reproduction.runs import RECORD, executable, plan, shell
from reproduction.targets import TARGETS, Metric, Row, Target
from runtime.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SETUP = ModelSettings("deit_micro_patch4_32", 119, 3e-3, "--input-size 4 --warmup-epochs 0 --device cpu")
TINY = replace(PROTOCOLS["smoke"], epochs=1, setups={"DeiT-T": SETUP})
PAIR = Target(
    "Two rows",
    ("DeiT-T", "Swin-T"),
    (Row("plain", "--quant none", {"DeiT-T": (63.73,)}), Row("hot", "--quant none --lr 1e30")),
    (Metric.TOP1,),
    reference="plain",
)


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """`smoke` is one epoch of twelve steps, `pair` a table of one row that trains and one that diverges."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_PATH", raising=False)
    monkeypatch.setitem(PROTOCOLS, "smoke", TINY)
    monkeypatch.setitem(TARGETS, "pair", PAIR)


def snapshot(directory: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_a_failure_is_told_the_rest_goes_on_and_only_it_runs_again(capsys):
    assert main(["pair", "--out", "out", "--jobs", "2"]) == 1
    printed = capsys.readouterr().out
    good, bad = sorted(Path("out").glob("*_seed0_*"), key=lambda path: "_lr_1e30_" in path.name)
    assert re.search(rf"^{good.name}: top-1 \d+\.\d\d %, \d+ s$", printed, re.MULTILINE)
    assert re.search(r"FAILED with exit code 1: python main\.py .* --lr 1e30 .* --seed 0\n", printed)
    assert "main.py: diverged: loss or gradients were not finite" in printed and "1 of 2 runs failed" in printed
    report = Path("out/pair.md").read_text()
    top1 = json.loads((good / "log.txt").read_text())["test_acc1"]
    assert f"| plain | 63.73 |  | {top1:.2f} (n = 1) |  |" in report and "| hot | - |  | not finished |  |" in report
    assert "Not in this protocol: Swin-T." in report
    record = json.loads((good / RECORD).read_text())
    assert record["options"]["batch_size"] == 119 and record["options"]["weight_decay"] == 0.05  # defaults too
    assert not {"data_path", "output_dir", "resume"} & record["options"].keys()
    assert f"- plain: `{record['command']}`" in report and record["environments"][0]["torch"] in report
    assert "## Two rows" in Path("out/results.md").read_text()

    before = snapshot(good)
    assert main(["pair", "--out", "out"]) == 1
    assert snapshot(good) == before and good.name not in capsys.readouterr().out

    assert main(["pair", "--out", "out", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].endswith("  # finished") and lines[1].endswith(str(bad.resolve()))

    (Path("out") / "pair.md").unlink()
    assert main(["--report-only", "--out", "out"]) == 0
    assert Path("out/pair.md").read_text() == report and snapshot(good) == before

    (good / RECORD).write_text(json.dumps(record | {"seed": 7}))
    before = snapshot(Path("out"))
    capsys.readouterr()
    assert main(["pair", "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"reproduce: error: \S+ must hold the run \S+, its .* is of another configuration; .*\n", error)
    assert snapshot(Path("out")) == before
    (good / RECORD).unlink()
    assert main(["pair", "--out", "out"]) == 2 and "missing or damaged; move" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_it_was(start):
    """ctrl-C reaches the command alone; it stops its runs, and the next command finishes them."""
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has not\n"
        "from dataclasses import replace\n"
        "from reproduction import __main__, protocols, targets\n"
        "smoke = protocols.PROTOCOLS['smoke']\n"
        f"setup = replace(protocols.{SETUP!r}, global_batch=64)\n"
        "protocols.PROTOCOLS['smoke'] = replace(smoke, epochs=4, setups={'DeiT-T': setup})\n"
        "row = targets.Row('plain', '--quant none')\n"
        "targets.TARGETS['one'] = targets.Target('One', ('DeiT-T',), (row,), (targets.Metric.TOP1,), 'plain')\n"
        "sys.exit(__main__.main(['one', '--out', 'out']))\n"
    ).replace("tuning=Tuning(", "tuning=protocols.Tuning(")
    command, deadline = start(Path(), script), time.monotonic() + 120
    while not (saved := list(Path("out").glob("*/checkpoint.pth"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(command.pid, signal.SIGINT)
    result = command.result()
    assert "interrupted; the same command goes on" in result.stderr and result.returncode == 130
    directory = saved[0].parent
    log = directory / "log.txt"
    assert len(log.read_text().splitlines()) < 4
    assert "goes on from the last checkpoint" in (directory / runner.OUTPUT).read_text()
    assert start(Path(), script).result().returncode == 0
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [0, 1, 2, 3]
    assert "resume  " in (directory / runner.OUTPUT).read_text()


def test_seeds_and_targets_that_are_asked_for(capsys):
    """`all` means every target; the first seed's runs come first."""
    assert main(["pair", "--list", "--seeds", "3"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[line.index("--seed") + 1] for line in lines] == ["0", "0", "1", "1", "2", "2"]
    assert main(["all", "--list"]) == 0
    everything = capsys.readouterr().out.splitlines()
    assert len(everything) == len(plan(list(TARGETS.values()), TINY, 1)) > 30


MISTAKES = {
    "target": (["tabel9"], r"TARGET must be one of table1, .*; got 'tabel9', did you mean table9 or"),
    "no target": ([], r"TARGET must be one or more of table1, .*, or all; got none"),
    "protocol": (
        ["table1", "--protocol", "imagnet"],
        r"--protocol must be one of .* 'imagnet', did you mean imagenet\?",
    ),
    "no data": (["table1", "--protocol", "small"], r"--protocol small needs FASHION's files; set DATA_PATH or give"),
    "no directory": (
        ["table1", "--protocol", "small", "--data-path", "nowhere"],
        r"--data-path must be a directory, got \S*nowhere",
    ),
    "no fashion": (["all", "--protocol", "small", "--data-path", "."], r"must hold train-images-idx3-ubyte or .*\.gz"),
    "no imagenet": (
        ["fig2", "--protocol", "imagenet", "--data-path", "."],
        r"must hold train/ and val/, found no train",
    ),
    "path in vain": (["table1", "--data-path", "."], r"--protocol smoke needs no files, got --data-path \.; leave it"),
    "seeds 0": (["table1", "--seeds", "0"], r"--seeds: needs a whole number at least 1, got '0'"),
    "seeds": (["table1", "--seeds", "many"], r"--seeds: needs a whole number at least 1, got 'many'"),
    "jobs": (["table1", "--jobs", "-1"], r"--jobs: needs a whole number at least 1, got '-1'"),
    "no runs": (["--report-only"], r"--report-only needs runs in --out, \S+/runs/reproduce/smoke has none"),
    "out": (["table1", "--out", "a-file"], r"--out must be a directory that can be written, got \S*a-file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_exit_code_2_nothing_written(name, tmp_path, capsys):
    (tmp_path / "a-file").write_text("")
    before = snapshot(tmp_path)
    argv, message = MISTAKES[name]
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == "" and snapshot(tmp_path) == before
    assert re.fullmatch(rf"reproduce: error: .*{message}.*\n", printed.err), printed.err


def test_one_directory_one_command(tmp_path, capsys, busy):
    with busy(tmp_path / "out"):
        assert main(["pair", "--out", "out"]) == 2
    assert "must be free, another process works there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "jobs", "many", "expected"),
    [
        ("", 2, False, ["", ""]),
        ("0", 3, False, ["0", "0", "0"]),
        ("0 1", 3, False, ["0", "1", "0"]),
        ("0 1 2 3", 1, True, ["0 1 2 3"]),
        ("4 5 6 7", 2, True, ["4 5", "6 7"]),
        ("0 1", 4, True, ["0", "1", "0", "1"]),
        ("", 1, True, [""]),
    ],
)
def test_jobs_share_the_gpus(gpus, jobs, many, expected):
    machine = Machine(tuple(gpus.split()), jobs, {})
    assert [" ".join(machine.slot_gpus(slot, many)) for slot in range(jobs)] == expected


@pytest.mark.parametrize(
    ("visible", "count", "jobs", "many", "gpus", "wanted"),
    [
        (None, 3, None, False, "0 1 2", 3),
        (None, 3, None, True, "0 1 2", 1),  # a run takes all of them
        ("5,2,7", 3, None, False, "5 2 7", 3),
        ("5,2,7", 2, 1, False, "5 2", 1),  # of which the third is not there
        ("", 0, None, True, "", 4),
        (None, 0, 2, False, "", 2),
    ],
)
def test_jobs_and_gpus_of_this_machine(visible, count, jobs, many, gpus, wanted, monkeypatch):
    """A machine has as many GPUs as PyTorch finds, named as in the environment; eight cores run four jobs."""
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(runner, "environment", dict)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = runner.this_machine(jobs, many)
    assert (" ".join(machine.gpus), machine.jobs) == (gpus, wanted)


def test_a_run_has_its_own_gpus_and_threads_and_reports_its_last_epoch(tmp_path, monkeypatch, capsys):
    """The second of two jobs on four GPUs and sixteen cores; what is started prints what it was given."""
    script = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setattr(runner, "executable", lambda command: [sys.executable, "-c", script])
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    setups = {"DeiT-T": replace(SETUP, global_batch=120)}
    (run, _) = plan([PAIR], replace(TINY, epochs=2, setups=setups, torchrun=True), seeds=1)
    job = runner.start(run, tmp_path, 1, Machine(("4", "5", "6", "7"), 2, {"device": "abacus"}), None)
    assert job.process.wait(60) == 0
    assert (job.directory / runner.OUTPUT).read_text() == "6,7 4\n"
    record = json.loads((job.directory / RECORD).read_text())
    assert record["environments"] == [{"device": "2 x abacus"}] and record["options"]["batch_size"] == 60
    assert "--nproc_per_node 2 main.py" in record["command"]
    lines = [json.dumps({"epoch": epoch, "test_acc1": top1}) for epoch, top1 in enumerate((70.5, 62.25))]
    with runner.tqdm(total=1) as bar:
        (job.directory / "log.txt").write_text(lines[0] + "\n")
        assert not runner._report(job, bar)
        (job.directory / "log.txt").write_text("\n".join(lines) + "\n")
        assert runner._report(job, bar)
    failed, *_, done = capsys.readouterr().out.splitlines()
    assert failed.startswith("FAILED with exit code 0: torchrun ") and done.startswith(f"{run.name}: top-1 62.25 %, ")


def test_the_global_batch_is_the_papers_on_any_number_of_gpus():
    run = plan([TARGETS["table6"]], PROTOCOLS["imagenet"], seeds=1)[0]
    assert shell(run.command(4)) == (
        "torchrun --standalone --nproc_per_node 4 main.py --data-set IMNET --model deit_base_patch16_224 --epochs 90 "
        '--lr 0.00025 --cuda-graph --quant tetrajet --batch-size 128 --seed 0 --data-path "$DATA_PATH"'
    )
    assert shell(run.command(1)).startswith("python main.py") and "--batch-size 512" in shell(run.command(1))
    assert executable(run.command(4))[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with pytest.raises(UserError, match="512 images must divide among the processes, got 3 GPUs a run; set CUDA_"):
        run.command(3)
