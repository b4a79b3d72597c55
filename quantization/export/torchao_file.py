"""A state dict of the stock model whose 4-bit weights are torchao's `MXTensor`s, in a file of `torch.save`.

`model.load_state_dict(state, assign=True)` puts it into the stock model of timm. torchao then quantizes activations,
too, by the scale rule of its own that is Q1's: RCEIL for truncation-free scales, FLOOR for floor scales.
Source: prototype/mx_formats/mx_tensor.py of torchao 0.18.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..formats import GROUP_SIZE, Element, Rounding, Scaling
from ..mx import MXTensor
from ..recipe import Quantizer
from .packing import PackedModel

WEIGHTS = "model.pth"


def write(packed: PackedModel, directory: Path) -> dict[str, object]:
    """Write the weights. Raises ValueError if torchao is missing."""
    formats, common = _torchao()
    state: dict[str, Tensor] = {name: value.clone() for name, value in packed.others.items()}
    emulated = common.KernelPreference.EMULATED
    activations = _activations(formats, emulated, packed.description.q1)
    for name, weight in packed.weights.items():
        state[f"{name}.weight"] = formats.mx_tensor.MXTensor(
            weight.codes.contiguous(),
            weight.scales.contiguous(),
            elem_dtype=torch.float4_e2m1fn_x2,
            block_size=GROUP_SIZE,
            orig_dtype=torch.float32,
            kernel_preference=emulated,
            act_quant_kwargs=activations,
            is_swizzled_scales=False,
        )
    torch.save(state, directory / WEIGHTS)
    return {}


def read(directory: Path, weights: dict[str, torch.Size]) -> tuple[dict[str, MXTensor], dict[str, Tensor]]:
    """The 4-bit weights of layers of these shapes, and all other tensors. Raises ValueError if torchao is missing."""
    _torchao()  # which tells PyTorch that its classes may be unpickled
    others = torch.load(directory / WEIGHTS, weights_only=True)
    packed = {}
    for name, shape in weights.items():
        theirs = others.pop(f"{name}.weight")
        packed[name] = MXTensor(theirs.qdata, theirs.scale, shape, 1, "e2m1")
    return packed, others


def _torchao() -> tuple[ModuleType, ModuleType]:
    try:
        formats = importlib.import_module("torchao.prototype.mx_formats")
        importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
        return formats, importlib.import_module("torchao.quantization.quantize_.common")
    except ImportError as error:
        raise ValueError(f"the format torchao needs torchao >= 0.18 ({error}); pip install torchao") from error


def _activations(formats: ModuleType, kernels: object, q1: Quantizer) -> object | None:
    """torchao's settings that quantize activations as Q1 does; None if there are none."""
    if not q1.enabled or q1.element is not Element.E2M1 or q1.rounding is not Rounding.NEAREST:
        return None
    modes = importlib.import_module("torchao.prototype.mx_formats.config").ScaleCalculationMode
    return formats.mx_tensor.QuantizeTensorToMXKwargs(
        elem_dtype=torch.float4_e2m1fn_x2,
        block_size=GROUP_SIZE,
        scaling_mode=modes.RCEIL if q1.scaling is Scaling.TRUNCATION_FREE else modes.FLOOR,
        kernel_preference=kernels,
    )
