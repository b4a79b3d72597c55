"""MX tensors, and others beside them, in a safetensors file.

An `MXTensor` named `x` becomes the uint8 tensors `x.codes` and `x.scales`, with the axis of the groups last, and an
entry of the file's metadata with its shape, axis and element.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .mx import MXTensor

METADATA_KEY = "mx"


def save_mx(path: Path | str, tensors: Mapping[str, MXTensor | Tensor]) -> None:
    """Write the tensors to a safetensors file. Raises ValueError if a name is used twice, such as `x.codes`."""
    from safetensors.torch import save_file

    parts, described = {}, {}
    for name, tensor in tensors.items():
        own = {name: tensor}
        if isinstance(tensor, MXTensor):
            scales = tensor.scales.view(torch.uint8)
            own = {f"{name}.codes": tensor.codes.movedim(tensor.axis, -1)}
            own[f"{name}.scales"] = scales.movedim(tensor.axis, -1)
            described[name] = {"shape": list(tensor.shape), "axis": tensor.axis, "element": tensor.element.value}
        for part, value in own.items():
            if part in parts:
                raise ValueError(f"names in a file must differ, got {part} twice; rename {name}")
            parts[part] = value.contiguous()
    save_file(parts, path, metadata={METADATA_KEY: json.dumps(described)})


def load_mx(path: Path | str, device: torch.device | str = "cpu") -> dict[str, MXTensor | Tensor]:
    """Read what `save_mx` has written. Raises ValueError for a file without its metadata, or with parts missing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        described = json.loads(metadata)
        for name, facts in described.items():
            codes, scales = (tensors.pop(f"{name}.{part}").movedim(-1, facts["axis"]) for part in ("codes", "scales"))
            tensors[name] = MXTensor(codes, scales.view(torch.float8_e8m0fnu), **facts)
    except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} must be a file of save_mx, which it is not ({error}); write it again") from error
    return tensors
