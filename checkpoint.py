"""Checkpoints: one file with everything a run needs to go on, loaded without unpickling code."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import distributed
import sharding
from errors import UserError
from quantization.snapshot import rng_state, set_rng_state

FORMAT = "tetrajet-checkpoint"
VERSION = 1
LAST, BEST = "checkpoint.pth", "best_checkpoint.pth"


@dataclass
class Run:
    """What a checkpoint holds: objects with a `state_dict`, and the numbers of the epoch loop."""

    identity: dict
    """What must be the same for weights and optimizer state to mean the same: model, recipe, optimizer, ..."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: object
    model_ema: nn.Module | None
    epoch: int = 0
    """Epochs done."""
    best_acc1: float = 0.0
    more: dict[str, object] = field(default_factory=dict)
    """Further objects with a `state_dict`, by name."""

    def save(self, directory: Path, best: bool) -> None:
        """Write the last checkpoint, and the best one too if asked; all processes must call it."""
        generators = distributed.gather(rng_state())
        model, optimizer = sharding.gathered(self.model.state_dict()), sharding.gathered(self.optimizer.state_dict())
        model_ema = None if self.model_ema is None else sharding.gathered(self.model_ema.state_dict())
        if distributed.is_main():
            self._write(directory, best, model, optimizer, model_ema, generators)
        # A rank that ends before the file is written would make torchrun end the one that writes it.
        distributed.wait_for_all()

    def _write(
        self, directory: Path, best: bool, model: dict, optimizer: dict, model_ema: dict | None, generators: list[dict]
    ) -> None:
        state = {
            "format": FORMAT,
            "version": VERSION,
            "identity": self.identity,
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "model_ema": model_ema,
            "epoch": self.epoch,
            "best_acc1": self.best_acc1,
            "rng": generators,
            "more": {name: part.state_dict() for name, part in self.more.items()},
        }
        for name in (LAST, BEST) if best else (LAST,):
            temporary = directory / f".{name}.part"
            torch.save(state, temporary)
            os.replace(temporary, directory / name)  # a reader sees the old file or the new one, never half of one

    def restore(self, state: dict) -> None:
        """Go on from `state`, which `load` returned. Raises UserError if this run has another number of processes."""
        try:
            self._restore(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError("--resume found a damaged checkpoint, of which parts are missing; give another") from error

    def _restore(self, state: dict) -> None:
        if len(state["rng"]) != distributed.world_size():
            raise UserError(
                f"--resume needs the number of processes of the checkpoint, {len(state['rng'])}, "
                f"got {distributed.world_size()}; start as many, or start anew with --finetune"
            )
        sharding.load_model(self.model, state["model"])
        sharding.load_optimizer(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.model_ema is not None:
            sharding.load_model(self.model_ema, state["model_ema"])
        for name, part in self.more.items():
            part.load_state_dict(state["more"][name])
        self.epoch, self.best_acc1 = state["epoch"], state["best_acc1"]
        set_rng_state(state["rng"][distributed.rank()])


def load(path: Path, identity: dict) -> dict:
    """The content of a checkpoint of ours, on the CPU.

    Raises UserError for a file that is missing, unreadable, not ours, or of a run whose `identity` differs.
    """
    state = _read(path)
    if state.get("format") != FORMAT or state.get("version") != VERSION:
        raise UserError(
            f"--resume needs a checkpoint of this program, version {VERSION}; {path} is none. "
            "Weights of a stock model go to --finetune"
        )
    theirs = state.get("identity")
    if not isinstance(theirs, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"--resume found {path} damaged, parts of it are missing; give another file")
    different = [name for name in identity if identity[name] != theirs.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"--resume needs a checkpoint of the same {name}: this run has {_short(identity[name])}, "
            f"{path} has {_short(theirs.get(name))}; change the options or start anew with --finetune"
        )
    return state


def load_weights(model: nn.Module, path: Path, option: str = "--finetune", new_head: bool = True) -> None:
    """Start from the weights in `path`: ours, Facebook's DeiT checkpoints, or a bare state_dict.

    With `new_head`, a head for another number of classes keeps its random values. Raises UserError, which names
    `option`, if anything else does not fit.
    """
    state = _read(path)
    weights = state.get("model", state)
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        raise UserError(f"{option} needs a file of weights, or one with them under 'model'; {path} is neither")
    own = model.state_dict()
    weights = {
        name: value
        for name, value in weights.items()
        if not (new_head and name.startswith("head") and name in own and own[name].shape != value.shape)
        and not (name.endswith((".weight_ema", ".ema_updates", ".input_step", ".weight_step")) and name not in own)
    }
    kept = {name for name in own if name.startswith("head") and name not in weights}
    try:
        missing = set(model.load_state_dict(weights, strict=False).missing_keys) - kept
        unexpected = sorted(weights.keys() - own.keys())
    except RuntimeError as error:  # a shape that differs
        raise UserError(f"{option} {path} does not fit the model: {str(error).splitlines()[1].strip()}") from error
    if missing or unexpected:
        what = f"it lacks {sorted(missing)[0]}" if missing else f"it has {unexpected[0]}, which the model lacks"
        raise UserError(f"{option} {path} does not fit the model: {what}; choose the model that it was made for")


def _read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"a checkpoint must be a file, got {path}, which is none")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling foreign bytes may raise
        raise UserError(f"{path} is not a readable checkpoint: damaged, or of another program; give another") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(state).__name__}; give another file")
    return state


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 240 else text[:237] + "..."  # a recipe without a name takes 120 to 230
