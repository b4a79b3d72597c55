"""The training runs behind a target: what each is called, how it is started, whether it is finished."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import DATA_SETS
from quantization.reference import NUMERICS
from reproduction.protocols import ModelSettings, Protocol
from reproduction.targets import Row, Target
from runtime.errors import UserError
from runtime.files import replacing
from tracking.oscillation_csv import FILE_NAME as OSCILLATION
from training.run_files import LOG

RECORD = "reproduction.json"
DATA_PATH = "$DATA_PATH"


@dataclass(frozen=True)
class Run:
    """One call of main.py."""

    protocol: Protocol
    setup: ModelSettings
    options: tuple[str, ...]
    """The row's own options."""
    seed: int
    tracked: bool

    @property
    def configuration(self) -> tuple[str, ...]:
        """All that decides its numbers but the seed; neither where the data is nor on how many GPUs it runs.

        Tracking oscillation is left out: it looks at the training without changing it.
        """
        return self._configuration(self.protocol.options)

    @property
    def configurations(self) -> list[tuple[str, ...]]:
        """Its configuration, then those that the protocol gave it earlier."""
        return [self._configuration(options) for options in (self.protocol.options, *self.protocol.earlier)]

    def _configuration(self, options: str) -> tuple[str, ...]:
        common = ("--data-set", self.protocol.data_set, "--model", self.setup.model)
        common += ("--epochs", str(self.protocol.epochs), "--lr", str(self.setup.lr))
        own = (*options.split(), *self.setup.options.split(), *self.options)
        return (*common, *own, "global batch", str(self.setup.global_batch))

    @property
    def name(self) -> str:
        """A directory name: model, row's options, seed, and a hash of everything."""
        parts = [self.setup.model, *(part.removeprefix("--") for part in self.options if part != "--quant")]
        parts += ["tracked"] * self.tracked + [f"seed{self.seed}"]
        identity = json.dumps([self.configuration, self.seed, self.tracked])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        return re.sub(r"[^\w.=,-]", "_", "_".join((*parts, digest)))

    @property
    def record(self) -> dict:
        """The values that identify the run in its directory."""
        return {"configuration": list(self.configuration), "seed": self.seed, "tracked": self.tracked}

    def arguments(self, processes: int = 1) -> list[str]:
        """main.py's, without --data-path, --output-dir and --resume. Raises UserError if the batch cannot be shared."""
        if self.setup.global_batch % processes:
            raise UserError(
                f"a batch of {self.setup.global_batch} images must divide among the processes, got {processes} GPUs "
                "a run; set CUDA_VISIBLE_DEVICES or --jobs"
            )
        arguments = list(self.configuration[:-2])
        arguments += ["--batch-size", str(self.setup.global_batch // processes)]
        return arguments + ["--track-oscillation"] * self.tracked + ["--seed", str(self.seed)]

    def command(self, processes: int = 1, data_path: str = DATA_PATH) -> list[str]:
        """The whole command, but for where it writes."""
        launcher = ["torchrun", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else ["python"]
        return [*launcher, "main.py", *self.arguments(processes), *self.data_arguments(data_path)]

    def data_arguments(self, data_path: str) -> list[str]:
        return ["--data-path", data_path] if DATA_SETS[self.protocol.data_set].needs_path else []

    def epochs_done(self, directory: Path) -> int:
        """The number of epochs in the log of `directory`."""
        lines = read_log(directory)
        return lines[-1]["epoch"] + 1 if lines else 0

    def finished(self, directory: Path) -> bool:
        done = self.epochs_done(directory) == self.protocol.epochs
        return done and (not self.tracked or oscillation_file(directory) is not None)


def oscillation_file(directory: Path) -> Path | None:
    """The file of a tracked run's measurements, gzipped or not, or None if there is none."""
    places = (directory / OSCILLATION, directory / f"{OSCILLATION}.gz")
    return next((place for place in places if place.is_file()), None)


def shell(command: list[str]) -> str:
    """The command as one types it."""
    return " ".join(f'"{DATA_PATH}"' if part == DATA_PATH else shlex.quote(part) for part in command)


def executable(command: list[str]) -> list[str]:
    """The same by this interpreter, whatever the PATH."""
    launcher = [sys.executable] if command[0] == "python" else [sys.executable, "-m", "torch.distributed.run"]
    return [*launcher, *command[1:]]


def read_log(directory: Path) -> list[dict]:
    """The epochs of a run; none if there is no log. A last line that a crash cut short does not count."""
    try:
        lines = (directory / LOG).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def columns(target: Target, protocol: Protocol) -> dict[str, ModelSettings]:
    """The paper's models that the target shows under this protocol: models with the same setup stand for one another.

    The first one gives the paper's numbers. A figure shows its first model alone.
    """
    shown: dict[str, ModelSettings] = {}
    for model in target.models:
        if model in protocol.setups and protocol.setups[model] not in shown.values():
            shown[model] = protocol.setups[model]
    return shown


def run_of(target: Target, row: Row, setup: ModelSettings, protocol: Protocol, seed: int = 0) -> Run:
    options = row.options.format(**vars(setup.tuning))
    return Run(protocol, setup, tuple(options.split()), seed, target.tracked)


def plan(targets: list[Target], protocol: Protocol, seeds: int) -> list[Run]:
    """Every run that the targets need, once, the first seed's before the second's.

    Where one target needs a run tracked and another does not, the tracked one serves both.
    """
    runs: dict[Run, None] = {}
    for seed in range(seeds):
        for target in targets:
            for setup in columns(target, protocol).values():
                for row in target.rows:
                    runs[run_of(target, row, setup, protocol, seed)] = None
    return [run for run in runs if run.tracked or replace(run, tracked=True) not in runs]


@dataclass(frozen=True)
class Existing:
    """The runs that a directory holds, by configuration and seed."""

    runs: dict[tuple[tuple[str, ...], int], list[tuple[dict, Path]]]
    numerics: int | None
    """That of all runs; None if there is none."""

    def directories(self, run: Run) -> dict[int, Path]:
        """The directory of a finished run for each seed.

        The newest configuration is preferred, and in it a tracked run.
        """
        found = {}
        for wanted in run.configurations:
            for seed, places in ((seed, places) for (own, seed), places in self.runs.items() if own == wanted):
                for record, directory in sorted(places, key=lambda place: not place[0]["tracked"]):
                    such = replace(run, seed=seed, tracked=record["tracked"])
                    if (record["tracked"] or not run.tracked) and such.finished(directory):
                        found.setdefault(seed, directory)
        return dict(sorted(found.items()))

    def started(self, run: Run) -> bool:
        """True if a run of this row has been started with any seed."""
        return any(
            configuration in run.configurations and any(record["tracked"] or not run.tracked for record, _ in places)
            for (configuration, _), places in self.runs.items()
        )


def existing(out: Path) -> Existing:
    """The runs in `out`. Raises UserError if they differ in their numerics, because no report may pool them."""
    runs: dict = {}
    numerics: dict[int, Path] = {}
    for path in sorted(out.glob(f"*/{RECORD}")):
        record = read_record(path.parent)
        numerics.setdefault(record["numerics"], path.parent)
        runs.setdefault((tuple(record["configuration"]), record["seed"]), []).append((record, path.parent))
    if len(numerics) > 1:
        (first, place), (second, other) = sorted(numerics.items())[:2]
        raise UserError(
            f"runs in one directory must have the same numerics, {place} has {first} and {other} has {second}; "
            "move those of one kind to another --out"
        )
    return Existing(runs, next(iter(numerics), None))


def read_record(directory: Path) -> dict:
    """Raises UserError for a directory that has none, or a damaged one."""
    path = directory / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not {"configuration", "seed", "tracked", "command", "environments"} <= record.keys():
            raise ValueError
        record.setdefault("numerics", 1)  # records without the key are older than it
    except (AttributeError, OSError, ValueError) as error:
        raise UserError(
            f"{directory} must hold a run of this program, its {RECORD} is missing or damaged; "
            "move the directory away or give another --out"
        ) from error
    return record


def check_directory(run: Run, directory: Path) -> None:
    """Raises UserError if the run's directory holds something else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    record = read_record(directory)
    if any(record[name] != value for name, value in run.record.items()):
        raise UserError(
            f"{directory} must hold the run {run.name}, its {RECORD} is of another configuration; "
            "move the directory away or give another --out"
        )


def write_record(run: Run, directory: Path, command: list[str], options: dict, environment: dict[str, str]) -> None:
    """Before the run starts. `options` are all of main.py's, with their defaults.

    A run that goes on elsewhere, or with other versions, has more than one environment.
    """
    environments = read_record(directory)["environments"] if (directory / RECORD).exists() else []
    environments += [environment] if environment not in environments else []
    record = {
        **run.record,
        "numerics": NUMERICS,
        "command": shell(command),
        "options": options,
        "environments": environments,
    }
    with replacing(directory / RECORD) as part:
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def remaining(runs: list[Run], out: Path) -> list[Run]:
    """Those that are not finished. Raises UserError if a directory that one of them needs holds something else.

    The same goes for runs that are to join others of older numerics.
    """
    for run in runs:
        check_directory(run, out / run.name)
    found = existing(out)
    missing = [run for run in runs if run.seed not in found.directories(run)]
    if missing and found.numerics not in (None, NUMERICS):
        raise UserError(
            f"runs in one directory must have the same numerics, {out} holds runs of numerics {found.numerics} and "
            f"this program makes runs of {NUMERICS}; give another --out"
        )
    return missing
