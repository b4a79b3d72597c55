"""Builds the model that the options name, and turns what timm cannot do into one line for the user."""

from __future__ import annotations

import difflib

import torch
from timm.layers import to_2tuple
from torch import nn

import timm
from quantization import Coverage, Int4Recipe, Recipe, Status, coverage, swap_linears
from runtime import processes
from runtime.errors import UserError


def model_input_size(name: str, option: str = "--model") -> int:
    """The size in pixels that a timm model was made for. Raises UserError, with the nearest names, if it is unknown."""
    known = timm.is_model(name) and "." not in name
    config = timm.get_pretrained_cfg(name) if known else None  # an old name, such as xception, has none
    if config is None:
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or ["deit_small_patch16_224"]
        raise UserError(f"{option} must be a model of timm, got {name!r}; did you mean {', '.join(near)}?")
    return config.input_size[-1]


def build_model(
    name: str, num_classes: int, input_size: int, drop_path: float, recipe: Recipe | Int4Recipe, option: str = "--model"
) -> nn.Module:
    """A timm model with its block linears in `recipe`; `option` is the one that named it.

    Raises UserError for a model that cannot be quantized or does not take the input size.
    """
    own_size = model_input_size(name, option)
    arguments = {"num_classes": num_classes, "drop_path_rate": drop_path}
    if input_size != own_size:
        arguments["img_size"] = input_size
    try:
        model = _create(name, arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        if "drop_path_rate" in str(error):
            raise UserError(f"{option} {name} has no stochastic depth, got --drop-path {drop_path}; give 0") from error
        raise UserError(
            f"{option} {name} cannot be built for --input-size {input_size}: {error}; its own is {own_size}"
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


def _create(name: str, arguments: dict) -> nn.Module:
    """`timm.create_model`, also for a model without stochastic depth if none is asked for."""
    try:
        return timm.create_model(name, **arguments)
    except TypeError as error:
        if arguments["drop_path_rate"] > 0 or "drop_path_rate" not in str(error):
            raise
    del arguments["drop_path_rate"]
    return timm.create_model(name, **arguments)


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
