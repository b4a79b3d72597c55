"""`create_model` makes quantized models, whichever timm Python finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import timm
from quantization import RECIPES, Recipe, create_model, quant_linears

REPOSITORY = Path(__file__).resolve().parents[2]


def test_what_is_quantized_and_what_timm_gets():
    model = create_model("deit_micro_patch4_32", Recipe(), img_size=16, num_classes=7)
    assert len(quant_linears(model)) == 8 and model.head.out_features == 7 and model.patch_embed.img_size == (16, 16)
    assert set(quant_linears(create_model("deit_micro_patch4_32", Recipe(), names="mlp.fc2"))) == {
        "blocks.0.mlp.fc2",
        "blocks.1.mlp.fc2",
    }
    assert not quant_linears(create_model("deit_micro_patch4_32", RECIPES["none"]))


def test_a_checkpoint_with_averages_is_loaded_after_the_layers_are_there(tmp_path):
    model = create_model("deit_micro_patch4_32", Recipe().with_q_ema(0.5))
    model.blocks[0].mlp.fc1.weight_ema.add_(1)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    path = str(tmp_path / "weights.pth")
    again = create_model("deit_micro_patch4_32", Recipe().with_q_ema(0.5), checkpoint_path=path)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="ResNet has no linear layer named attn.qkv, attn.proj, mlp.fc1, mlp.fc2"):
        create_model("test_resnet", Recipe())


def test_the_overlays_argument_makes_the_same_model():
    torch.manual_seed(0)
    ours = create_model("deit_micro_patch4_32", Recipe())
    torch.manual_seed(0)
    overlaid = timm.create_model("deit_micro_patch4_32", quant=Recipe())
    assert [type(module) for module in ours.modules()] == [type(module) for module in overlaid.modules()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), overlaid.parameters(), strict=True))


def test_the_installed_timm_without_the_overlay():
    """Python finds the installed timm alone if site-packages come before the repository; it takes no recipe."""
    script = (
        "import sys, timm\n"
        f"sys.path.append({str(REPOSITORY)!r})\n"
        "from quantization import Recipe, create_model, quant_linears\n"
        "assert not hasattr(timm.models.VisionTransformer, 'quant_names')\n"
        "print(len(quant_linears(create_model('deit_tiny_patch16_224', Recipe()))))\n"
    )
    result = subprocess.run([sys.executable, "-P", "-c", script], cwd="/", capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "48\n"), result.stderr
