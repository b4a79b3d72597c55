"""What an export says of its model, in config.json: enough to build the model anew without the checkpoint."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from ..recipe import Quantizer, Recipe
from ..swap import quant_linears, restore_linears, swap_linears

CONFIG = "config.json"
VERSION = 1
"""Version of the part of config.json under the key "tetrajet"."""


@dataclass(frozen=True)
class Description:
    """A model of timm whose linears `layers` multiply Q1(X) by stored 4-bit weights."""

    architecture: str
    """timm's name of the model."""
    model_args: dict[str, object]
    """Arguments of `timm.create_model`."""
    q1: Quantizer
    q2: Quantizer
    """The quantizer that made the weights. With Q-EMA, it is the one whose scales the weights have."""
    layers: tuple[str, ...]
    """Qualified names of the layers with 4-bit weights."""
    source: dict[str, object] = field(default_factory=dict)
    """What else is known of the model, such as its classes and how its images were normalized."""

    @property
    def recipe(self) -> Recipe:
        """The forward pass of training. A backward pass reads the same weights and does not quantize gradients."""
        off = Quantizer(enabled=False)
        return Recipe(self.q1, self.q2, off, off, off, off, double=False)

    def build(self) -> nn.Module:
        """The model, with random weights, in evaluation mode. Raises ValueError if the installed timm cannot build it.

        Its layers of these names are `QuantLinear`s.
        """
        model = swap_linears(create(self.architecture, self.model_args), self.recipe, self.layers)
        restore_linears(model, [name for name in quant_linears(model) if name not in self.layers])
        return model.eval()

    def write(self, directory: Path, to_format: str, more: dict[str, object]) -> None:
        """Write config.json, with what the format adds to it. The keys of the model itself are those of timm's hub."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("architecture", "model_args")}
        content = {"architecture": self.architecture, "model_args": self.model_args, **more}
        content["tetrajet"] = {"version": VERSION, "format": to_format, **facts}
        (directory / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_description(directory: Path) -> tuple[Description, str]:
    """What config.json in `directory` says, and the format of the export. Raises ValueError if it is not ours."""
    path = directory / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts = dict(content["tetrajet"])
        version, to_format = facts.pop("version"), facts.pop("format")
        if version != VERSION:
            raise ValueError(f"version {version}, not {VERSION}")
        q1, q2 = (Quantizer(**facts.pop(name)) for name in ("q1", "q2"))
        layers = tuple(facts.pop("layers"))
        return Description(content["architecture"], content["model_args"], q1, q2, layers, **facts), to_format
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load needs a directory that quantization.export has written, got {directory} ({path.name}: "
            f"{type(error).__name__}: {error}); export it again"
        ) from error


def create(name: str, arguments: dict[str, object]) -> nn.Module:
    """`timm.create_model`. Raises ValueError for a model that the installed timm does not know or cannot build so."""
    timm = importlib.import_module("timm")
    if not timm.is_model(name):
        raise ValueError(
            f"timm {timm.__version__} has no model {name}; install the timm that it was trained with, "
            "or run in the repository if it is one of ours"
        )
    try:
        return timm.create_model(name, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"timm {timm.__version__} cannot build {name} with {arguments}: {reason}; install the timm that it was "
            "trained with"
        ) from error
