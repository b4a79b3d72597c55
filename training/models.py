"""Builds the model that the options name, and turns what timm cannot do into one line for the user."""

from __future__ import annotations

import difflib

import torch
from timm.layers import to_2tuple
from torch import nn

import timm
from data.base import Preprocessing
from quantization import Coverage, Int4Recipe, Recipe, Status, coverage, swap_linears
from runtime import processes
from runtime.errors import UserError
from timm.models import PretrainedCfg


def model_config(name: str, option: str = "--model") -> PretrainedCfg:
    """timm's configuration of a model. Raises UserError, with the nearest names, if the name or its tag is unknown."""
    try:
        config = (
            timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        )  # an old name, such as xception, has none
    except RuntimeError as error:
        architecture = name.partition(".")[0]
        tags = ", ".join(n for n in timm.list_pretrained() if n.partition(".")[0] == architecture)
        raise UserError(f"{option} {name} has a tag that timm does not know; it knows {tags or 'none'}") from error
    if config is None:
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or ["deit_small_patch16_224"]
        raise UserError(f"{option} must be a model of timm, got {name!r}; did you mean {', '.join(near)}?")
    return config


def model_input_size(name: str, option: str = "--model") -> int:
    """The size in pixels that a timm model was made for. Raises UserError if the model is unknown."""
    return model_config(name, option).input_size[-1]


def preprocessing_of(name: str, option: str = "--model") -> Preprocessing:
    """How timm's configuration of the model prepares images. DeiT's has the crop of its own evaluation."""
    config = model_config(name, option)
    crop = Preprocessing().crop if name.startswith("deit_") else config.crop_pct
    return Preprocessing(tuple(config.mean), tuple(config.std), config.interpolation, crop)


def build_model(
    name: str,
    num_classes: int,
    input_size: int,
    drop_path: float,
    recipe: Recipe | Int4Recipe,
    option: str = "--model",
    pretrained: bool = False,
) -> nn.Module:
    """A timm model with its block linears in `recipe`; `option` is the one that named it.

    Raises UserError for a model that cannot be quantized or does not take the input size, and for `pretrained` weights
    that cannot be fetched.
    """
    own_size = model_input_size(name, option)
    arguments = {"num_classes": num_classes, "drop_path_rate": drop_path, "pretrained": pretrained}
    if pretrained:
        _fetch(name)
    if input_size != own_size:
        arguments["img_size"] = input_size
    try:
        model = _create(name, arguments, input_size)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        if "drop_path_rate" in str(error):
            raise UserError(f"{option} {name} has no stochastic depth, got --drop-path {drop_path}; give 0") from error
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{option} {name} cannot be built for --input-size {input_size}: {reason}; its own is {own_size}"
        ) from error
    patch, _ = to_2tuple(getattr(getattr(model, "patch_embed", None), "patch_size", 1))
    if input_size < patch or input_size % patch:
        raise UserError(f"--input-size must be a multiple of {name}'s patch size {patch}, got {input_size}")
    try:
        return swap_linears(model, recipe)
    except ValueError as error:
        reason = str(error).rpartition(";")[0]
        raise UserError(
            f"--quant cannot quantize {option} {name}: {reason}; take one of the models in docs/models.md"
        ) from error


def _fetch(name: str) -> None:
    """Let the main process fetch timm's weights, which the others then find. Raises UserError if it cannot."""
    problem = None
    if processes.is_main():
        try:
            timm.create_model(name, pretrained=True)
        except Exception as error:  # of the network, the hub's client, the file, or a model without weights
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            problem = f"--pretrained could not fetch timm's weights of {name}: {reason}; give a file to --finetune"
    problem = processes.from_main(problem)
    if problem:
        raise UserError(problem)


def check_coverage(model: nn.Module, name: str, input_size: int) -> Coverage:
    """What of a quantized model is quantized. Raises UserError if the model computes around a quantized layer."""
    device = next(model.parameters()).device
    shape = (2, 3, input_size, input_size)
    images = torch.linspace(-1, 1, torch.Size(shape).numel(), device=device).view(shape)  # no random generator moves
    found = coverage(model, images)
    if bypassed := found.having(Status.BYPASSED):
        raise UserError(
            f"--quant needs a model that calls its linears; --model {name} reads the weight of {bypassed[0].name} "
            f"instead ({len(bypassed)} layers so); choose another model"
        )
    return found


def _create(name: str, arguments: dict, input_size: int) -> nn.Module:
    """`timm.create_model`, without the image size for a model that takes any, and without a stochastic depth of 0.

    Raises what timm raises, and what a forward pass raises if the model does not say which sizes it takes.
    """
    try:
        return timm.create_model(name, **arguments)
    except TypeError as error:
        refused = next((n for n in ("img_size", "drop_path_rate") if n in arguments and repr(n) in str(error)), None)
        if refused is None or (refused == "drop_path_rate" and arguments["drop_path_rate"] > 0):
            raise
    model = _create(name, {n: value for n, value in arguments.items() if n != refused}, input_size)
    if refused == "img_size":
        with torch.no_grad():
            model.eval()(torch.zeros(2, 3, input_size, input_size))
        model.train()
    return model


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Make the blocks keep only their inputs. Raises UserError for a model that timm cannot recompute."""
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise UserError(
            f"--checkpoint-activations needs a model that timm can recompute, got --model {name}"
        ) from error


def share_weights(model: nn.Module, device: torch.device) -> None:
    """All processes start from the main one's weights and buffers."""
    processes.copy_from_main((*model.parameters(), *model.buffers()), device)
