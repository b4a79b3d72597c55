"""The layout `mxfp4-pack-quantized` of the compressed-tensors package, which vLLM and others read.

model.safetensors has, for a layer `x`, `x.weight_packed` (uint8 [C, D / 2], the first of two codes in the low nibble)
and `x.weight_scale` (uint8 [C, D / 32], E8M0). Those are the bits of an `MXTensor`. Source: compressors/mxfp4/base.py,
compressors/nvfp4/helpers.py and quantization/quant_scheme.py of compressed-tensors 0.20.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..formats import GROUP_SIZE
from ..mx import MXTensor
from .packing import PackedModel

WEIGHTS = "model.safetensors"
CODES, SCALES = "weight_packed", "weight_scale"


def write(packed: PackedModel, directory: Path) -> dict[str, object]:
    """Write the weights; returns the part of config.json that tells compressed-tensors what they are."""
    from safetensors.torch import save_file

    tensors = {name: value.clone() for name, value in packed.others.items()}  # a file takes no shared storage
    for name, weight in packed.weights.items():
        tensors[f"{name}.{CODES}"] = weight.codes.contiguous()
        tensors[f"{name}.{SCALES}"] = weight.scales.view(torch.uint8).contiguous()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return {"quantization_config": _quantization_config(packed.weights)}


def read(directory: Path, weights: dict[str, torch.Size]) -> tuple[dict[str, MXTensor], dict[str, Tensor]]:
    """The 4-bit weights of layers of these shapes, and all other tensors."""
    from safetensors.torch import load_file

    others = load_file(directory / WEIGHTS)
    packed = {}
    for name, shape in weights.items():
        codes, scales = (others.pop(f"{name}.{part}") for part in (CODES, SCALES))
        packed[name] = MXTensor(codes, scales.view(torch.float8_e8m0fnu), shape, 1, "e2m1")
    return packed, others


def _quantization_config(weights: dict[str, MXTensor]) -> dict[str, object]:
    """Weights alone: compressed-tensors has no scheme for Q1, whose scales are rounded up."""
    arguments = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": GROUP_SIZE,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    }
    layout = "mxfp4-pack-quantized"
    group = {"targets": list(weights), "weights": arguments, "input_activations": None, "format": layout}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [],
    }
