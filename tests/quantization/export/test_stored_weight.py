"""The operand that a layer makes of stored codes and scales is the one that its quantizer made of the master weight."""

from __future__ import annotations

import pytest
import torch

from quantization import QuantLinear, Recipe, quantize_mx
from quantization.export.stored_weight import StoredWeight
from quantization.formats import Fp8
from quantization.linear import _forward_operand, _Plan


@pytest.mark.parametrize("scaling", ["truncation_free", "floor"])
@pytest.mark.parametrize("spread", [3, 20, 60])
def test_the_operand_in_fp8_underflows_for_the_same_groups(scaling, spread, randn, device, assert_same_bits):
    """Groups lie so many binades apart; some are zero, and amaxes lie just above and just below powers of two."""
    recipe = Recipe().with_quantizers(("q2",), scaling=scaling)
    layer = QuantLinear(128, 96, device=device, recipe=recipe)
    exponents = torch.randint(-spread, 1, (96, 4, 1), device=device)
    weight = (randn(96, 4, 32) * torch.exp2(exponents.float())).view(96, 128)
    weight[3, 32:64] = 0
    weight[5:20, ::32] = 3.2 * torch.exp2(torch.arange(-15, 0, device=device).float()).unsqueeze(1)
    layer.weight.data = weight
    plan = _Plan(layer.recipe, torch.bfloat16, True, torch.zeros(1, dtype=torch.int64, device=device))
    for fp8 in (Fp8.E4M3, None):
        made, _, _ = _forward_operand(layer.weight, recipe.q2, plan, fp8, False, False)
        stored = StoredWeight(QuantLinear(128, 96, device=device), quantize_mx(weight, scaling=scaling))
        operand, _, _ = stored.get(plan, fp8, False, False)
        assert operand.values_RL.dtype == made.values_RL.dtype
        assert_same_bits(operand.values_RL.float(), made.values_RL.float(), f"{fp8}")
        if fp8 is not None:
            assert_same_bits(operand.scale, made.scale)
    assert (plan.underflowed > 0) == (spread > 14)  # E4M3 spans 14 binades
