"""scripts/slurm.sh under a scheduler's stand-in: what it starts, how a signal travels, and when a job is requeued."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
# Leaves its options and becomes the command, which is what Slurm's does on one node.
SRUN = """#!/bin/bash
echo "$@" > srun-line
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
# Its list of nodes comes in pieces: who stops reading after the first one breaks the pipe.
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; sleep 0.2; echo node2; else echo "$@" >> scontrol-lines; fi
"""
# A training that exits with its option's code, is killed, or waits for the signal and then has written a checkpoint.
TRAINING = """
import signal, sys, time, os, pathlib
rank = os.environ["RANK"]
signal.signal(signal.SIGUSR1, lambda *_: (pathlib.Path(f"told-{rank}").touch(), sys.exit(75)))
pathlib.Path(f"started-{rank}").write_text(" ".join(sys.argv[1:]))
code = sys.argv[sys.argv.index("--code") + 1]
pathlib.Path("run-id").write_text(os.environ["TORCHELASTIC_RUN_ID"])
if code == "kill": os.kill(os.getpid(), signal.SIGKILL)
if code != "wait": sys.exit(int(code))
time.sleep(60)
"""


@pytest.fixture
def port() -> int:
    """A free one in the script's range, since tests run side by side."""
    while True:
        number = random.randrange(20_000, 40_000)
        with socket.socket() as free:
            try:
                free.bind(("localhost", number))
                return number
            except OSError:
                continue


@pytest.fixture
def job(tmp_path, port):
    """job(*options): the batch script, running as job 20000 + port, which gives it that port."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "main.py").write_text(TRAINING)
    bin_of_python = Path(sys.executable).parent
    env = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{bin_of_python}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(bin_of_python.parent),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(20_000 + port),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_RESTART_COUNT": "3",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }
    started = []

    def start(*options: str) -> subprocess.Popen:
        command = ["bash", "scripts/slurm.sh", *options]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.stderr.close()


def wait_for_training(process: subprocess.Popen, directory: Path) -> None:
    """Until both ranks are there."""
    deadline = time.monotonic() + 120
    while not all((directory / f"started-{rank}").exists() for rank in range(2)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_signal_reaches_training_and_a_written_checkpoint_requeues(job, port, tmp_path):
    process = job("--output-dir", "out", "--code", "wait")
    wait_for_training(process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert all((tmp_path / f"told-{rank}").exists() for rank in range(2))
    assert (tmp_path / "started-0").read_text() == "--output-dir out --code wait --resume auto"
    assert (tmp_path / "run-id").read_text() == f"{20_000 + port}-3"  # other than before the job was requeued
    assert (tmp_path / "scontrol-lines").read_text() == f"requeue {20_000 + port}\n"
    line = (tmp_path / "srun-line").read_text().strip()
    options = "--kill-on-bad-exit=0 --wait=30"
    assert line == f"{options} bash scripts/slurm.sh --node localhost:{port} --output-dir out --code wait"


def test_training_may_end_while_the_signal_travels(job, port, tmp_path):
    """The script passes it on, and by the time that it looks again training has written its checkpoint."""
    slow = tmp_path / "bin" / "pkill"
    slow.write_text('#!/bin/bash\n/usr/bin/env -i PATH=/usr/bin:/bin pkill "$@"\nsleep 5\n')
    slow.chmod(0o755)
    process = job("--output-dir", "out", "--code", "wait")
    wait_for_training(process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert (tmp_path / "scontrol-lines").read_text() == f"requeue {20_000 + port}\n"


def test_any_other_code_is_the_jobs_and_does_not_requeue(job, tmp_path):
    process = job("--output-dir", "out", "--code", "2")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert not (tmp_path / "scontrol-lines").exists()


def test_the_launcher_ended_by_a_signal(job, tmp_path):
    """torchrun's launcher tells its processes by SIGTERM, which leave a checkpoint, and ends with the shell's code."""
    script = TRAINING.replace("SIGUSR1", "SIGTERM")
    (tmp_path / "main.py").write_text(script)
    command = [sys.executable, "scripts/launch.py", "--standalone", "--nproc-per-node", "2"]
    command += ["main.py", "--code", "wait"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for_training(process, tmp_path)
        process.terminate()
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and all((tmp_path / f"told-{rank}").exists() for rank in range(2))
    assert error.endswith("launch.py: SIGTERM has ended it and its processes\n") and "Traceback" not in error


def test_the_launcher_of_a_process_that_is_killed(job, tmp_path):
    """The shell's code for that signal, as of a process without a launcher."""
    command = [sys.executable, "scripts/launch.py", "--standalone", "--nproc-per-node", "1", "main.py"]
    result = subprocess.run([*command, "--code", "kill"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 128 + signal.SIGKILL, result.stderr


def test_a_job_without_output_dir_is_refused(job, tmp_path):
    process = job("--epochs", "3")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "needs --output-dir to find its checkpoint; add it" in error
    assert not (tmp_path / "srun-line").exists()
