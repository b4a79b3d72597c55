"""torchvision's Swin attention calls its linears, and computes what torchvision's function computes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torchvision.models import swin_transformer
from torchvision.models.video import swin_transformer as video

from quantization import QuantLinear, Recipe, Status, coverage, swap_linears
from quantization.families.base import reader_of

ATTENTION = {
    "v1": (swin_transformer.ShiftedWindowAttention, (4, 3)),
    "v2": (swin_transformer.ShiftedWindowAttentionV2, (4, 3)),
    "3d": (video.ShiftedWindowAttention3d, (2, 4, 3)),
}
MAPS = [(8, 9), (7, 5), (3, 9), (3, 2), (4, 3)]
"""Heights and widths: whole windows, ragged ones, an axis or both smaller than a window, a single window."""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("version", ATTENTION)
def test_attention_is_torchvisions(version, shift, bias):
    """Outputs and the gradients of inputs and all parameters, in float64, with a random bias also for the keys."""
    torch.manual_seed(0)
    cls, window = ATTENTION[version]
    shifts = [size // 2 for size in window] if shift else [0] * len(window)
    plain = cls(32, list(window), shifts, 4, qkv_bias=bias, proj_bias=bias).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    calling = copy.deepcopy(plain)
    reader_of(calling).mend(calling)
    assert type(calling) is not cls and isinstance(calling, cls)
    for size in MAPS:
        x = torch.randn(2, *((3,) if version == "3d" else ()), *size, 32, dtype=torch.float64)
        found = []
        for module in (plain, calling):
            module.zero_grad()
            y = module(leaf := x.clone().requires_grad_())
            y.square().sum().backward()
            found.append([y, leaf.grad, *(p.grad for p in module.parameters())])
        for a, b in zip(*found):
            assert a is None and b is None or torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def small_swin(version: str) -> nn.Module:
    options = {"patch_size": [2, 2], "embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4], "window_size": [2, 2]}
    if version == "3d":
        options |= {"patch_size": [1, 2, 2], "window_size": [2, 2, 2]}
        return video.SwinTransformer3d(**options, num_classes=5)
    if version == "v2":
        options |= {
            "block": swin_transformer.SwinTransformerBlockV2,
            "downsample_layer": swin_transformer.PatchMergingV2,
        }
    return swin_transformer.SwinTransformer(**options, num_classes=5)


@pytest.mark.parametrize("version", ATTENTION)
def test_a_swin_is_quantized_in_both_modes(version):
    plain = small_swin(version)
    model = swap_linears(copy.deepcopy(plain), Recipe())
    x = torch.randn(2, 3, *((2,) if version == "3d" else ()), 8, 8)
    found = coverage(model, x)
    assert not found.having(Status.BYPASSED) and len(found.having(Status.QUANTIZED)) == 3 * 4 + 1
    assert {linear.name for linear in found.having(Status.FULL_PRECISION)} >= {"head"}
    assert all("cpb_mlp" in n.name or n.name == "head" for n in found.having(Status.FULL_PRECISION))
    with torch.no_grad():
        assert not torch.allclose(model.eval()(x), plain.eval()(x), atol=1e-4)
    model.load_state_dict(plain.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def test_a_vit_is_quantized_and_loads_torchvisions_checkpoints():
    from torchvision.models.vision_transformer import VisionTransformer

    plain = VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
    model = swap_linears(copy.deepcopy(plain), Recipe())
    model.load_state_dict(plain.state_dict())
    found = coverage(model, torch.randn(2, 3, 16, 16))
    assert len(found.having(Status.QUANTIZED)) == 8 and not found.having(Status.BYPASSED)
    assert [linear.name for linear in found.having(Status.FULL_PRECISION)] == ["heads.head"]
    assert type(model.encoder.layers[1].self_attention.in_proj) is QuantLinear


def test_a_subclass_of_window_attention_is_refused():
    class Mine(swin_transformer.ShiftedWindowAttention):
        pass

    model = nn.ModuleDict({"attn": Mine(32, [2, 2], [0, 0], 2)})
    with pytest.raises(ValueError, match="attn reads the weights of its linears, and Mine is a subclass"):
        swap_linears(model, Recipe(), "attn.qkv")
