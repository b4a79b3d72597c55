"""Swapping by the class of the recipe, and the names that moved out of `quantization.linear`."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import quantization
import timm
from quantization import RECIPES, Int4Linear, QuantLinear, Recipe, linear, swap, swap_linears, weight_cache
from quantization.families.torch_modules import ENCODER_LINEARS
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


class Block(nn.Module):
    """Two linears under the names of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def with_a_replaced_forward(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: x
    return layer


def with_a_buffer(layer: nn.Linear) -> nn.Linear:
    layer.register_buffer("mask", torch.ones(4))
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda layer: Doubling(4, 4), "it is a Doubling, a subclass of nn.Linear"),
        (lambda layer: nn.LazyLinear(4), "it is a LazyLinear, a subclass"),
        (lambda layer: QuantLinear(4, 4), r"it is quantized already \(QuantLinear\)"),
        (lambda layer: Int4Linear(4, 4), r"it is quantized already \(Int4Linear\)"),
        (parametrizations.weight_norm, "its weight is parametrized; call .*remove_parametrizations"),
        (lambda layer: weight_norm(layer), "it has more than a weight and a bias"),
        (with_a_replaced_forward, "its forward was replaced"),
        (with_a_buffer, "it has more than a weight and a bias"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_layer_that_does_more_is_refused_and_the_model_stays_as_it_was(make, reason):
    model = Block()
    model.mlp["fc2"] = odd = make(model.mlp["fc2"])
    with pytest.raises(ValueError, match=f"mlp.fc2 cannot be quantized: {reason}.*; leave it out of the names"):
        swap_linears(model, Recipe())
    assert type(model.mlp["fc1"]) is nn.Linear and model.mlp["fc2"] is odd
    assert type(swap_linears(model, Recipe(), "mlp.fc1").mlp["fc1"]) is QuantLinear


def test_a_model_without_known_names_is_refused_with_its_own():
    """Two blocks with the attention of PyTorch: names of the projections that a swap would make, without numbers."""
    block = nn.ModuleDict({"attn": nn.MultiheadAttention(32, 2), "fc": nn.Linear(32, 32)})
    model = nn.Sequential(block, copy.deepcopy(block))
    with pytest.raises(ValueError, match="pass other names, such as attn.in_proj, attn.out_proj, fc$"):
        swap_linears(model, Recipe())
    swapped = swap_linears(model, Recipe(), ("attn.in_proj", "attn.out_proj", "fc"))
    assert len([module for module in swapped.modules() if isinstance(module, QuantLinear)]) == 6


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("mlp.fc1", "mlp.fc3"), "Block has no linear layer named mlp.fc3; did you mean mlp.fc"),
        ("attention", "Block has no linear layer named attention; pass other names"),
        ("lp.fc1", "no linear layer named lp.fc1; did you mean mlp.fc"),
    ],
)
def test_each_name_must_match(names, message):
    model = Block()
    with pytest.raises(ValueError, match=message):
        swap_linears(model, Recipe(), names)
    assert type(model.mlp["fc1"]) is nn.Linear


@pytest.mark.parametrize("name", ["tetrajet", "int4"])
def test_hooks_and_attributes_go_to_the_new_layer(name):
    """Each hook acts, and its handle removes it."""
    model, seen = Block(), []
    layer = model.mlp["fc1"]
    layer.tag = "first"

    def note(what):
        return lambda *arguments, **named: seen.append(what)

    handles = [
        layer.register_forward_pre_hook(note("pre")),
        layer.register_forward_hook(note("forward"), with_kwargs=True, always_call=True),
        layer.register_full_backward_pre_hook(note("backward pre")),
        layer.register_full_backward_hook(note("backward")),
        layer.register_state_dict_post_hook(note("save")),
        layer.register_state_dict_pre_hook(note("before save")),
        layer.register_load_state_dict_pre_hook(lambda module, *rest: seen.append(("load", module))),
        layer.register_load_state_dict_post_hook(note("loaded")),
    ]
    swap_linears(model, RECIPES[name], "mlp.fc1")
    new = model.mlp["fc1"]
    del layer
    assert new.tag == "first"

    def use() -> list:
        seen.clear()
        new(torch.ones(2, 4, requires_grad=True)).sum().backward()
        new.load_state_dict(copy.deepcopy(new.state_dict()))
        return list(seen)

    wanted = ["pre", "forward", "backward pre", "backward", "before save", "save", ("load", new), "loaded"]
    assert use() == wanted
    for handle in handles:
        handle.remove()
    assert use() == []


@pytest.mark.parametrize("names", [(), [], "", ["mlp.fc1", ""]])
def test_no_name_is_refused(names):
    """An empty list would leave the whole model in full precision."""
    for model in (Block(), nn.Linear(4, 4)):
        with pytest.raises(ValueError, match="names must be endings of names of linear layers, got .*None takes"):
            swap_linears(model, Recipe(), names)


def test_a_model_within_a_model_has_the_linears_of_its_own_family():
    """Around CaiT, the usual names alone would leave its class attention's q, k and v in full precision."""
    cait = timm.create_model("cait_xxs24_224", img_size=32, embed_dim=32, num_heads=1, depth=1, depth_token_only=1)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)
    wrapper = nn.ModuleDict({"cait": cait, "encoder": encoder, "block": Block(), "head": nn.Linear(4, 4)})
    alone = swap_linears(copy.deepcopy(cait), Recipe())
    found = swap.quant_linears(swap_linears(wrapper, Recipe())).keys()
    assert found == {
        *(f"cait.{name}" for name in swap.quant_linears(alone)),
        *(f"encoder.layers.0.{name}" for name in ENCODER_LINEARS),
        *("block.mlp.fc1", "block.mlp.fc2"),
    }
    assert "cait.blocks_token_only.0.attn.q" in found


def test_linears_of_one_weight_are_one_layer():
    model = Block()
    model.again = model.mlp
    swap_linears(model, Recipe(), "mlp.fc1")
    assert type(model.again["fc1"]) is QuantLinear and model.again["fc1"] is model.mlp["fc1"]


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
