"""Layers that multiply by stored codes and scales instead of quantizing a master weight."""

from __future__ import annotations

import torch
from torch import nn

from ..formats import FP32_EXPONENT_BIAS, GROUP_SIZE, Element, Fp8, fp8_range
from ..linear import QuantLinear, WeightCache, _Kept, _Plan
from ..mx import MXTensor
from ..reference import TORCH_FP8, Operand


class StoredWeight(WeightCache):
    """Answers the layer's question for Q2(W) with the stored weight.

    Quantizing the dequantized weight again would give the same values, but not always the same scales, on which it
    depends which groups underflow in FP8. The layer's `weight` holds the values in fp32, for whoever reads it.
    """

    def __init__(self, layer: QuantLinear, packed: MXTensor) -> None:
        layer.weight = nn.Parameter(packed.dequantize(), requires_grad=False)
        layer.register_buffer("weight_codes", packed.codes, persistent=False)
        # As bytes, because a change of the model's dtype would convert float8_e8m0fnu.
        layer.register_buffer("weight_scales", packed.scales.view(torch.uint8), persistent=False)
        layer.weight_cache = self
        self._layer = layer
        self._made: tuple | None = None

    @property
    def packed(self) -> MXTensor:
        layer = self._layer
        scales = layer.weight_scales.view(torch.float8_e8m0fnu)
        return MXTensor(layer.weight_codes, scales, layer.weight.shape, 1, Element.E2M1)

    def get(self, plan: _Plan, fp8: Fp8 | None, keep_amax: bool, keep_packed: bool) -> tuple:
        """The operand, and what a backward pass reads: the values, because the recipe quantizes nothing there."""
        layer = self._layer
        key = plan.dtype, fp8, layer.weight_codes.device
        if self._made is None or self._made[0] != key:
            packed = self.packed
            operand = Operand(packed.dequantize(plan.dtype)) if fp8 is None else fp8_operand(packed, fp8)
            self._made = key, operand
        kept = _Kept(layer.recipe.q2, layer.in_features, packed=False, has_amax=False)
        return self._made[1], kept, (layer.weight,)

    def put(self, made: tuple, *how) -> None:
        """Never called, because `get` always answers."""


def fp8_operand(packed: MXTensor, fp8: Fp8) -> Operand:
    """The operand that a quantizer with `fp8` makes: FP8 values [C, D] over one power of two.

    The power follows from the largest group, and a group whose scale lies too far below it is zero.
    """
    bottom, top = fp8_range(fp8, packed.element.format)
    rows, length = packed.shape
    scale_bytes = packed.scales.view(torch.uint8).to(torch.int32)
    values = packed.dequantize(torch.float64).view(rows, -1, GROUP_SIZE)
    is_zero = (values == 0).all(dim=-1)
    largest = torch.where(is_zero.logical_not() | is_zero.all(), scale_bytes, 0).amax()
    exponent_byte = (largest - top).clamp(min=1)
    underflows = (scale_bytes - exponent_byte < bottom).unsqueeze(-1)
    values = torch.where(underflows, 0 * values, values) * torch.exp2(FP32_EXPONENT_BIAS - exponent_byte.double())
    scale = torch.exp2(exponent_byte.double() - FP32_EXPONENT_BIAS).float().view(1)
    return Operand(values.view(rows, length).float().to(TORCH_FP8[fp8]), scale)
