"""ONNX: model.onnx with 4-bit weights, and model_fp32.onnx, its twin with the same values in fp32.

In model.onnx a weight is a FLOAT4E2M1 initializer [C, D] with FLOAT8E8M0 scales [C, D / 32], which a DequantizeLinear
with blocks of 32 along axis 1 turns into fp32. That takes opset 24. Activations are not quantized in either file. The
twin has opset 20, which runtimes without 4-bit floats run, too.
"""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from ..formats import GROUP_SIZE
from ..mx import MXTensor
from ..swap import quant_linears, restore_linears
from .packing import PackedModel

WEIGHTS, TWIN = "model.onnx", "model_fp32.onnx"
TWIN_OPSET, OPSET = 20, 24


def write(packed: PackedModel, directory: Path) -> dict[str, object]:
    """Write both files. Raises ValueError if onnx is missing, or PyTorch or onnx cannot convert the model."""
    onnx = _onnx()
    model = dequantized_model(packed)
    twin = _graph(onnx, model, packed.description.architecture)
    onnx.save(twin, directory / TWIN)
    try:
        graph = importlib.import_module("onnx.version_converter").convert_version(twin, OPSET)
    except Exception as error:  # of operators without a rule for the newer opset
        raise ValueError(f"onnx cannot convert {packed.description.architecture} to opset {OPSET}: {error}") from error
    for name, weight in packed.weights.items():
        _pack_initializer(onnx, graph.graph, f"{name}.weight", weight)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, directory / WEIGHTS)
    return {}


def dequantized_model(packed: PackedModel) -> nn.Module:
    """The stock model, in evaluation mode, whose weights are the exported ones in fp32."""
    model = copy.deepcopy(packed.model).cpu().eval()
    layers = quant_linears(model)
    for name, weight in packed.weights.items():
        layers[name].weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return restore_linears(model, list(layers))


def _onnx() -> ModuleType:
    try:
        onnx = importlib.import_module("onnx")
    except ImportError as error:
        raise ValueError(f"the format onnx needs onnx >= 1.20 ({error}); pip install onnx") from error
    if onnx.defs.onnx_opset_version() < OPSET:
        raise ValueError(f"the format onnx needs onnx >= 1.20, which has opset {OPSET}, got {onnx.__version__}")
    return onnx


def _graph(onnx: ModuleType, model: nn.Module, architecture: str):
    """The model as an ONNX graph from `images` [batch, channels, height, width] to `logits` [batch, classes].

    Weights stay under their names: folding constants would transpose them into others.
    """
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None) or model.default_cfg["input_size"][1:]
    channels = model.default_cfg["input_size"][0]
    file = io.BytesIO()
    batch = {0: "batch"}
    options = {
        "input_names": ["images"],
        "output_names": ["logits"],
        "dynamic_axes": {"images": batch, "logits": batch},
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter by tracing is the one that needs no further package
            torch.onnx.export(
                model,
                (torch.zeros(2, channels, *size),),
                file,
                dynamo=False,
                opset_version=TWIN_OPSET,
                do_constant_folding=False,
                **options,
            )
    except Exception as error:  # of operators that have no counterpart
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"PyTorch cannot export {architecture} to ONNX: {reason}; take another format") from error
    return onnx.load_from_string(file.getvalue())


def _pack_initializer(onnx: ModuleType, graph, name: str, weight: MXTensor) -> None:
    """Put codes, scales and a DequantizeLinear in place of the fp32 initializer `name`."""
    position = next((i for i, initializer in enumerate(graph.initializer) if initializer.name == name), None)
    if position is None:
        raise ValueError(
            f"the ONNX graph has no weight {name}, because another has the same values; take another format"
        )
    del graph.initializer[position]
    kinds = onnx.TensorProto
    codes, scales = weight.codes.contiguous(), weight.scales.view(torch.uint8).contiguous()
    parts = (
        (f"{name}.codes", kinds.FLOAT4E2M1, weight.shape, codes),
        (f"{name}.scales", kinds.FLOAT8E8M0, scales.shape, scales),
    )
    for part, kind, shape, content in parts:
        raw = content.numpy().tobytes()
        graph.initializer.append(onnx.helper.make_tensor(part, kind, tuple(shape), raw, raw=True))
    inputs = [part for part, *_ in parts]
    node = onnx.helper.make_node(
        "DequantizeLinear",
        inputs,
        [name],
        name=f"{name}.dequantize",
        axis=1,
        block_size=GROUP_SIZE,
        output_dtype=kinds.FLOAT,
    )
    graph.node.insert(0, node)
