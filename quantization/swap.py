"""Functions on whole models: swap in quantized linears, find them, and set how they work."""

from __future__ import annotations

import difflib
import re
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from .families.base import BLOCK_LINEARS, Family, Reader, family_of, reader_of
from .linear import QuantLinear
from .matmul import Matmul
from .recipe import Int4Recipe, Recipe, is_quantized_layer, layer_class

__all__ = [
    "BLOCK_LINEARS",
    "copy_precision",
    "plain_rounding",
    "plain_weight_linears",
    "quant_linears",
    "restore_linears",
    "set_matmul",
    "swap_linears",
    "uses_fp8",
]


def swap_linears(model: nn.Module, recipe: Recipe | Int4Recipe, names: Sequence[str] | str | None = None) -> nn.Module:
    """Replace linears of `model`, in place, by quantized ones that share their parameters and hooks. Returns `model`.

    `names` are endings of qualified names, each of which must match. Without `names`, the linears of the transformer
    blocks are replaced: those of the `quant_names` of the model's class, else of its family in `families/`, else those
    in `BLOCK_LINEARS`. A model within the model has the linears of its own class. A module that would read a replaced
    linear's weight instead of calling it is made to call it; `coverage` tells which layers are really used.

    The replacement is the layer of `recipe`'s class: a `QuantLinear`, or an `Int4Linear` for an `Int4Recipe`. A recipe
    that quantizes nothing leaves the model as it is.

    Raises TypeError for something else than a recipe. Raises ValueError, with the model as it was, if nothing matches
    or a layer cannot be replaced; it names the layer and the reason.
    """
    new_class = layer_class(recipe)
    if not recipe.quantizes:
        return model
    found = _matching(model, names)
    readers = _readers_of(model, found)
    _refuse_what_cannot_be_swapped(model, found, readers)
    for path, reader in readers.items():
        reader.mend(model.get_submodule(path))
    layers = {name: model.get_submodule(name) for name in found}
    replacements = {layer: _take_place_of(layer, new_class.from_linear(layer, recipe)) for layer in layers.values()}
    for name, layer in layers.items():
        _set_module(model, name, replacements[layer])
    return model


def restore_linears(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Put ordinary linears, with the same parameters and hooks, in place of the quantized layers of these names.

    A layer that has several names must be given by all of them. Returns `model`, which is changed in place.
    """
    layers = {name: model.get_submodule(name) for name in names}
    linears = {layer: _take_place_of(layer, _linear_from(layer)) for layer in layers.values()}
    for name, layer in layers.items():
        _set_module(model, name, linears[layer])
    return model


def _linear_from(layer: nn.Module) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear.train(layer.training)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _matching(model: nn.Module, names: Sequence[str] | str | None) -> list[str]:
    """The qualified names of the linears to replace, with those that a reader has yet to make."""
    present = []
    for path, module in _modules(model):
        if isinstance(module, nn.Linear):
            present.append(path)
        elif (reader := reader_of(module)) is not None:
            present += [f"{path}.{name}".lstrip(".") for name in reader.makes if not hasattr(module, name)]
    if names is None:
        families = {path: family for path, module in _modules(model) if (family := family_of(module)) is not None}
        families.setdefault("", Family())
        found = [name for name in present if _is_usual(name, families[_nearest_above(name, families)])]
        if not found:
            endings = ", ".join(families[""].linears)
            raise ValueError(
                f"{type(model).__name__} has no linear layer named {endings}; pass other names{_such_as(present)}"
            )
        return found
    endings = (names,) if isinstance(names, str) else tuple(names)
    if not all(endings) or not endings:
        raise ValueError(f"names must be endings of names of linear layers, got {names!r}; None takes the usual ones")
    for ending in endings:
        if not _ending_in(present, (ending,)):
            near = difflib.get_close_matches(ending, {".".join(n.split(".")[-2:]) for n in present}, n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(near)}?" if near else "; pass other names"
            raise ValueError(f"{type(model).__name__} has no linear layer named {ending}{hint}")
    return _ending_in(present, endings)


def _such_as(present: list[str]) -> str:
    """The first names that may be passed: what follows the number of a block, or the whole name."""
    endings = dict.fromkeys(re.sub(r"^(.*\.)?\d+\.", "", name) for name in present)
    return f", such as {', '.join(list(endings)[:6])}" if endings else ""


def _is_usual(name: str, family: Family) -> bool:
    return bool(_ending_in([name], family.linears)) and not set(family.outside) & set(name.split("."))


def _nearest_above(name: str, paths: Collection[str]) -> str:
    """The longest of `paths`, one of which is "", that `name` lies in."""
    while name not in paths:
        name = name.rpartition(".")[0]
    return name


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module, by every path that it has."""
    return model.named_modules(remove_duplicate=False)


def _ending_in(present: list[str], endings: Sequence[str]) -> list[str]:
    return [name for name in present if ("." + name).endswith(tuple("." + ending for ending in endings))]


def _readers_of(model: nn.Module, found: list[str]) -> dict[str, Reader]:
    """The modules, by path, that have a found linear in them and may read its weight."""
    above = {"", *(name[:i] for name in found for i, letter in enumerate(name) if letter == ".")}
    readers = {path: reader_of(module) for path, module in _modules(model) if path in above}
    return {path: reader for path, reader in readers.items() if reader is not None}


def _refuse_what_cannot_be_swapped(model: nn.Module, found: list[str], readers: dict[str, Reader]) -> None:
    for path, reader in readers.items():
        module = model.get_submodule(path)
        reason = "its forward was replaced" if "forward" in vars(module) else reader.refusal(module)
        if reason is not None:
            raise ValueError(f"{path or type(model).__name__} reads the weights of its linears, and {reason}")
    for name in found:
        parent, _, leaf = name.rpartition(".")
        layer = getattr(model.get_submodule(parent), leaf, None)  # None if a reader will make it
        if layer is not None and (reason := _why_not(layer)) is not None:
            raise ValueError(f"{name} cannot be quantized: {reason}; leave it out of the names")


def _why_not(layer: nn.Linear) -> str | None:
    """The reason why a quantized layer could not do all that `layer` does, or None."""
    if is_quantized_layer(layer):
        return f"it is quantized already ({type(layer).__name__})"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    if type(layer) not in (nn.Linear, NonDynamicallyQuantizableLinear):  # the second is the first, by another name
        return f"it is a {type(layer).__name__}, a subclass of nn.Linear, which may compute something else"
    if "forward" in vars(layer):
        return "its forward was replaced"
    if layer._modules or layer._buffers or not layer._parameters.keys() <= {"weight", "bias"}:
        return "it has more than a weight and a bias"
    if layer._parameters.get("weight") is None:
        return "its weight is not a parameter, as under the old weight_norm or spectral_norm"
    return None


def _take_place_of(layer: nn.Linear, new: nn.Linear) -> nn.Linear:
    """`new`, with the attributes and hooks that users gave to `layer`; their handles remove them."""
    for name, value in vars(layer).items():
        if "hook" in name or name not in vars(new):
            vars(new)[name] = value
    for hooks in (layer._load_state_dict_pre_hooks, layer._state_dict_pre_hooks):
        for hook in hooks.values():
            if getattr(hook, "with_module", False):  # it holds a weak reference to its module
                hook.module = weakref.ref(new)
    return new


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


def uses_fp8(model: nn.Module) -> bool:
    """Tell if an MX linear of `model` multiplies in FP8 on the device where it is now."""
    return any(layer._uses_fp8 for layer in quant_linears(model).values())


def copy_precision(model: nn.Module, copy: nn.Module) -> None:
    """Give the MX linears of a copy of `model` the recipe and the precision that those of `model` have now."""
    copies = quant_linears(copy)
    for name, layer in quant_linears(model).items():
        copies[name].recipe, copies[name].high_precision = layer.recipe, layer.high_precision


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
