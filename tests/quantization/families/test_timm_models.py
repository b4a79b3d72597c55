"""timm's Transformers: the linears of their blocks are quantized, and called."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import timm
from quantization import QuantLinear, Recipe, Status, coverage, quant_linears, swap_linears

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 5}
BLOCK = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


def small(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL | options)


CALLED = {  # what is quantized in blocks.0, and elsewhere
    "beit_base_patch16_224": (BLOCK, set()),
    "eva02_tiny_patch14_224": (BLOCK, set()),
    "eva02_base_patch14_448": (
        {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"},
        set(),
    ),
    "vit_small_patch16_dinov3": (BLOCK, set()),
    "vit_small_plus_patch16_dinov3": ({"attn.qkv", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"}, set()),
    "vit_base_patch14_dinov2": (BLOCK, set()),
    "deit3_small_patch16_224": (BLOCK, set()),
    "vit_base_patch16_siglip_224": (BLOCK, set()),
    "vit_base_patch16_xp_224": ({"in_proj", "attn_out_proj", "mlp_out_proj"}, set()),
    "cait_xxs24_224": (
        BLOCK,
        {f"blocks_token_only.0.{n}" for n in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")},
    ),
    "xcit_nano_12_p8_224": (
        BLOCK,
        {f"cls_attn_blocks.0.{n}" for n in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")},
    ),
}


@pytest.mark.parametrize("name", CALLED)
def test_these_and_no_other_linears_are_quantized_in_both_modes(name):
    in_block, elsewhere = CALLED[name]
    options = {"depth_token_only": 1} if name.startswith("cait") else {"cls_attn_layers": 1} if "xcit" in name else {}
    model = swap_linears(small(name, **options), Recipe())
    found = coverage(model, torch.randn(2, 3, 32, 32))
    assert not found.having(Status.BYPASSED) and not found.having(Status.UNUSED)
    wanted = {f"blocks.0.{linear}" for linear in in_block} | elsewhere
    assert {linear.name for linear in found.having(Status.QUANTIZED)} == wanted == quant_linears(model).keys()


@pytest.mark.parametrize("name", ["gmlp_ti16_224", "resmlp_12_224", "maxvit_tiny_pm_256"])
def test_other_models_of_a_class_have_linears_under_other_names(name):
    with torch.device("meta"):
        model = swap_linears(timm.create_model(name), Recipe())
    left = {path for path, layer in model.named_modules() if type(layer) is nn.Linear}
    assert left == {model.default_cfg["classifier"]}


def small_swin_v2() -> nn.Module:
    options = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 1)}
    torch.manual_seed(0)
    return timm.create_model("swinv2_tiny_window8_256", **options, num_heads=(1, 2), num_classes=5)


@pytest.mark.parametrize(
    "build",
    [lambda: small("beit_base_patch16_224"), lambda: small("eva02_tiny_patch14_224"), small_swin_v2],
    ids=["beit", "eva02", "swinv2"],
)
def test_a_bias_that_is_added_afterwards_is_the_same_bias(build):
    """Mended, but not quantized, the model computes what it did, also the gradients, with random q and v biases."""
    plain = build().double().eval()
    for name, parameter in plain.named_parameters():
        if parameter.dim() == 1 or "head" in name:  # biases, and norms that begin at 0
            nn.init.normal_(parameter)
    quantized = swap_linears(copy.deepcopy(plain), Recipe(), "attn.qkv")
    mended = copy.deepcopy(quantized)
    for module in mended.modules():  # back to plain linears, in the modules that were mended
        for name, child in module.named_children():
            if isinstance(child, QuantLinear):
                linear = nn.Linear(child.in_features, child.out_features, child.bias is not None, dtype=torch.float64)
                linear.load_state_dict(child.state_dict())
                setattr(module, name, linear)
    size = 16 if type(plain).__name__.startswith("Swin") else 32
    x, found = torch.randn(2, 3, size, size, dtype=torch.float64), []
    for model in (plain, mended):
        y = model(x)
        y.square().sum().backward()
        found.append([y, *(p.grad for _, p in sorted(model.named_parameters()))])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(quantized(x), plain(x), rtol=1e-3)


def test_a_position_bias_is_no_block():
    model = swap_linears(small("vit_relpos_small_patch16_224", rel_pos_type="mlp", rel_pos_dim=16), Recipe())
    assert not any("rel_pos" in name for name in quant_linears(model)) and len(quant_linears(model)) == 4
