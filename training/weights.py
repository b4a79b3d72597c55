"""Weights to start from or to evaluate: files of this program, of timm, DeiT, Swin and Lightning, and safetensors."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Collection
from enum import Enum
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

import timm
from runtime import processes
from runtime.errors import UserError
from training import checkpoint

PLAIN, AVERAGED = ("model", "state_dict"), ("model_ema", "state_dict_ema")
"""Keys under which training programs store the model and its moving average."""
OURS = (".weight_ema", ".ema_updates", ".input_step", ".weight_step")
"""Ends of the names of tensors that only low-precision models have. A file may lack them."""


class Weights(str, Enum):
    """What a file of weights is read for."""

    MODEL = "model"
    EMA = "ema"
    """The moving average of the model's weights."""


def load_weights(
    model: nn.Module,
    path: Path,
    option: str = "--finetune",
    new_head: bool = True,
    which: Weights = Weights.MODEL,
    classes: tuple[str, ...] | None = None,
) -> None:
    """Start from the weights in `path`, of whatever program.

    Raises UserError, which names `option`, if they do not fit the model, or if their head must stay and the file says
    that it is for other classes than `classes`.
    """
    state = read_weights(path)
    identity = state.get("identity")
    theirs = identity.get("classes") if isinstance(identity, dict) else None
    if not new_head and classes and theirs and tuple(theirs) != classes:
        raise UserError(f"{option} {path} was trained on other classes: {checkpoint.first_difference(classes, theirs)}")
    fit_weights(model, state, path, option, new_head, which)


def fit_weights(
    model: nn.Module, state: dict, path: Path, option: str, new_head: bool, which: Weights = Weights.MODEL
) -> None:
    """Put the weights of a file's content, `state`, into the model.

    Names, position embeddings of another resolution and Swin's tables go through timm's own filter for the model. With
    `new_head`, a head for another number of classes keeps its random values. One line on the terminal tells of both.
    Raises UserError if anything else does not fit.
    """
    weights, notes = _chosen(state, model.state_dict().keys(), path, option, which)
    weights, more = _in_names_of(model, weights, f"{option} {path} does not fit the model")
    notes += more
    own = model.state_dict()
    fits = {name for name, value in weights.items() if name in own and own[name].shape == value.shape}
    kept: set[str] = set()
    for head in _heads(model) if new_head else ():
        names = {name for name in own if name.startswith(head) and not name.endswith(OURS)}
        kept |= set() if names <= fits else names  # a head of which a part is missing is none
    weights = {
        name: value
        for name, value in weights.items()
        if name not in kept and not (name.endswith(OURS) and name not in own)
    }
    try:
        missing = set(model.load_state_dict(weights, strict=False).missing_keys) - kept
        unexpected = sorted(weights.keys() - own.keys())
    except RuntimeError as error:  # a shape that differs
        reason = str(error).splitlines()[1].strip().rstrip(".")
        raise UserError(
            f"{option} {path} does not fit the model: {reason}; choose the model and the classes that it was made for"
        ) from error
    if missing or unexpected:
        what = f"it lacks {sorted(missing)[0]}" if missing else f"it has {unexpected[0]}, which the model lacks"
        raise UserError(f"{option} {path} does not fit the model: {what}; choose the model that it was made for")
    if kept:
        notes.append("has no head for these classes; the model's begins at random")
    if notes:
        processes.say(f"note    {path} {'; it '.join(notes)}")


def read_weights(path: Path) -> dict:
    """The content of a file of weights, on the CPU. Nothing in it is executed.

    Besides tensors it may hold an `argparse.Namespace` and NumPy's numbers, which training programs leave there.
    Raises UserError for a file that is missing, unreadable, or holds anything else.
    """
    return checkpoint.read(path, _load)


def _load(path: Path) -> object:
    if _is_safetensors(path):
        return safetensors.torch.load_file(path)
    with torch.serialization.safe_globals(_harmless_globals()):
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_safetensors(path: Path) -> bool:
    """Return True if the file begins as such a file does: the size of a JSON object, in 8 bytes, and the object."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def _harmless_globals() -> list:
    """What PyTorch's restricted unpickler may build besides what it knows: a namespace of options, and NumPy scalars.

    NumPy 1 and 2 store the function that makes a scalar under different names.
    """
    scalar = np.float64(0).__reduce__()[0]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, np.dtype, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}, *names]


def _chosen(
    state: dict, own: Collection[str], path: Path, option: str, which: Weights
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in a file's content, without the prefixes of wrappers; and what the user should know of them."""
    keys = AVERAGED if which is Weights.EMA else (*PLAIN, *AVERAGED)
    key = next((key for key in keys if state.get(key) is not None), None)
    if which is Weights.EMA and key is None:
        raise UserError(f"--weights ema needs a file with the model's average, {path} has none; drop it")
    weights = state if key is None else state[key]
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise UserError(
            f"{option} needs a file of weights, or one with them under 'model' or 'state_dict'; {path} is neither"
        )
    if "pytorch-lightning_version" in state:  # its metrics and losses have entries, too
        weights = {name: value for name, value in weights.items() if name.startswith("model.")} or weights
    alone = key in AVERAGED and which is Weights.MODEL
    notes = [f"has the model's average alone, under {key!r}, which is taken"] if alone else []
    return _without_prefixes(weights, own), notes


def _without_prefixes(weights: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Names as the model has them, without what torch.compile puts before some and a wrapper before all of them.

    DDP puts `module.` there, and Lightning the name of an attribute. No part of the model, `own`, has such a name.
    """
    weights = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    while len(first := {name.partition(".")[0] for name in weights}) == 1:
        prefix = f"{first.pop()}."
        if any(name.startswith(prefix) for name in own) or not all(name.startswith(prefix) for name in weights):
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _in_names_of(model: nn.Module, weights: dict[str, Tensor], problem: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights after timm's filter for this model, if they need it; and what it has interpolated.

    Raises UserError, which begins with `problem`, if they are those of another model.
    """
    own = model.state_dict()
    convert = _timm_filter(model)
    needless = all(name in own and own[name].shape == value.shape for name, value in weights.items())
    if convert is None or needless:
        return dict(weights), []
    try:
        converted = convert(dict(weights), model)
    except Exception as error:  # whatever foreign names and shapes may lead to
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{problem}: {reason}; choose the model that it was made for") from error
    resized = [
        f"{name} from {_size(weights[name])} to {_size(value)}"
        for name, value in converted.items()
        if name in own and name in weights and weights[name].shape != value.shape == own[name].shape
    ]
    more = f" and {len(resized) - 1} more" if len(resized) > 1 else ""
    return converted, [f"is for another resolution; interpolated {resized[0]}{more}"] if resized else []


def _size(value: Tensor) -> str:
    return "x".join(map(str, value.shape))


def _timm_filter(model: nn.Module):
    """timm's function that turns names and shapes of published files into the model's, or None."""
    architecture = (getattr(model, "default_cfg", None) or {}).get("architecture")
    if not timm.is_model(architecture or ""):
        return None
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None or "adapt_layer_scale" not in inspect.signature(convert).parameters:
        return convert
    return lambda weights, model: convert(weights, model, adapt_layer_scale=True)  # DeiT-III's names


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of the classifier's weights; a distilled model has two classifiers."""
    names = (getattr(model, "default_cfg", None) or {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
