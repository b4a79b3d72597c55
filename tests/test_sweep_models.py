"""Every kind of model that timm and torchvision have is really quantized, or refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torchvision
from sweep_models import TORCHVISION, Result, on_meta, timm_result, torchvision_classifiers, torchvision_result
from torch import nn

import timm
from quantization import QuantLinear, Recipe, Status, swap_linears

FULL = (  # of these, all linears of the blocks are quantized
    *("beit", "deepseek_vit", "deit", "eva", "pvt_v2", "twins", "swin_transformer", "vision_transformer", "vitamin"),
    *("xcit", "vision_transformer_relpos", "gemma4_vit", "qwen3_vit", "davit", "coat", "levit", "mlp_mixer"),
)
DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text("utf-8")
DOCUMENTED_VERSION = re.search(r"timm (\S+),", DOCUMENT)[1]
DOCUMENTED = set(re.findall(r"^\| (\w+) \| \S+ \| \d+ of", DOCUMENT, flags=re.MULTILINE))


def check(result: Result) -> None:
    if result.refusal is not None:
        assert re.search(
            "has no linear layer named|cannot be quantized: |reads the weights of its linears", result.refusal
        )
        return
    found = result.coverage
    assert not found.having(Status.BYPASSED), found.summary()
    assert found.having(Status.QUANTIZED) and found.flops_share(Status.QUANTIZED) > 0


@pytest.mark.parametrize("module", timm.list_modules())
@pytest.mark.filterwarnings("ignore")
def test_timm(module):
    result = timm_result(module)
    if timm.__version__ == DOCUMENTED_VERSION:
        assert (module in DOCUMENTED) == (result is not None and result.coverage is not None)
    if result is None:
        return
    check(result)
    if module in FULL:
        assert result.coverage is not None, result.refusal
        assert not [name for name in result.left() if not re.search("head|embed|rel_pos|pool|^proj$", name)], (
            result.left()
        )


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    result = torchvision_result(name)
    check(result)
    assert result.coverage is not None, result.refusal
    assert all(re.search("head|classifier|cpb_mlp|project", name) for name in result.left()), result.left()


@pytest.mark.filterwarnings("ignore")
def test_torchvisions_other_classifiers_are_of_the_same_classes_or_are_refused():
    """One of each module of torchvision: the others of a module differ in the numbers of blocks and channels alone."""
    builders = {name: torchvision.models.get_model_builder(name) for name in torchvision_classifiers()}
    of_module = {builder.__module__: builder for builder in builders.values()}
    called = {builders[name].__module__ for name in TORCHVISION}
    assert len(of_module) > len(called) == 6
    for module, builder in of_module.items():
        model = on_meta(builder)
        if module in called:
            swap_linears(model, Recipe())
            assert any(isinstance(layer, QuantLinear) for layer in model.modules())
        elif any(isinstance(layer, nn.Linear) for layer in model.modules()):
            with pytest.raises(ValueError, match="has no linear layer named"):
                swap_linears(model, Recipe())
