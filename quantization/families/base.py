"""The registries of families and readers, by the import path of a class."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

BLOCK_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The linears of a transformer block, which are the layers that the paper quantizes."""


@dataclass(frozen=True)
class Family:
    """The linears of a model that are quantized unless the caller names others."""

    linears: tuple[str, ...] = BLOCK_LINEARS
    """Endings of their qualified names. A model of the family need not have all of them."""
    outside: tuple[str, ...] = ("attn_pool", "rel_pos")
    """Modules whose linears are left out although they have such names: pooling, and biases of positions."""


@dataclass(frozen=True)
class Reader:
    """A module that reads the weights of linears in it."""

    mend: Callable[[nn.Module], None]
    """Makes the module, in place, call its linears. It may be called again."""
    makes: tuple[str, ...] = ()
    """Linears that `mend` makes of parameters of the module, by the names that they will have in it."""
    refusal: Callable[[nn.Module], str | None] = lambda module: None
    """The reason why a module cannot be mended, or None if it can."""


_FILES = {"torch": "torch_modules", "torchvision": "torchvision_models", "timm": "timm_models"}
"""The file to import where a class of that package is met."""
_FAMILIES: dict[str, Family] = {}
_READERS: dict[str, Reader] = {}


def register_family(path: str, family: Family) -> None:
    """`path` is the import path of the model's class, such as `timm.models.cait.Cait`; subclasses count, too."""
    _FAMILIES[path] = family


def register_reader(path: str, reader: Reader) -> None:
    """`path` is the import path of the module's class; subclasses count, too."""
    _READERS[path] = reader


def family_of(module: nn.Module) -> Family | None:
    """The family of the module's class, else of its nearest base class; one that its class names itself comes first."""
    family = _nearest(type(module), _FAMILIES)
    own = getattr(module, "quant_names", None)
    return replace(family or Family(), linears=tuple(own)) if own else family


def reader_of(module: nn.Module) -> Reader | None:
    return _nearest(type(module), _READERS)


def _nearest(cls: type, registry: dict) -> Family | Reader | None:
    for base in cls.__mro__:
        package = base.__module__.partition(".")[0]
        if package in _FILES:
            importlib.import_module(f".{_FILES[package]}", __package__)
        if (entry := registry.get(f"{base.__module__}.{base.__qualname__}")) is not None:
            return entry
    return None
