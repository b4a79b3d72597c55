"""The codes and scales that an export stores: those that the forward pass of the model multiplies with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..formats import GROUP_SIZE, SCALE_NAN, Element, Rounding
from ..linear import Q_EMA_START, QuantLinear
from ..mx import MXTensor, quantize_mx
from ..recipe import is_quantized_layer
from ..swap import quant_linears
from .description import Description

EMA_TENSORS = ("weight_ema", "ema_updates")
"""What a layer with Q-EMA owns for its training alone."""


@dataclass(frozen=True)
class PackedModel:
    model: nn.Module
    """The model that was trained, whose layers still have their master weights."""
    weights: dict[str, MXTensor]
    """4-bit weights [C, D] with groups along D, by the name of the layer."""
    others: dict[str, Tensor]
    """All other tensors of the model's state, by their names. They stay as they are."""
    description: Description

    @property
    def bytes_before(self) -> int:
        """Size of the model's state with master weights."""
        masters = (quant_linears(self.model)[name].weight for name in self.weights)
        return sum(tensor.nbytes for tensor in (*masters, *self.others.values()))


def pack_model(
    model: nn.Module, architecture: str, model_args: dict[str, object], source: dict[str, object]
) -> PackedModel:
    """Quantize the weights of a model's `QuantLinear`s as its forward pass does.

    Raises ValueError for a model that has none, whose weights are no E2M1 numbers of a deterministic quantizer, or that
    holds NaN or Inf.
    """
    layers = quant_linears(model)
    if not layers:
        other = any(is_quantized_layer(module) for module in model.modules())
        kind = "its quantized layers are INT4's" if other else "none of its layers is quantized"
        raise ValueError(f"an export needs a model with MXFP4 layers, got one of which {kind}; swap_linears makes them")
    recipes = {layer.recipe for layer in layers.values()}
    if len(recipes) > 1:
        raise ValueError(f"an export needs one recipe for all layers, got {len(recipes)}; export each model by itself")
    weights = {name: _packed(name, layer) for name, layer in layers.items()}
    own = {f"{name}.{tensor}" for name in layers for tensor in ("weight", *EMA_TENSORS)}
    others = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items() if name not in own}
    (recipe,) = recipes
    description = Description(architecture, model_args, recipe.q1, recipe.q2, tuple(layers), source)
    return PackedModel(model, weights, others, description)


def _packed(name: str, layer: QuantLinear) -> MXTensor:
    q2 = layer.recipe.q2
    if layer.high_precision or not q2.enabled:
        raise ValueError(f"an export needs 4-bit weights, {name} multiplies by its master weight; enable q2")
    if q2.element is not Element.E2M1:
        raise ValueError(f"an export needs weights in E2M1, {name} has {q2.element.value}, which no format holds")
    if q2.rounding is Rounding.STOCHASTIC:
        raise ValueError(
            f"an export needs one weight, {name} draws another in every forward pass; use nearest rounding"
        )
    if layer.in_features % GROUP_SIZE:
        raise ValueError(
            f"an export needs rows of whole groups of {GROUP_SIZE}, {name} has rows of {layer.in_features}; "
            "leave it in high precision"
        )
    by_average = layer.use_q_ema and int(layer.ema_updates) >= Q_EMA_START
    rounding, ema = (Rounding.EMA, layer.weight_ema) if by_average else (q2.rounding, None)
    packed = quantize_mx(layer.weight, 1, q2.element, q2.scaling, rounding, ema=ema)
    if (packed.scales.view(torch.uint8) == SCALE_NAN).any():
        raise ValueError(f"an export needs finite weights, {name} holds NaN or Inf; take an earlier checkpoint")
    if not torch.equal(packed.dequantize(), layer.quantized_weight().float()):
        raise RuntimeError(f"{name}: the packed weight is not that of the forward pass; this is a bug")
    return packed.to("cpu")
