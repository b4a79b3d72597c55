"""Kept blocks: which linears are ordinary ones again, and that hooks and parameters stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import timm
from quantization import KeepBlocks, QuantLinear, Recipe, quant_linears, restore_linears
from quantization.remedies.keep_blocks import block_numbers, block_of

SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (2, 1), "num_heads": (1, 2)}


def deit(recipe: Recipe | None) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 4, "num_classes": 10}
    return timm.create_model("deit_micro_patch4_32", **small, **({} if recipe is None else {"quant": recipe}))


def test_the_linears_of_kept_blocks_are_ordinary():
    model = deit(Recipe().with_q_ema())
    KeepBlocks((0, 3)).change_model(model)
    assert {name.split(".")[1] for name in quant_linears(model)} == {"1", "2"}
    assert type(model.blocks[0].mlp.fc1) is nn.Linear and type(model.blocks[1].mlp.fc1) is QuantLinear
    assert not [name for name in model.state_dict() if "ema" in name and name.startswith(("blocks.0", "blocks.3"))]


def test_a_model_with_all_linears_put_back_is_the_one_that_was_never_quantized():
    plain, model, images = deit(None), deit(Recipe()), torch.randn(3, 3, 8, 8)
    restore_linears(model, list(quant_linears(model)))
    assert torch.equal(model(images), plain(images))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_swins_blocks_are_counted_over_all_stages():
    """Two blocks, the reduction between the stages, and the block of the second stage."""
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN, quant=Recipe())
    names = list(quant_linears(model))
    KeepBlocks((1,)).change_model(model)
    gone = set(names) - set(quant_linears(model))
    assert gone == {f"layers.0.blocks.1.{leaf}" for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


def test_hooks_and_training_mode_stay():
    model, called = deit(Recipe()).eval(), []
    handle = model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: called.append(1))
    KeepBlocks((1,)).change_model(model)
    assert not model.blocks[1].mlp.fc1.training
    model(torch.randn(1, 3, 8, 8))
    handle.remove()
    model(torch.randn(1, 3, 8, 8))
    assert called == [1]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((0, 4), "--keep-blocks takes numbers from 0 to 3 for this model, got 4"),
        ((0, 1, 2, 3), "--keep-blocks must leave a block, got all 4; use --quant none"),
    ],
)
def test_what_makes_no_sense_is_refused(blocks, message):
    model = deit(Recipe())
    with pytest.raises(ValueError, match=message):
        KeepBlocks(blocks).change_model(model)
    assert len(quant_linears(model)) == 16


@pytest.mark.parametrize(("text", "want"), [("0", (0,)), ("11,0", (0, 11)), ("3,3", (3,))])
def test_numbers_of_blocks(text, want):
    assert block_numbers(text) == want


@pytest.mark.parametrize("text", ["", "a", "-1", "1,", "1.5", "²"])
def test_other_texts_are_refused(text):
    with pytest.raises(Exception, match="needs numbers of blocks from 0, separated by commas"):
        block_numbers(text)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.mlp.fc1", "blocks.3"),
        ("layers.1.blocks.0.attn.qkv", "layers.1.blocks.0"),
        ("blocks.2.mlp.0", "blocks.2"),
        ("layers.1.downsample.reduction", "layers.1"),
        ("head.fc", "head"),
    ],
)
def test_the_block_of_a_linear(name, block):
    assert block_of(name) == block
