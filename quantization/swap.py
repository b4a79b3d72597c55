"""Functions on whole models: swap in quantized linears, find them, and set how they work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from .linear import QuantLinear
from .matmul import Matmul
from .recipe import Int4Recipe, Recipe, layer_class

BLOCK_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The linears of a transformer block, which are the layers that the paper quantizes.

Swin Transformers and `--track-oscillation` use this list, too. To quantize other layers of one model class, set its
`quant_names` in `timm/models/`.
"""


def swap_linears(model: nn.Module, recipe: Recipe | Int4Recipe, names: Sequence[str] = BLOCK_LINEARS) -> nn.Module:
    """Replace, in place, every `nn.Linear` whose qualified name ends in one of `names`; parameters are shared.

    The replacement is the layer of `recipe`'s class: a `QuantLinear`, or an `Int4Linear` for an `Int4Recipe`. A recipe
    that quantizes nothing leaves the model as it is. Returns `model`.

    Raises TypeError for something else than a recipe, and ValueError if no layer matches.
    """
    new_class = layer_class(recipe)
    if not recipe.quantizes:
        return model
    names = (names,) if isinstance(names, str) else names
    endings = tuple("." + name for name in names)
    found = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and ("." + name).endswith(endings)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer named {', '.join(names)}; pass other names")
    replacements = {module: new_class.from_linear(module, recipe) for module in map(model.get_submodule, found)}
    for name in found:
        parent, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, leaf, replacements[getattr(parent, leaf)])
    return model


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The MX linears of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def plain_weight_linears(model: nn.Module) -> list[QuantLinear]:
    """The layers of `model` whose Q2 is the plain quantizer, for remedies that act on W and Q2(W).

    Raises ValueError if there is none, or if Q-EMA rounds the weights.
    """
    layers = [layer for layer in quant_linears(model).values() if layer.recipe.q2.enabled]
    if not layers or any(layer.recipe.q_ema_beta is not None for layer in layers):
        raise ValueError(
            "the model needs weights that Q2 quantizes without Q-EMA; build it with a recipe with q2 and without Q-EMA"
        )
    return layers


def set_matmul(model: nn.Module, matmul: Matmul | str) -> None:
    """Choose the arithmetic of every MX linear of `model`."""
    for layer in quant_linears(model).values():
        layer.matmul = matmul


@contextmanager
def plain_rounding(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, Q2 is the plain quantizer of the recipe, even if Q-EMA is on."""
    layers = [layer for layer in quant_linears(model).values() if layer.use_q_ema]
    for layer in layers:
        layer.use_q_ema = False
    try:
        yield
    finally:
        for layer in layers:
            layer.use_q_ema = True
