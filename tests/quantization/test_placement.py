"""Layers in half precision, on the meta device and made under inference_mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantization import RECIPES, QEma, QuantLinear, Recipe, create_model, weights_quantized_once
from quantization.baselines.int4 import UNIT_NORMAL_STEP, first_step_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_average_stays_in_fp32_and_moves(dtype):
    """1,000 updates of 0.9 towards 1 with beta 0.998: 1 - 0.1 * 0.998**1000 = 0.98649."""
    layer = QuantLinear(32, 4, recipe=Recipe().with_q_ema(0.998))
    nn.init.constant_(layer.weight, 0.9)
    layer.reset_ema()
    kept = layer.weight_ema.clone()
    model = nn.Sequential(layer).to(dtype)
    assert layer.weight.dtype is dtype and torch.equal(layer.weight_ema, kept)
    q_ema = QEma(model)
    nn.init.ones_(layer.weight)
    for _ in range(1000):
        q_ema.after_step()
    start = layer.weight.new_tensor(0.9).item()
    wanted = 1 - (1 - start) * 0.998**1000
    assert layer.weight_ema.dtype is torch.float32 and layer.weight_ema[0, 0].item() == pytest.approx(wanted, abs=1e-5)


def test_an_average_in_half_precision_is_refused():
    layer = QuantLinear(32, 4, recipe=Recipe().with_q_ema(0.998))
    layer.weight_ema = layer.weight_ema.bfloat16()
    with pytest.raises(ValueError, match="Q-EMA needs averages in fp32, got weight_ema in torch.bfloat16"):
        QEma(nn.Sequential(layer))


@pytest.mark.parametrize("recipe", [Recipe().with_q_ema(0.5), RECIPES["int4"]], ids=["q-ema", "int4"])
def test_a_model_on_meta_takes_a_plain_state_dict(recipe):
    plain = create_model("deit_micro_patch4_32", RECIPES["none"])
    with torch.device("meta"):
        model = create_model("deit_micro_patch4_32", recipe)
    model.load_state_dict(plain.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    layer, weight = model.blocks[0].mlp.fc1, plain.blocks[0].mlp.fc1.weight
    if recipe is RECIPES["int4"]:
        assert layer.input_step.item() == pytest.approx(UNIT_NORMAL_STEP)
        assert layer.weight_step.item() == pytest.approx(first_step_size(layer.transformed(weight)).item())
    else:
        assert torch.equal(layer.weight_ema, weight) and layer.ema_updates.item() == 0
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_a_model_made_under_inference_mode_is_evaluated():
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    plain = create_model("deit_micro_patch4_32", Recipe().with_q_ema(0.5)).eval()
    with torch.inference_mode():
        torch.manual_seed(0)
        model = create_model("deit_micro_patch4_32", Recipe().with_q_ema(0.5)).eval()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, weights_quantized_once(model):
            assert torch.equal(model(x), plain(x)) and torch.equal(model(x), plain(x))
