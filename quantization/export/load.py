"""`load`: the model in an exported directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..swap import quant_linears
from .description import read_description
from .stored_weight import StoredWeight
from .writing import FORMATS


def load(directory: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """The model in a directory that `python -m quantization.export` or `export_model` has written, ready to evaluate.

    Its block linears multiply Q1(X) by the stored weights, with the bits of the model that was exported. No parameter
    requires a gradient.

    Raises ValueError for a directory that is not ours or is damaged, for an ONNX export, which other programs run, and
    if timm or the format's library cannot be had.
    """
    directory = Path(directory)
    description, to_format = read_description(directory)
    if to_format not in FORMATS or FORMATS[to_format].read is None:
        raise ValueError(
            f"load reads {' and '.join(name for name, one in FORMATS.items() if one.read)}, {directory} is in "
            f"{to_format}; run model_fp32.onnx in an ONNX runtime"
        )
    model = description.build()
    layers = quant_linears(model)
    try:
        if missing := [name for name in description.layers if name not in layers]:
            raise KeyError(missing[0])
        shapes = {name: layer.weight.shape for name, layer in layers.items()}
        weights, others = FORMATS[to_format].read(directory, shapes)
        for name, weight in weights.items():
            StoredWeight(layers[name], weight)
        own = {f"{name}.weight" for name in layers}
        result = model.load_state_dict(others, strict=False)
        if wrong := sorted(set(result.missing_keys) - own) + result.unexpected_keys:
            raise KeyError(wrong[0])
    except (OSError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{directory} is damaged or of another model ({reason}); export it again") from error
    return model.requires_grad_(False).to(device)
