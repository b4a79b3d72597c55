"""The model in a checkpoint of main.py, built anew from the options that the checkpoint holds."""

from __future__ import annotations

import importlib
import warnings
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..formats import GROUP_SIZE
from ..recipe import RECIPE_CHANGES, Int4Recipe, Recipe, changed_recipe
from ..remedies.base import REMEDIES, Remedies, RunLength
from ..swap import quant_linears, swap_linears
from .description import create

FORMAT = "tetrajet-checkpoint"
VERSION = 2
"""What a checkpoint of main.py says of itself."""
FLOAT_MODEL = "train with --quant mxfp4 for a model with 4-bit weights"


@dataclass(frozen=True)
class Trained:
    model: nn.Module
    """Its quantized layers are `QuantLinear`s, in evaluation mode on the CPU."""
    architecture: str
    model_args: dict[str, object]
    source: dict[str, object]
    """What an export tells of the run."""


def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint of main.py; no code in it is executed, and its checksums are compared.

    Raises ValueError for a file that is missing, damaged, not ours, or from before options were stored.
    """
    if not path.is_file():
        raise ValueError(f"CHECKPOINT must be a file that main.py has written, got {path}, which is not a file")
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(damaged)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever reading foreign bytes may raise
        raise ValueError(f"{path} is damaged or no checkpoint of main.py; give another file") from error
    if not isinstance(state, dict) or (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} is no checkpoint of main.py, version {VERSION}; give one that main.py has written")
    if not state.get("options"):
        raise ValueError(f"{path} is older than the options in checkpoints; go on with main.py --resume, then export")
    return state


def trained_model(path: Path, weights: str = "model") -> Trained:
    """The model that `main.py --eval --resume path --weights weights` evaluates.

    Raises ValueError for a file that is not ours, for a model without 4-bit weights, and for `weights="ema"` if the
    file has no average of the model.
    """
    state = read_checkpoint(path)
    try:
        options, identity = state["options"], state["identity"]
        length = RunLength(int(options["epochs"]), steps_per_epoch=0)
        defaults = {f.name: f.default for remedy in REMEDIES.values() for f in fields(remedy.options)}
        remedies = Remedies.from_options(SimpleNamespace(**(defaults | options)), length)
        recipe = _recipe_of(path, options, remedies)
        if (recipe.describe(), GROUP_SIZE) != (identity["recipe"], identity.get("group size", GROUP_SIZE)):
            raise ValueError(f"{path} was trained with the recipe {identity['recipe']}, which its options do not give")
        name, model_args = identity["model"], _model_args(identity)
        model = swap_linears(create(name, model_args), recipe)
        remedies.change_model(model)
        remedies.load_state_dict(state["more"].get("remedies", {}))
        source = {"weights": weights, "recipe": recipe.describe(), "epochs_done": state["epoch"]}
        source |= {key: identity.get(key) for key in ("input size", "mean", "std", "classes")}
        tensors = _weights_of(path, state, weights)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, parts of it are missing; give another file") from error
    if any(layer.high_precision for layer in quant_linears(model).values()):
        raise ValueError(
            f"{path} is healed: from epoch {options['heal']} on its linears multiply in high precision, so it is no "
            "4-bit model; export a checkpoint from before that epoch, or train without --heal"
        )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).partition("\n")[2].strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"{path} does not fit timm's {name}: {reason}; install the timm of its run") from error
    return Trained(model.eval(), name, model_args, source)


def _recipe_of(path: Path, options: dict[str, object], remedies: Remedies) -> Recipe:
    recipe = changed_recipe(options["quant"], **{name: options.get(name) for name in RECIPE_CHANGES})
    if isinstance(recipe, Int4Recipe):
        raise ValueError(f"{path} was trained with --quant int4, which is simulated; {FLOAT_MODEL}")
    if not recipe.quantizes:
        raise ValueError(f"{path} was trained in full precision, so there is nothing in 4 bits; {FLOAT_MODEL}")
    return remedies.change_recipe(recipe)


def _model_args(identity: dict[str, object]) -> dict[str, object]:
    """Arguments of `timm.create_model`: the image size only if it is not the model's own and the model takes one."""
    timm = importlib.import_module("timm")
    name, size = identity["model"], identity["input size"]
    arguments = {"num_classes": identity["number of classes"]}
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None or size == config.input_size[-1]:
        return arguments
    try:
        create(name, arguments | {"img_size": size})
    except ValueError as error:
        if "img_size" not in str(error.__cause__):
            raise
        return arguments
    return arguments | {"img_size": size}


def _weights_of(path: Path, state: dict, weights: str) -> dict[str, Tensor]:
    if weights == "model":
        return state["model"]
    if state["model_ema"] is None:
        raise ValueError(f"--weights ema needs a checkpoint with the model's average, {path} has none; drop it")
    return {name.removeprefix("module."): value for name, value in state["model_ema"].items()}
