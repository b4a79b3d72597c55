"""`create_model`: a quantized model of timm."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import nn

from .recipe import Int4Recipe, Recipe
from .swap import swap_linears


def create_model(
    name: str, recipe: Recipe | Int4Recipe, *, names: Sequence[str] | str | None = None, **options: object
) -> nn.Module:
    """`timm.create_model(name, **options)` with its block linears, or those that end in `names`, in `recipe`.

    It needs no timm but the installed one. `pretrained=True` quantizes the weights that timm downloads;
    `checkpoint_path` may be a file with Q-EMA's averages. Raises what timm and `swap_linears` raise.
    """
    timm = importlib.import_module("timm")
    path = options.pop("checkpoint_path", None)
    model = swap_linears(timm.create_model(name, **options), recipe, names)
    if path:  # now that the model has a place for averages
        importlib.import_module("timm.models").load_checkpoint(model, path)
    return model
