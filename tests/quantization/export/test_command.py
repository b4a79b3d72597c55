"""The command line of the export: what it prints, and one line for each mistake, with nothing written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import quantization.export.writing as writing
import timm
from quantization import RECIPES, Quantizer, QuantLinear, Recipe, create_model, export_model, load
from quantization.export.__main__ import main
from quantization.export.trained import read_checkpoint
from quantization.recipe import RECIPE_CHANGES, changed_recipe

SMALL = {"depth": 1, "embed_dim": 64, "num_heads": 2, "img_size": 32, "num_classes": 3}


SMALL_SWIN = {"depths": (1, 1), "num_heads": (3, 6), "img_size": 56, "num_classes": 3}
PLAIN = ("--quant", "microscaling")


def save_with_options(checkpoint: Path, path: Path, options: dict[str, object], healed: bool) -> None:
    """Write the checkpoint that a run with these options, too, would have left."""
    state = torch.load(checkpoint, weights_only=True)
    state["options"] |= options
    changes = {name: state["options"][name] for name in RECIPE_CHANGES}
    state["identity"]["recipe"] = changed_recipe(state["options"]["quant"], **changes).describe()
    state["more"]["remedies"]["heal"] = {"healed": healed}
    torch.save(state, path)


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(checkpoint, *options): the one line with which the command refuses; nothing was written."""

    def run(checkpoint: Path, *options: str, to: Path | None = None) -> str:
        before = sorted(tmp_path.rglob("*"))
        target = tmp_path / "out" if to is None else to
        capsys.readouterr()  # what a run printed that was trained for this test
        defaults = [] if "--to-format" in options else ["--to-format", "compressed-tensors"]
        assert main([str(checkpoint), "--to", str(target), *defaults, *options]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("quantization.export: error: ")
        assert printed.err.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before
        return printed.err

    return run


def test_sizes_and_what_stays_are_reported(trained, tmp_path, capsys):
    """Four linears of block 0: 128 x 384, 128 x 128 and twice 128 x 512 weights; 4.25 bits for each of them."""
    checkpoint = trained("--quant", "mxfp4", "--q-ema", "--keep-blocks", "1")
    capsys.readouterr()
    assert main([str(checkpoint), "--to", str(tmp_path / "out"), "--to-format", "compressed-tensors"]) == 0
    printed = capsys.readouterr().out
    quantized = 128 * 384 + 128 * 128 + 2 * 128 * 512
    parameters = timm.create_model("deit_micro_patch4_32", num_classes=10, img_size=8).parameters()
    total = sum(p.numel() for p in parameters)
    assert f"4 linears, {quantized:,} weights in MXFP4" in printed
    assert f"stays   {total - quantized:,} numbers in high precision: cls_token, pos_embed" in printed
    assert f"size    {4 * total / 1e6:.2f} MB in fp32; " in printed
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0 < size - (quantized * 4.25 / 8 + 4 * (total - quantized)) < 8000  # the file's header
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "deit_micro_patch4_32" and config["model_args"] == {
        "num_classes": 10,
        "img_size": 8,
    }
    assert config["tetrajet"]["q1"] == {"enabled": True, "element": "e2m1", "scaling": "truncation_free"} | {
        "rounding": "nearest"
    }
    assert config["tetrajet"]["source"]["recipe"] == "tetrajet, q_ema_beta=0.998"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "none"}, "was trained in full precision"),
        ({"quant": "int4"}, "was trained with --quant int4, which is simulated"),
        ({"forward_element": "e3m0"}, "needs weights in E2M1, blocks.0.attn.qkv has e3m0"),
        ({"quantizers": ("q1", "q3")}, "needs 4-bit weights, .*enable q2"),
        ({"heal": 1}, "is healed: from epoch 1 on"),
    ],
)
def test_runs_without_4_bit_weights_are_refused(options, message, trained, refused, tmp_path):
    save_with_options(trained(*PLAIN), tmp_path / "other.pth", options, healed=True)
    assert re.search(message, refused(tmp_path / "other.pth"))


def test_a_run_that_would_heal_later_is_exported(trained, tmp_path):
    save_with_options(trained(*PLAIN), tmp_path / "early.pth", {"heal": 2, "epochs": 2}, healed=False)
    command = [str(tmp_path / "early.pth"), "--to", str(tmp_path / "out"), "--to-format", "compressed-tensors"]
    assert main(command) == 0


def test_files_that_are_not_ours_are_refused(trained, refused, tmp_path):
    checkpoint = trained(*PLAIN)
    foreign, older, other = tmp_path / "foreign.pth", tmp_path / "older.pth", tmp_path / "other.pth"
    torch.save({"model": {}}, foreign)
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"options": {}}, older)
    torch.save(state | {"identity": state["identity"] | {"recipe": "tetrajet"}}, other)
    without = {name: value for name, value in state["model"].items() if name != "norm.weight"}
    torch.save(state | {"model": without}, tmp_path / "part.pth")
    torch.save(state | {"model_ema": None}, tmp_path / "alone.pth")
    torch.save(state | {"identity": state["identity"] | {"model": "no_such_model"}}, tmp_path / "unknown.pth")
    broken = state["model"] | {"blocks.1.mlp.fc2.weight": torch.full((128, 512), torch.nan)}
    torch.save(state | {"model": broken}, tmp_path / "nan.pth")
    damaged = bytearray(checkpoint.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pth").write_bytes(damaged)
    del state["more"]
    torch.save(state, tmp_path / "parts.pth")
    assert "is no checkpoint of main.py, version 2" in refused(foreign)
    assert "must be a file that main.py has written" in refused(tmp_path / "missing.pth")
    assert "is damaged or no checkpoint" in refused(tmp_path / "damaged.pth")
    assert "older than the options in checkpoints" in refused(older)
    assert "was trained with the recipe tetrajet, which its options do not give" in refused(other)
    assert 'does not fit timm\'s deit_micro_patch4_32: Missing key(s) in state_dict: "norm.weight"' in refused(
        tmp_path / "part.pth"
    )
    assert "--weights ema needs a checkpoint with the model's average" in refused(
        tmp_path / "alone.pth", "--weights", "ema"
    )
    assert "has no model no_such_model" in refused(tmp_path / "unknown.pth")
    assert "blocks.1.mlp.fc2 holds NaN or Inf" in refused(tmp_path / "nan.pth")
    assert "parts of it are missing" in refused(tmp_path / "parts.pth")
    assert read_checkpoint(checkpoint)["epoch"] == 1


def test_a_target_that_holds_something_is_refused_before_the_checkpoint_is_read(refused, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    nowhere = tmp_path / "none.pth"
    assert "full holds something; give another" in refused(nowhere, to=tmp_path / "full")
    assert "which is a file; give another" in refused(nowhere, to=tmp_path / "full" / "notes.txt")
    assert "invalid choice: 'gguf'" in refused(nowhere, "--to-format", "gguf")
    (tmp_path / "empty").mkdir()
    assert "must be a file that main.py has written" in refused(nowhere, to=tmp_path / "empty")


def test_a_missing_library_is_named_and_nothing_stays(trained, refused, monkeypatch):
    checkpoint = trained(*PLAIN)
    for name in ("torchao", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, "torchao.prototype.mx_formats", None)
        assert f"the format {name} needs {name} >= " in refused(checkpoint, "--to-format", name)


class TestTheLibrary:
    @pytest.mark.parametrize(
        ("name", "options", "layers"),
        [
            ("vit_tiny_patch16_224", SMALL, 4),
            ("beit_base_patch16_224", {name: value for name, value in SMALL.items() if name != "img_size"}, 4),
            ("swin_tiny_patch4_window7_224", SMALL_SWIN, 9),
        ],
    )
    def test_a_model_in_memory_is_exported_and_loaded(self, name, options, layers, tmp_path, assert_same_bits):
        """Of several families; BEiT's attention is one that is made to call its linears."""
        model = create_model(name, Recipe(), **options).eval()
        (tmp_path / "empty").mkdir()
        packed = export_model(model, tmp_path / "empty", "compressed-tensors", name, **options)
        size = options.get("img_size", 224)
        images = torch.linspace(-2, 2, 2 * 3 * size * size).view(2, 3, size, size)
        with torch.no_grad():
            assert_same_bits(load(tmp_path / "empty")(images), model(images))
        assert len(packed.weights) == layers and not [path for path in tmp_path.iterdir() if path.name != "empty"]

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ([nn.Linear(32, 4)], "got one of which none of its layers is quantized"),
            (
                [QuantLinear(32, 4), QuantLinear(32, 4, recipe=RECIPES["microscaling"])],
                "one recipe for all layers, got 2",
            ),
            ([QuantLinear(33, 4)], "0 has rows of 33"),
            (
                [QuantLinear(32, 4, recipe=Recipe(q2=Quantizer(rounding="stochastic")))],
                "0 draws another in every forward",
            ),
        ],
    )
    def test_other_models_are_refused(self, layers, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            export_model(nn.Sequential(*layers), tmp_path / "out", "compressed-tensors", "none")
        assert not list(tmp_path.iterdir())

    def test_a_failure_leaves_nothing(self, tmp_path, monkeypatch):
        model = create_model("vit_tiny_patch16_224", Recipe(), **SMALL)
        full = writing.Format(lambda packed, directory: (directory / "model").write_text("part") and 1 / 0, None)
        monkeypatch.setitem(writing.FORMATS, "full", full)
        with pytest.raises(ZeroDivisionError):
            export_model(model, tmp_path / "out", "full", "vit_tiny_patch16_224", **SMALL)
        assert not list(tmp_path.iterdir())

    def test_directories_that_are_not_ours_are_refused(self, tmp_path):
        model = create_model("vit_tiny_patch16_224", Recipe(), **SMALL)
        export_model(model, tmp_path / "out", "compressed-tensors", "vit_tiny_patch16_224", **SMALL)
        with pytest.raises(ValueError, match="load needs a directory that quantization.export has written, got .*none"):
            load(tmp_path / "none")
        config = tmp_path / "out" / "config.json"
        content = json.loads(config.read_text())
        for change, message in (
            ({"tetrajet": content["tetrajet"] | {"version": 2}}, "version 2, not 1"),
            ({"tetrajet": {}}, "load needs a directory"),
            ({"architecture": "no_such_model"}, "has no model no_such_model"),
            ({"model_args": SMALL | {"num_classes": 4}}, "is damaged or of another model"),
            ({"tetrajet": content["tetrajet"] | {"layers": ["blocks.0.mlp.fc1"]}}, "of another model"),
        ):
            config.write_text(json.dumps(content | change))
            with pytest.raises(ValueError, match=message):
                load(tmp_path / "out")
        config.write_text(json.dumps(content))
        (tmp_path / "out" / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="is damaged or of another model"):
            load(tmp_path / "out")
