"""The overlay: what is ours, what is the installed release's, and which linears a recipe swaps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import timm
from quantization import RECIPES, QuantLinear, Recipe, quant_linears

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLED = Path(timm.__path__[1])
BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def test_ours_and_theirs():
    """Every module of the installed release resolves, and to the installed file unless we have one of that name."""
    ours = {p.relative_to(REPOSITORY / "timm") for p in (REPOSITORY / "timm").rglob("*.py")}
    models = ("__init__.py", "_quant.py", "swin_transformer.py", "vision_transformer.py")
    assert ours == {Path(p) for p in ("__init__.py", "_overlay.py", *(f"models/{name}" for name in models))}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] != "timm" or file is None:
            continue
        expected = REPOSITORY / "timm" if Path(file).is_relative_to(REPOSITORY / "timm") else INSTALLED
        assert Path(file).is_relative_to(expected)
        if expected != INSTALLED:
            assert Path(file).relative_to(expected) in ours
    assert len([name for name in sys.modules if name.startswith("timm.")]) > 100


def test_untouched_names_are_the_installed_releases_own():
    """Compared with a process that never sees this repository."""
    modules = ("timm.models.vision_transformer", "timm.models.swin_transformer")
    listing = (
        "import timm, sys, inspect; print(timm.__version__); print(*sorted(timm.list_models()))\n"
        f"for module in {modules}: print(*sorted(n for n, o in vars(sys.modules[module]).items() "
        "if inspect.isclass(o) or inspect.isfunction(o)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", listing], cwd=INSTALLED.parent, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert timm.__version__ == out[0]
    assert set(timm.list_models()) - set(out[1].split()) == {"deit_micro_patch4_32", "deit_nano_patch4_32"}
    assert set(out[1].split()) <= set(timm.list_models())
    for module, names in zip(modules, out[2:], strict=True):
        assert set(names.split()) <= set(vars(sys.modules[module]))
        assert names.split()
    assert timm.data.Mixup.__module__ == "timm.data.mixup" and Path(timm.data.__file__).is_relative_to(INSTALLED)


@pytest.mark.parametrize(
    ("name", "dim", "depth"),
    [
        ("deit_tiny_patch16_224", 192, 12),
        ("deit_small_patch16_224", 384, 12),
        ("deit_base_patch16_224", 768, 12),
        ("deit_tiny_distilled_patch16_224", 192, 12),
        ("deit_small_distilled_patch16_224", 384, 12),
        ("deit_base_distilled_patch16_224", 768, 12),
        ("deit3_small_patch16_224", 384, 12),
        ("vit_tiny_patch16_224", 192, 12),
        ("deit_micro_patch4_32", 128, 2),
        ("deit_nano_patch4_32", 64, 6),
    ],
)
def test_which_linears_change_and_which_stay(name, dim, depth):
    model = timm.create_model(name, quant=Recipe(), num_classes=7)
    expected = {f"blocks.{i}.{layer}" for i in range(depth) for layer in BLOCK}
    assert set(quant_linears(model)) == expected
    shapes = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for layer, shape in shapes.items():
        assert tuple(model.blocks[0].get_submodule(layer).weight.shape) == shape
    assert model.blocks[0].attn.num_heads == dim // (32 if dim < 192 else 64)
    plain = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, QuantLinear)}
    assert plain == ({"head", "head_dist"} if "distilled" in name else {"head"})
    assert isinstance(model.patch_embed.proj, nn.Conv2d)


@pytest.mark.parametrize(
    ("name", "options", "depths"),
    [
        ("swin_tiny_patch4_window7_224", {}, (2, 2, 6, 2)),
        ("swin_tiny_patch4_window7_224", {"img_size": (64, 96), "window_size": (4, 6)}, (2, 2, 6, 2)),
        ("swin_small_patch4_window7_224", {}, (2, 2, 18, 2)),
        ("swin_small_patch4_window7_224", {"img_size": 192, "window_size": 6}, (2, 2, 18, 2)),
        ("swin_s3_tiny_224", {}, (2, 2, 6, 2)),
    ],
    ids=str,
)
def test_which_linears_of_a_swin_change_and_which_stay(name, options, depths):
    """Those of every block, with shifted windows and without, and of every patch merging; the head stays."""
    model = timm.create_model(name, quant=Recipe(), num_classes=7, **options)
    expected = {f"layers.{s}.blocks.{i}.{layer}" for s, n in enumerate(depths) for i in range(n) for layer in BLOCK}
    expected |= {f"layers.{stage}.downsample.reduction" for stage in (1, 2, 3)}
    assert set(quant_linears(model)) == expected
    assert {block.shift_size == (0, 0) for block in model.layers[0].blocks} == {True, False}
    for stage in range(4):
        dim = 96 * 2**stage
        shapes = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        shapes |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
        for layer, shape in shapes.items():
            assert tuple(model.layers[stage].blocks[1].get_submodule(layer).weight.shape) == shape
        if stage > 0:  # four neighbours of half the width
            assert tuple(model.layers[stage].downsample.reduction.weight.shape) == (dim, 4 * dim // 2)
    plain = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, QuantLinear)}
    assert plain == {"head.fc"}
    assert isinstance(model.patch_embed.proj, nn.Conv2d)


def test_patch_merging_stays_where_its_name_is_left_out(monkeypatch):
    swin = timm.models.swin_transformer
    assert (*BLOCK, "downsample.reduction") == swin.SWIN_LINEARS
    monkeypatch.setattr(swin.SwinTransformer, "quant_names", swin.SWIN_LINEARS[:-1])
    model = timm.create_model("swin_tiny_patch4_window7_224", quant=Recipe(), embed_dim=24)
    assert len(quant_linears(model)) == 48 and type(model.layers[1].downsample.reduction) is nn.Linear


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_without_a_recipe_the_model_is_stock_and_weights_are_the_same(name):
    for quant in (None, RECIPES["none"]):
        assert not quant_linears(timm.create_model(name, quant=quant))
    torch.manual_seed(0)
    stock = timm.create_model(name).state_dict()
    torch.manual_seed(0)
    quantized = timm.create_model(name, quant=Recipe().with_q_ema()).state_dict()
    assert all(torch.equal(stock[k], quantized[k]) for k in stock)
    assert {k.rpartition(".")[2] for k in quantized.keys() - stock.keys()} == {"weight_ema", "ema_updates"}


def test_facebooks_deit_checkpoints_load(tmp_path):
    """Their files hold {"model": state_dict} with the names of 2021; here one with random weights of that layout."""
    dim, depth = 192, 12
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 197, dim), "norm.weight": (dim,), "norm.bias": (dim,)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,)}
    shapes |= {"head.weight": (1000, dim), "head.bias": (1000,)}
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (dim,), f"blocks.{i}.{norm}.bias": (dim,)}
        for layer, out, inp in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes |= {f"blocks.{i}.{layer}.weight": (out * dim, inp * dim), f"blocks.{i}.{layer}.bias": (out * dim,)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    path = tmp_path / "deit_tiny_patch16_224-a1311bcf.pth"
    torch.save({"model": weights}, path)
    for recipe in (Recipe(), Recipe().with_q_ema()):
        model = timm.create_model("deit_tiny_patch16_224", quant=recipe, checkpoint_path=str(path))
        assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_a_model_with_other_layers_is_refused():
    with pytest.raises(TypeError, match="quant"):
        timm.create_model("resnet18", quant=Recipe())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["-S", "-c", "import timm"], "timm >= 1.0.20 must be installed beside"),  # -S: without site-packages
        (
            ["-c", "import importlib.metadata as m; m.version = lambda name: '0.9.16'; import timm"],
            "timm >= 1.0.20 is required, got 0.9.16; pip install -U timm",
        ),
    ],
    ids=["missing", "too old"],
)
def test_a_missing_or_old_timm_is_a_clear_error(command, message):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert result.returncode == 1 and message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "options"),
    [("deit_micro_patch4_32", {}), ("swin_tiny_patch4_window7_224", {"embed_dim": 24})],
)
def test_models_survive_pickling(name, options, tmp_path):
    model = timm.create_model(name, quant=Recipe(), **options)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(loaded) is type(model) and quant_linears(loaded).keys() == quant_linears(model).keys()
    assert {layer.recipe for layer in quant_linears(loaded).values()} == {Recipe()}
