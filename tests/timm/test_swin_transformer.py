"""Swin Transformers in MXFP4: every linear against float64, windows and patch merging included; whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import timm
from datasets import DataConfig, build_loaders
from main import main
from quantization import RECIPES, Quantizer, Recipe, quant_linears, quantize_mx

NAME = "swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2)}
"""Two stages instead of four: the second block of each shifts its windows, patch merging lies between them."""


def small_swin(recipe: Recipe, img_size: int, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"img_size": img_size, "num_classes": 10, "drop_path_rate": 0.0, "quant": recipe}
    return timm.create_model(NAME, **options, **SMALL).to(device)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


# 56 px: 14 x 14 patches, four windows of 49 tokens. 36 px: 9 x 9, padded with zeros to as many windows, then 5 x 5.
@pytest.mark.parametrize("img_size", [56, 36])
def test_without_quantizers_it_is_the_stock_model_in_float64(img_size, randn, device):
    images, dy = randn(2, 3, img_size, img_size), randn(2, 10)
    model = small_swin(Recipe(), img_size, device)
    for layer in quant_linears(model).values():
        layer.recipe = RECIPES["none"]
    stock = small_swin(RECIPES["none"], img_size, device).double()
    assert not quant_linears(stock)
    y, expected = model(images), stock(images.double())
    assert relative_error(y, expected) < 1e-5
    y.backward(dy)
    expected.backward(dy.double())
    for (name, p), q in zip(model.named_parameters(), stock.parameters()):
        assert relative_error(p.grad, q.grad) < 1e-4, name


@pytest.mark.parametrize("img_size", [56, 36])
def test_every_linear_multiplies_its_quantized_operands(img_size, randn, device):
    """Rebuilt with `quantize_mx` from what each layer got in a pass through the model, multiplied in float64.

    Groups along N run through the tokens of all windows of all images. In the first stage their number is no multiple
    of 32; in the second one it depends on how timm's release pads a map that is smaller than a window.
    """
    model = small_swin(Recipe(*[Quantizer()] * 6), img_size, device)
    assert any(block.shift_size != (0, 0) for block in model.layers[0].blocks)
    seen = {}
    for layer in (layers := quant_linears(model)).values():
        layer.register_forward_hook(lambda layer, args, y: seen.update({layer: [args[0].detach(), y.detach()]}))
        layer.register_full_backward_hook(lambda layer, dx, dy: seen[layer].extend((dx[0], dy[0])))
    model(randn(2, 3, img_size, img_size)).backward(randn(2, 10))

    def q(t, axis):
        return quantize_mx(t, axis=axis).dequantize()

    assert len(layers) == 17
    for name, layer in layers.items():
        x, y, dx, dy = (t.flatten(0, -2) for t in seen[layer])
        assert len(x) % 32 != 0 or not name.startswith("layers.0."), name
        q1, q2 = q(x, 1), q(layer.weight.detach(), 1)
        bias = 0 if layer.bias is None else layer.bias.detach().double()
        assert relative_error(y, q1.double() @ q2.double().T + bias) < 1e-6, name
        assert relative_error(dx, q(dy, 1).double() @ q(q2, 0).double()) < 1e-6, name
        assert relative_error(layer.weight.grad, q(dy, 0).double().T @ q(q1, 0).double()) < 1e-6, name


class TestRuns:
    """`main.py` on digits of 16 px: 4 x 4 patches, windows of 2 x 2 that shift by one."""

    ARGUMENTS = ["--model", NAME, "--quant", "mxfp4", "--input-size", "16", "--batch-size", "10", "--epochs", "2"]
    ARGUMENTS += ["--device", "cpu", "--warmup-epochs", "0"]
    ALL = ["--q-ema", "--q-ramping", "--q-ramping-steps", "2"]

    @pytest.fixture(autouse=True)
    def small(self, tmp_path, monkeypatch, digits_cut_to):
        """The same model with 0.1 M parameters and a tenth of the images, so that an epoch takes a second."""
        monkeypatch.chdir(tmp_path)
        module = timm.models.swin_transformer
        create = module._create_swin_transformer

        def create_small(name, pretrained=False, **kwargs):
            return create(name, pretrained, **{**kwargs, **SMALL, "window_size": 2})

        monkeypatch.setattr(module, "_create_swin_transformer", create_small)
        with digits_cut_to(50, 20):
            yield

    def test_resume_repeats_an_uninterrupted_run_bit_for_bit(self, interrupted_in_epoch, capsys):
        arguments = [*self.ARGUMENTS, *self.ALL, "--model-ema-decay", "0.9"]
        assert main([*arguments, "--output-dir", "whole"]) == 0
        assert "17 linears in mxfp4" in capsys.readouterr().out
        with interrupted_in_epoch(1):
            assert main([*arguments, "--output-dir", "parts"]) == 130
        assert main([*arguments, "--output-dir", "parts", "--resume", "auto"]) == 0
        whole, parts = (torch.load(f"{d}/checkpoint.pth", weights_only=True) for d in ("whole", "parts"))
        assert whole["identity"] == parts["identity"] and whole["identity"]["--clip-grad"] == 5.0
        for part in ("model", "model_ema"):
            assert whole[part].keys() == parts[part].keys()
            assert all(torch.equal(parts[part][k], v) for k, v in whole[part].items())
        for key, state in whole["optimizer"]["state"].items():
            assert all(torch.equal(parts["optimizer"]["state"][key][k], v) for k, v in state.items())
        assert sum("period" in state for state in whole["optimizer"]["state"].values()) == 17
        assert whole["model"]["layers.1.downsample.reduction.ema_updates"] == 2 * (50 // 10) >= 10

    def test_evaluation_and_finetuning(self, evaluated, capsys):
        assert main([*self.ARGUMENTS, "--epochs", "1", "--output-dir", "out"]) == 0
        log = json.loads(Path("out/log.txt").read_text())
        no_augmentation = {"repeats": 1, "aa": "none", "color_jitter": 0.0, "reprob": 0.0}
        data = DataConfig("DIGITS", None, False, 16, batch_size=50, num_workers=0, seed=0, **no_augmentation)
        ((images, labels),) = build_loaders(data).val
        model = timm.create_model(NAME, img_size=16, num_classes=10, quant=Recipe())
        model.load_state_dict(torch.load("out/checkpoint.pth", weights_only=True)["model"])
        found = {f"test_{name}": value for name, value in evaluated(model, images, labels).items()}
        assert {name: log[name] for name in found} == pytest.approx(found, rel=1e-4)
        for option in ("--resume", "--finetune"):
            assert main([*self.ARGUMENTS, "--eval", option, "out/checkpoint.pth"]) == 0
            result = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert result == {name: log[name] for name in ("test_loss", "test_acc1", "test_acc5")}
