"""Models at sizes that they were not made for, and what timm cannot do, in one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantization import RECIPES, QuantLinear, Recipe
from runtime.errors import UserError
from training.models import build_model, check_coverage, model_input_size

NONE = RECIPES["none"]


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "regnety_002"])
def test_a_convolutional_model_takes_another_size(name):
    model = build_model(name, 3, 64, 0.0, NONE)
    assert model.training and model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_a_size_that_it_cannot_take_is_refused():
    with pytest.raises(UserError, match="--model inception_v3 cannot be built for --input-size 16: .*; its own is 299"):
        build_model("inception_v3", 3, 16, 0.0, NONE)


def test_a_tag_chooses_a_configuration():
    assert model_input_size("vit_small_patch16_dinov3") == 256
    assert model_input_size("vit_tiny_patch16_384.augreg_in21k_ft_in1k") == 384
    model = build_model("vit_small_patch16_dinov3.lvd1689m", 3, 32, 0.1, Recipe())
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 48
    assert check_coverage(model, "vit_small_patch16_dinov3", 32).summary().startswith("48 of 49 linears quantized")


def test_a_model_that_computes_around_a_layer_is_refused():
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QuantLinear(48, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x.flatten(1), self.layer.weight)

    with pytest.raises(UserError, match="--model reading reads the weight of layer instead .1 layers so."):
        check_coverage(Reading(), "reading", 4)
