"""Checkpoints: one file with everything a run needs to go on, loaded without unpickling code."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from quantization.export.trained import FORMAT, VERSION
from quantization.reference import NUMERICS
from runtime import processes, sharding
from runtime.errors import UserError
from runtime.files import replacing
from runtime.rng import rng_state, set_rng_state
from training.run_files import BEST_CHECKPOINT, LAST_CHECKPOINT, LOG

if TYPE_CHECKING:
    from engine import EpochSums
    from quantization import Remedies

LAST, BEST = LAST_CHECKPOINT, BEST_CHECKPOINT
EARLIER = re.compile(r"earlier_checkpoint_([1-9]\d*)\.pth")  # 1 is the one before the last
PARTS = ("identity", "model", "optimizer", "scheduler", "epoch", "best_acc1", "rng", "sums", "more", "within")
"""The keys without which a file is refused. `RunState._state` also writes format, version, options and model_ema."""


class Damaged(UserError):
    """The file is not a checkpoint of this program, or is damaged."""


@dataclass
class RunState:
    """The state of a run: objects with a `state_dict`, and the counters of the epoch loop."""

    identity: dict
    """Settings that must agree for the weights and the optimizer state to fit: model, recipe, optimizer, ..."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: object
    model_ema: nn.Module | None
    sums: EpochSums
    """The sums of the epoch that has begun, on this process."""
    epoch: int = 0
    """Epochs done."""
    best_acc1: float = 0.0
    more: dict[str, object] = field(default_factory=dict)
    """Further objects with a `state_dict`, by name. What an older checkpoint lacks of them stays as it was."""
    within: dict[str, object] = field(default_factory=dict)
    """Objects of the main process whose `state_dict` matters only within an epoch."""
    keep: int = 2
    """Number of last checkpoints that are kept, besides the best one."""
    options: dict[str, object] = field(default_factory=dict)
    """The run's options by name, which an evaluation of the checkpoint takes as its defaults."""

    def save(self, directory: Path, best: bool = False) -> None:
        """Write the last checkpoint, and the best one too if asked; all processes must call it."""
        state = self._state()
        if processes.is_main():
            if best:  # first, because the last checkpoint refers to it
                write(state, directory / BEST)
            write(state, directory / LAST, self.keep)
        # A rank that ends before the file is written would make torchrun end the one that writes it.
        processes.wait_for_all()

    def save_best(self, directory: Path) -> None:
        """Write the best checkpoint alone; all processes must call it."""
        state = self._state()
        if processes.is_main():
            write(state, directory / BEST)
        processes.wait_for_all()

    def _state(self) -> dict:
        """The content of a checkpoint, complete on the main process. Every process must call it."""
        generators, sums = zip(*processes.gather((rng_state(), self.sums.state_dict())))
        model, optimizer = sharding.gathered(self.model.state_dict()), sharding.gathered(self.optimizer.state_dict())
        model_ema = None if self.model_ema is None else sharding.gathered(self.model_ema.state_dict())
        return {
            "format": FORMAT,
            "version": VERSION,
            "numerics": NUMERICS,
            "identity": self.identity,
            "options": self.options,
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "model_ema": model_ema,
            "epoch": self.epoch,
            "best_acc1": self.best_acc1,
            "rng": list(generators),
            "sums": list(sums),
            "more": {name: part.state_dict() for name, part in self.more.items()},
            "within": {name: part.state_dict() for name, part in self.within.items()} if self.sums.steps else {},
        }

    def restore(self, state: dict) -> None:
        """Restore `state`, which `load` returned. Raises UserError if this run has another number of processes.

        A checkpoint of other numerics is restored with a note, because the run that goes on is not the one that was
        begun.
        """
        with _damage_is_told():
            self._restore(state)
        theirs = state.get("numerics", 1)  # checkpoints without the key are older than it
        if theirs != NUMERICS:
            processes.say(
                f"note    the checkpoint has numerics {theirs}, this program {NUMERICS}: quantizers draw other random "
                "bits now, so the run goes on, but not with the numbers that it would have had"
            )

    def _restore(self, state: dict) -> None:
        if len(state["rng"]) != processes.world_size():
            raise UserError(
                f"--resume needs the number of processes of the checkpoint, {len(state['rng'])}, "
                f"got {processes.world_size()}; start as many, or start anew with --finetune"
            )
        ours, theirs = (
            [len(group["params"]) for group in groups]
            for groups in (self.optimizer.param_groups, state["optimizer"]["param_groups"])
        )
        if ours != theirs:
            raise UserError(
                f"--resume needs an optimizer with the same groups of parameters, {ours}, the checkpoint has {theirs}: "
                "in older runs tokens and position embeddings had weight decay; start anew with --finetune"
            )
        sharding.load_model(self.model, state["model"])
        sharding.load_optimizer(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.model_ema is not None:
            sharding.load_model(self.model_ema, state["model_ema"])
        stored = state["more"] | {"remedies": _remedies_of(state)}
        for name, part in self.more.items():
            if name in stored:  # an older checkpoint lacks parts that were added since
                part.load_state_dict(stored[name])
        for name, part in self.within.items():
            if name in state["within"]:
                part.load_state_dict(state["within"][name])
        self.epoch, self.best_acc1 = state["epoch"], state["best_acc1"]
        self.sums.load_state_dict(state["sums"][processes.rank()])
        set_rng_state(state["rng"][processes.rank()])


@contextmanager
def _damage_is_told() -> Iterator[None]:
    """Whatever goes wrong with values of another structure becomes a UserError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError("--resume found a damaged checkpoint, of which parts are missing; give another") from error


def restore_remedies(remedies: Remedies, state: dict) -> None:
    """Load the state that a checkpoint has of the remedies into them. Raises UserError for a damaged checkpoint."""
    with _damage_is_told():
        remedies.load_state_dict(_remedies_of(state))


def _remedies_of(state: dict) -> dict[str, dict]:
    """The state of each remedy in a checkpoint, by the remedy's name.

    Older checkpoints have that of dampening, freezing or OsciReset under one key, whichever of them the run had.
    """
    more = state["more"]
    if "oscillation" in more:
        return dict.fromkeys(("dampen", "freeze", "osci_reset"), more["oscillation"])
    return more.get("remedies", {})


def write(state: dict, path: Path, keep: int = 1) -> None:
    """Put `state` into `path`, and the `keep` - 1 files that were there before into earlier_checkpoint_1.pth and so on.

    A reader, also one after a crash of the program or the machine, finds old files or new ones, never half a file.
    After a crash between the renames `path` is missing, but earlier_checkpoint_1.pth is there.
    """
    with replacing(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # PyTorch's, if the disk is full
            reason = str(error).splitlines()[0]
            raise OSError(f"{path} could not be written: {reason}; is the disk full?") from error
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep > 1 and zipfile.is_zipfile(path):  # a truncated file is not worth a place
            for number, earlier in reversed(_all_earlier(path.parent)):
                if number < keep - 1:
                    os.replace(earlier, _earlier(path, number + 1))
            os.replace(path, _earlier(path, 1))
    if path.name == LAST:
        for _, extra in _all_earlier(path.parent)[keep - 1 :]:
            extra.unlink()
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new names
    finally:
        os.close(directory)


def find_all(directory: Path) -> list[Path]:
    """The last checkpoint of a run and those before it, the newest first."""
    earlier = (path for _, path in _all_earlier(directory))
    return [path for path in (directory / LAST, *earlier) if path.is_file()]


def stamps(directory: Path) -> dict[str, int]:
    """Modification time of each checkpoint in `directory`, to notice that another process has written there."""
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.pth")}


def holds_a_run(directory: Path) -> bool:
    """Return True if a new run in `directory` would overwrite another one, even one without a checkpoint."""
    log = directory / LOG
    return bool(find_all(directory)) or (directory / BEST).is_file() or log.is_file() and log.stat().st_size > 0


def _earlier(path: Path, number: int) -> Path:
    return path.with_name(f"earlier_{path.stem}_{number}{path.suffix}")


def _all_earlier(directory: Path) -> list[tuple[int, Path]]:
    """Earlier checkpoints with their numbers, the newest first."""
    return sorted((int(match[1]), p) for p in directory.glob("*.pth") if (match := EARLIER.fullmatch(p.name)))


def options_of(path: Path) -> dict[str, object]:
    """The options and settings of the run that left a checkpoint; {} if the file cannot be read, which `load` tells.

    A checkpoint from before the options were stored has only its identity's settings, under their own keys.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state.get("options") or state["identity"]
    except Exception:  # whatever reading foreign bytes may raise
        return {}


def load_newest(paths: list[Path], identity: dict, implied: Mapping[str, object] | None = None) -> tuple[Path, dict]:
    """Load the first of `paths` that is intact. Prints a note if that is not the first one.

    Raises UserError if none is intact, or if it belongs to a run with another `identity`.
    """
    for path, following in zip(paths, [*paths[1:], None]):
        try:
            return path, load(path, identity, implied)
        except Damaged:
            if following is None:
                raise
            processes.say(f"note    {path} is damaged or not ours; going on from the one before, {following}")
    raise ValueError("need at least one path, got none")


def load(path: Path, identity: dict, implied: Mapping[str, object] | None = None) -> dict:
    """The content of a checkpoint of ours, on the CPU.

    An older checkpoint's identity may lack a key; `implied` has the value that all older runs had.
    Raises UserError for a file that is missing, unreadable, not ours, or of a run whose `identity` differs.
    """
    state = read(path)
    if _differ(FORMAT, state.get("format")) or _differ(VERSION, state.get("version")):
        raise Damaged(
            f"--resume needs a checkpoint of this program, version {VERSION}; {path} is not one. "
            "Weights of a stock model go to --finetune"
        )
    theirs = state.get("identity")
    whole = isinstance(theirs, dict) and isinstance(state.get("model"), dict) and all(part in state for part in PARTS)
    if not whole or not isinstance(state.get("numerics", 1), int):
        raise Damaged(f"--resume found {path} damaged, parts of it are missing; give another file")
    theirs = dict(implied or {}) | theirs
    different = [name for name in identity if _differ(identity[name], theirs.get(name))]
    if different:
        name = different[0]
        if name == "classes":
            raise UserError(
                f"--resume {path} was trained on other classes: {first_difference(identity[name], theirs.get(name))}"
            )
        raise UserError(
            f"--resume needs a checkpoint of the same {name}: this run has {_short(identity[name])}, "
            f"{path} has {_short(theirs.get(name))}; change the options or start anew with --finetune"
        )
    return state


def first_difference(ours: tuple[str, ...] | None, theirs: tuple[str, ...] | None) -> str:
    """The first label whose class has another name."""
    ours, theirs = (tuple(names or ()) for names in (ours, theirs))
    label = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
    now, then = (names[label] if label < len(names) else "none" for names in (ours, theirs))
    return f"label {label} is {now} here and was {then}; give the data with the checkpoint's folders"


def _load_whole(path: Path) -> object:
    """The file's content. Every byte is compared with its checksums, which PyTorch writes but does not check."""
    with zipfile.ZipFile(path) as archive:
        if (name := archive.testzip()) is not None:
            raise zipfile.BadZipFile(name)
    return torch.load(path, map_location="cpu", weights_only=True)


def read(path: Path, load: Callable[[Path], object] = _load_whole) -> dict:
    """The dict in a file, as `load` reads it.

    Raises UserError for a file that is missing, and Damaged if `load` fails or returns something else.
    """
    if not path.is_file():
        raise UserError(f"a checkpoint must be a file, got {path}, which is not one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickle protocols
            state = load(path)
    except Exception as error:  # whatever unpickling foreign bytes may raise
        raise Damaged(f"{path} is not a readable checkpoint: damaged, or of another program; give another") from error
    if not isinstance(state, dict):
        raise Damaged(f"{path} is not a checkpoint: it holds a {type(state).__name__}; give another file")
    return state


def _differ(ours: object, theirs: object) -> bool:
    return isinstance(theirs, torch.Tensor) or ours != theirs  # a tensor compares element by element


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 240 else text[:237] + "..."  # a recipe without a name takes 120 to 230
