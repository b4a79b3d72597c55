"""`export_model` and the registry of formats: a directory gets a whole export, or nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..mx import MXTensor
from . import compressed_file, onnx_file, torchao_file
from .packing import PackedModel, pack_model


@dataclass(frozen=True)
class Format:
    write: Callable[[PackedModel, Path], dict[str, object]]
    """Writes the model into a directory; returns what config.json needs besides the description of the model."""
    read: Callable[[Path, dict[str, torch.Size]], tuple[dict[str, MXTensor], dict[str, Tensor]]] | None
    """Reads weights of layers of these shapes, and all other tensors; None for a format that `load` does not read."""


FORMATS = {
    "compressed-tensors": Format(compressed_file.write, compressed_file.read),
    "torchao": Format(torchao_file.write, torchao_file.read),
    "onnx": Format(onnx_file.write, None),
}


def export_model(
    model: nn.Module,
    directory: Path | str,
    to_format: str,
    architecture: str,
    *,
    source: dict[str, object] | None = None,
    **model_args: object,
) -> PackedModel:
    """Write a model with its weights in 4 bits into a new or empty directory.

    `architecture` and `model_args` are what `timm.create_model` was given; `load` gives them to it again. `to_format`
    is one of `FORMATS`. `source` goes into config.json. Returns what was written.

    Raises ValueError, with nothing written, for a directory that is not empty, an unknown format, a model that has no
    MXFP4 weights, and a library that is missing.
    """
    directory = Path(directory)
    check_target(directory)
    if to_format not in FORMATS:
        raise ValueError(f"to_format must be one of {', '.join(FORMATS)}, got {to_format!r}")
    packed = pack_model(model, architecture, model_args, source or {})
    directory.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".part", dir=directory.parent))
    try:
        more = FORMATS[to_format].write(packed, part)
        packed.description.write(part, to_format, more)
        part.chmod(0o755)
        part.replace(directory)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return packed


def check_target(directory: Path) -> None:
    """Raises ValueError for a path that is no directory, or one that holds something."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--to needs a new or empty directory, got {directory}, which is a file; give another")
    if directory.is_dir() and any(directory.iterdir()):
        raise ValueError(f"--to needs a new or empty directory, {directory} holds something; give another")
