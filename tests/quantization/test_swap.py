"""Swapping by the class of the recipe, and the names that moved out of `quantization.linear`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch import nn

import quantization
from quantization import RECIPES, Int4Linear, QuantLinear, linear, swap, swap_linears, weight_cache
from quantization.recipe import layer_class, layer_for

REPOSITORY = Path(quantization.__file__).resolve().parent.parent
MOVED = {
    "BLOCK_LINEARS": swap,
    "plain_weight_linears": swap,
    "quant_linears": swap,
    "set_matmul": swap,
    "swap_linears": swap,
    "weights_quantized_once": weight_cache,
}


@pytest.mark.parametrize(("name", "expected"), [("tetrajet", QuantLinear), ("int4", Int4Linear), ("none", nn.Linear)])
def test_the_recipe_chooses_the_layer(name, expected):
    model = swap_linears(nn.Sequential(nn.Linear(4, 4)), RECIPES[name], "0")
    assert type(model[0]) is expected


def test_a_class_of_recipes_of_its_own_brings_its_layer():
    class Ternary:
        quantizes = True

    class TernaryLinear(nn.Linear):
        @classmethod
        def from_linear(cls, layer: nn.Linear, recipe: Ternary) -> TernaryLinear:
            return cls(layer.in_features, layer.out_features)

    with pytest.raises(TypeError, match="must be of the class Int4Recipe or Recipe, got .*Ternary"):
        layer_class(Ternary())
    assert layer_for(Ternary)(TernaryLinear) is TernaryLinear
    try:
        assert isinstance(swap_linears(nn.Sequential(nn.Linear(4, 4)), Ternary(), "0")[0], TernaryLinear)
    finally:
        del quantization.recipe._LAYERS[Ternary]


def test_a_name_is_no_recipe():
    with pytest.raises(TypeError, match="got 'tetrajet'; RECIPES holds the named ones"):
        swap_linears(nn.Sequential(nn.Linear(4, 4)), "tetrajet", "0")


@pytest.mark.parametrize("name", MOVED)
def test_an_old_import_path_works_with_a_warning(name):
    """The warning points at the line that imports."""
    names = {}
    with pytest.warns(DeprecationWarning, match=f"import {name} from {MOVED[name].__name__}") as warned:
        exec(compile(f"from quantization.linear import {name}", "user.py", "exec"), names)
    assert names[name] is getattr(MOVED[name], name)
    assert [record.filename for record in warned] == ["user.py"]


def test_only_names_that_were_there_have_an_old_path():
    with pytest.raises(AttributeError, match="module 'quantization.linear' has no attribute 'plain_rounding'"):
        linear.plain_rounding  # noqa: B018


@pytest.mark.parametrize("folder", ["quantization", "timm", "runtime", "tracking", "training", "reproduction", "."])
def test_nothing_here_uses_an_old_path(folder):
    files = (REPOSITORY / folder).glob("*.py" if folder == "." else "**/*.py")
    for text in (path.read_text("utf-8") for path in files):
        for node in ast.walk(ast.parse(text)) if "linear import" in text else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2] == "linear":
                assert not MOVED.keys() & {alias.name for alias in node.names}, text
