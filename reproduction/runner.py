"""Runs training runs: several at once, each in its own process, shared out over the GPUs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from reproduction.runs import Run, executable, read_log, shell, write_record
from runtime.environment import environment
from training.options import parse_args

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = "output.txt"
TAIL = 8  # lines of a failed run's output that are shown
PLACES = ("data_path", "output_dir", "resume")  # of this machine, not of the configuration
GRACE = 20  # seconds that an interrupted run gets to end by itself


@dataclass(frozen=True)
class Machine:
    """The GPUs and cores among which runs are shared out."""

    gpus: tuple[str, ...]
    """The GPUs' names, as CUDA_VISIBLE_DEVICES takes them."""
    jobs: int
    environment: dict[str, str]

    def slot_gpus(self, slot: int, many: bool) -> tuple[str, ...]:
        """The GPUs of one of the `jobs` slots: one, or with `many` its whole share."""
        if not many or self.jobs >= len(self.gpus):
            return self.gpus[slot % len(self.gpus) :][:1] if self.gpus else ()
        share = len(self.gpus) // self.jobs
        return self.gpus[slot * share : (slot + 1) * share]


def this_machine(jobs: int | None, torchrun: bool) -> Machine:
    """The GPUs, the number of jobs at once, and the versions.

    If `jobs` is None: one job per GPU, a single one if a run takes all GPUs, and one per core, up to 4, without a GPU.
    """
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = tuple(visible.split(",")[:count] if visible else map(str, range(count)))
    if jobs is None:
        jobs = 1 if torchrun and gpus else len(gpus) or min(os.cpu_count() or 1, 4)
    return Machine(gpus, jobs, environment())


@dataclass
class Job:
    run: Run
    slot: int
    directory: Path
    command: list[str]
    process: subprocess.Popen
    started: float


def start(run: Run, out: Path, slot: int, machine: Machine, data_path: Path | None) -> Job:
    """Start a run, or go on with it, in its own directory and session."""
    directory = out / run.name
    gpus = machine.slot_gpus(slot, run.protocol.torchrun)
    processes = max(1, len(gpus))
    command = executable(run.command(processes, str(data_path)))
    directory.mkdir(exist_ok=True)
    env, where = dict(os.environ), machine.environment
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        where = where | {"device": f"{len(gpus)} x {where['device']}"}
    options = parse_args([*run.arguments(processes), *run.data_arguments(str(data_path))]).flat()
    options = {name: value for name, value in options.items() if name not in PLACES}
    write_record(run, directory, run.command(processes), options, where)
    if processes > 1 or machine.jobs > 1:  # torch takes every core for itself
        threads = max(1, (os.cpu_count() or 1) // (processes * machine.jobs))
        env.setdefault("OMP_NUM_THREADS", str(threads))
    with open(directory / OUTPUT, "ab") as output:
        process = subprocess.Popen(
            [*command, "--output-dir", str(directory), "--resume", "auto"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a ctrl-C in the terminal reaches this process alone, which stops the others
        )
    return Job(run, slot, directory, run.command(processes), process, time.monotonic())


def execute(runs: list[Run], done: int, out: Path, machine: Machine, data_path: Path | None) -> int:
    """Run all `runs`, next to `done` finished ones; returns how many failed. A failure does not stop the others.

    An exception, KeyboardInterrupt among them, stops the running ones, which can be resumed.
    """
    waiting, slots, active, failed = deque(runs), list(range(machine.jobs)), [], 0
    with tqdm(total=len(runs) + done, initial=done, desc="runs", dynamic_ncols=True) as bar:
        try:
            while waiting or active:
                while waiting and slots:
                    active.append(start(waiting.popleft(), out, slots.pop(0), machine, data_path))
                for job in [job for job in active if job.process.poll() is not None]:
                    active.remove(job)
                    slots.append(job.slot)
                    failed += not _report(job, bar)
                    bar.update()
                if bar.fp.isatty():
                    epochs = (f"{job.run.epochs_done(job.directory)}/{job.run.protocol.epochs}" for job in active)
                    bar.set_postfix_str("epochs " + ", ".join(epochs) if active else "")
                time.sleep(0.5)
        finally:
            stop(active)
    return failed


def _report(job: Job, bar: tqdm) -> bool:
    """One line for a run that ended well, command and last lines for one that did not; returns which."""
    seconds = time.monotonic() - job.started
    if job.process.returncode == 0 and job.run.finished(job.directory):
        top1 = read_log(job.directory)[-1]["test_acc1"]
        bar.write(f"{job.run.name}: top-1 {top1:.2f} %, {seconds:.0f} s")
        return True
    lines = re.split(r"[\r\n]+", (job.directory / OUTPUT).read_text(encoding="utf-8", errors="replace").strip())
    tail = "\n".join(f"    {line.rstrip()}" for line in lines[-TAIL:])
    bar.write(f"FAILED with exit code {job.process.returncode}: {shell(job.command)}\n{tail}")
    bar.write(f"    see {job.directory / OUTPUT}")
    return False


def stop(jobs: list[Job]) -> None:
    """Interrupt the jobs as ctrl-C would; kill what still runs after GRACE seconds."""
    for job in jobs:
        job.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    for job in jobs:
        try:
            job.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)  # its loaders and ranks, if any are left
            job.process.wait()
