"""Weights in the forms that people have: each gives the model the very tensors that were stored."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import timm
from main import main
from quantization import Int4Recipe, Recipe, create_model
from runtime.errors import UserError
from training.weights import OURS, Weights, load_weights

SMALL = {"img_size": 16, "num_classes": 3}
PATH = Path("weights.pth")


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def random_weights(name: str = "deit_micro_patch4_32", **options) -> dict[str, Tensor]:
    """Weights of which no two tensors are equal, biases and tokens included."""
    generator = torch.Generator().manual_seed(1)
    state = timm.create_model(name, **SMALL | options).state_dict()
    return {name: torch.randn(value.shape, generator=generator) for name, value in state.items()}


def test_every_tensor_that_quantizing_adds_is_one_that_a_file_may_lack():
    """`OURS` must name what the layers of every recipe have besides a weight and a bias."""
    plain, added = timm.create_model("deit_micro_patch4_32", **SMALL).state_dict().keys(), set()
    for recipe in (Recipe(), Recipe().with_q_ema(), Int4Recipe()):
        names = timm.create_model("deit_micro_patch4_32", **SMALL, quant=recipe).state_dict().keys()
        added |= {f".{name.rpartition('.')[2]}" for name in names - plain}
    assert added == set(OURS)


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


FORMS = {
    "bare": lambda w: w,
    "DeiT's main.py": lambda w: {"model": w, "optimizer": {}, "epoch": 1, "args": argparse.Namespace(lr=5e-4)},
    "timm's": lambda w: {"state_dict": w, "arch": "x", "args": argparse.Namespace(lr=5e-4), "metric": np.float64(0.5)},
    "timm's average alone": lambda w: {"state_dict_ema": w, "epoch": 1},
    "NumPy scalars": lambda w: {"model": w, "best": np.float32(1.0), "count": np.int64(3)},
    "DDP": lambda w: {"model": prefixed("module.", w)},
    "compiled": lambda w: {"model": prefixed("_orig_mod.", w)},
    "DDP of a compiled model": lambda w: {"model": prefixed("module._orig_mod.", w)},
    "compiled DDP": lambda w: {"model": prefixed("_orig_mod.module.", w)},
    "Lightning around DDP": lambda w: {"state_dict": prefixed("model.module.", w), "pytorch-lightning_version": "2.0"},
    "Lightning with another attribute": lambda w: {
        "state_dict": prefixed("net.backbone.", w),
        "pytorch-lightning_version": "2.0",
    },
    "Lightning": lambda w: {
        "state_dict": prefixed("model.", w) | {"accuracy.total": torch.ones(1)},
        "pytorch-lightning_version": "2.0",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_the_stored_tensors(form):
    weights = random_weights()
    torch.save(FORMS[form](weights), PATH)
    model = timm.create_model("deit_micro_patch4_32", **SMALL)
    load_weights(model, PATH)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_safetensors():
    weights = random_weights()
    safetensors.torch.save_file(weights, "weights.safetensors")
    model = timm.create_model("deit_micro_patch4_32", **SMALL)
    load_weights(model, Path("weights.safetensors"))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_average_is_taken_if_it_is_asked_for(capsys):
    """Ours stands under `module.`."""
    model, average = random_weights(), {name: value + 1 for name, value in random_weights().items()}
    torch.save({"model": model, "model_ema": prefixed("module.", average)}, PATH)
    for which, wanted in ((Weights.MODEL, model), (Weights.EMA, average)):
        found = timm.create_model("deit_micro_patch4_32", **SMALL)
        load_weights(found, PATH, which=which)
        assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())
    torch.save({"model": model, "model_ema": None}, PATH)
    with pytest.raises(UserError, match="--weights ema needs a file with the model's average, weights.pth has none"):
        load_weights(found, PATH, which=Weights.EMA)


def test_code_in_a_file_is_not_executed():
    class Evil:
        def __reduce__(self):
            return Path.touch, (Path("touched"),)

    PATH.write_bytes(pickle.dumps({"model": Evil()}))
    for content in ({"model": Evil()}, {"model": random_weights(), "args": Evil()}):
        torch.save(content, PATH)
        with pytest.raises(UserError, match="not a readable checkpoint: damaged, or of another program"):
            load_weights(timm.create_model("deit_micro_patch4_32", **SMALL), PATH)
    assert not Path("touched").exists()


def test_a_position_embedding_is_interpolated_as_timm_does(capsys):
    weights = random_weights()
    torch.save(weights, PATH)
    model = timm.create_model("deit_micro_patch4_32", **SMALL | {"img_size": 32})
    load_weights(model, PATH)
    grid = weights["pos_embed"][:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(grid, (8, 8), mode="bicubic", antialias=True).flatten(2).mT
    assert torch.allclose(model.pos_embed[:, 1:], wanted, atol=1e-6)
    assert torch.equal(model.pos_embed[:, :1], weights["pos_embed"][:, :1])
    assert "interpolated pos_embed from 1x17x128 to 1x65x128" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "heads"),
    [
        ("deit_micro_patch4_32", {}, ["head"]),
        (
            "deit_tiny_distilled_patch16_224",
            {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 1},
            ["head", "head_dist"],
        ),
        ("test_resnet", {"img_size": None}, ["fc"]),
        ("test_convnext", {"img_size": None}, ["head.fc"]),
    ],
)
def test_another_number_of_classes_keeps_the_models_head(name, options, heads, capsys):
    options = {key: value for key, value in (SMALL | options).items() if value is not None}
    weights = timm.create_model(name, **options).state_dict()
    torch.save({"model": weights}, PATH)
    model = timm.create_model(name, **options | {"num_classes": 7})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_weights(model, PATH)
    for key, value in model.state_dict().items():
        of_head = any(key.startswith(f"{head}.") for head in heads)
        assert torch.equal(value, before[key] if of_head else weights[key]), key
    assert "has no head for these classes" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not fit the model: size mismatch for"):
        load_weights(model, PATH, new_head=False)


def test_a_head_of_which_a_part_is_missing_begins_at_random(capsys):
    weights = random_weights()
    torch.save({name: value for name, value in weights.items() if name != "head.bias"}, PATH)
    model = timm.create_model("deit_micro_patch4_32", **SMALL)
    before = model.head.weight.clone()
    load_weights(model, PATH)
    assert torch.equal(model.head.weight, before) and torch.equal(model.norm.weight, weights["norm.weight"])
    assert "the model's begins at random" in capsys.readouterr().out


def test_names_of_the_official_swin_and_deit_iii():
    """Swin numbers its downsamplings by the stage before; DeiT-III has gamma_1 where timm has ls1.gamma."""
    swin = {"img_size": 32, "embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "num_classes": 3}
    model = timm.create_model("swin_tiny_patch4_window7_224", **swin)
    official = {
        name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): torch.randn_like(value)
        for name, value in model.state_dict().items()
    }
    torch.save({"model": official}, PATH)
    load_weights(model, PATH)
    assert torch.equal(model.layers[1].downsample.reduction.weight, official["layers.0.downsample.reduction.weight"])
    assert torch.equal(model.head.fc.weight, official["head.weight"])
    model = timm.create_model("deit3_small_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=1, num_classes=3)
    official = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): torch.randn_like(value)
        for name, value in model.state_dict().items()
    }
    torch.save({"model": official}, PATH)
    load_weights(model, PATH)
    assert torch.equal(model.blocks[0].ls1.gamma, official["blocks.0.gamma_1"])


def test_a_quantized_models_file_fits_a_plain_one_and_the_other_way_round():
    quantized = create_model("deit_micro_patch4_32", Recipe().with_q_ema(0.5), **SMALL)
    plain = timm.create_model("deit_micro_patch4_32", **SMALL)
    for source, target in ((quantized, plain), (plain, quantized)):
        torch.save({"model": source.state_dict()}, PATH)
        load_weights(target, PATH)
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": 1}}, "needs a file of weights, or one with them under 'model' or 'state_dict'"),
        ({"model": {"a": torch.ones(1)}}, "does not fit the model: it lacks blocks.0.attn.proj.bias"),
        ([1], "it holds a list"),
    ],
)
def test_anything_else_is_refused(content, message):
    torch.save(content, PATH)
    with pytest.raises(UserError, match=message):
        load_weights(timm.create_model("deit_micro_patch4_32", **SMALL), PATH)


TINY = [
    "--model",
    "deit_micro_patch4_32",
    "--input-size",
    "8",
    "--num-workers",
    "0",
    "--device",
    "cpu",
    "--epochs",
    "1",
]


def test_timms_own_weights(monkeypatch, capsys):
    """timm reads them from a file that its configuration names; without it, and without a network, one line says so."""
    weights = random_weights(img_size=32, num_classes=10)
    torch.save(weights, PATH)
    from timm.models import _registry

    config = _registry._model_pretrained_cfgs["deit_micro_patch4_32"]
    monkeypatch.setattr(config, "file", str(PATH.resolve()))
    assert main([*TINY[:2], *TINY[4:], "--pretrained", "--eval", "--quant", "mxfp4"]) == 0
    found = capsys.readouterr().out
    assert main([*TINY[:2], *TINY[4:], "--finetune", str(PATH), "--eval", "--quant", "mxfp4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == found.splitlines()[-1]
    monkeypatch.setattr(config, "file", None)
    assert main([*TINY, "--pretrained", "--output-dir", "out"]) == 2
    assert "--pretrained could not fetch timm's weights of deit_micro_patch4_32: " in capsys.readouterr().err
    assert not Path("out").exists()
