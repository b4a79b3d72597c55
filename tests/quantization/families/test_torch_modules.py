"""PyTorch's attention and Transformer layers, whose weights are read by functions, call quantized linears."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from quantization import QuantLinear, Recipe, Status, coverage, swap_linears
from quantization.families.torch_modules import ENCODER_LINEARS, CallingAttention, _call_projections

WIDTH, HEADS = 32, 4
MASKS = [(None, None), (None, "bool"), (None, "float"), ("bool", None), ("float", None), ("per head", None)]
MASKS += [("bool", "bool"), ("float", "float"), ("per head", "float")]  # PyTorch wants both masks of one kind


def calling(attention: nn.MultiheadAttention) -> CallingAttention:
    """A copy that calls its projections, which stay in fp32."""
    found = copy.deepcopy(attention)
    _call_projections(found)
    assert type(found) is CallingAttention and type(found.in_proj) is nn.Linear
    return found


def random_mask(kind: str | None, *shape: int) -> Tensor | None:
    """Every query may attend to the first key, so no row is masked as a whole."""
    if kind is None:
        return None
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask if kind == "bool" else torch.where(mask, -torch.inf, torch.randn(shape))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("attn_mask", "padding"), MASKS)
def test_attention_is_pytorchs(batch_first, bias, attn_mask, padding):
    """Outputs, attention weights and gradients of queries and of the projection, in float64."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=batch_first, dtype=torch.float64)
    if bias:
        nn.init.normal_(attention.in_proj_bias)
    query, key = (torch.randn(3, tokens, WIDTH, dtype=torch.float64) for tokens in (5, 7))
    query, key = (x if batch_first else x.transpose(0, 1) for x in (query, key))
    per_head = attn_mask == "per head"
    mask = random_mask("float" if per_head else attn_mask, *([3 * HEADS] if per_head else []), 5, 7)
    padding = random_mask(padding, 3, 7)
    to_double = lambda t: t.double() if t is not None and t.is_floating_point() else t  # noqa: E731
    options = {"attn_mask": to_double(mask), "key_padding_mask": to_double(padding)}
    found = []
    for module in (attention, calling(attention)):
        for need_weights, average in ((True, True), (True, False), (False, True)):
            x = query.clone().requires_grad_()
            y, weights = module(x, key, key, need_weights=need_weights, average_attn_weights=average, **options)
            y.square().sum().backward()
            gradient = dict(module.named_parameters())
            gradient = gradient.get("in_proj_weight", gradient.get("in_proj.weight")).grad
            found.append((y, weights, x.grad, gradient.clone()))
            module.zero_grad()
    for wanted, ours in zip(found[:3], found[3:]):
        for a, b in zip(wanted, ours):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_a_single_sequence_and_self_attention_with_other_values():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x, value = torch.randn(2, 5, WIDTH)
    padding = torch.tensor([False, False, True, False, True])
    wanted, ours = (m(x, x, value, key_padding_mask=padding) for m in (attention, calling(attention)))
    assert ours[0].shape == (5, WIDTH) and ours[1].shape == (5, 5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(wanted, ours))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"attn_mask": torch.ones(5, 5, dtype=torch.uint8).triu(1)}, "attn_mask must be of bool .* got torch.uint8"),
        ({"key_padding_mask": torch.zeros(2, 5, dtype=torch.int64)}, "key_padding_mask must be .* got torch.int64"),
        ({"attn_mask": torch.zeros(1, 5)}, r"attn_mask must have the shape \(5, 5\) or \(8, 5, 5\), got \(1, 5\)"),
        ({"key_padding_mask": torch.zeros(1, 5) > 0}, r"key_padding_mask must have the shape \(2, 5\), got \(1, 5\)"),
    ],
)
def test_masks_that_pytorch_refuses_are_refused(mask, message):
    """A mask of integers would be added to the scores instead of hiding keys."""
    x, attention = torch.randn(2, 5, 32), nn.MultiheadAttention(32, 4, batch_first=True)
    with pytest.raises((AssertionError, RuntimeError)):
        attention(x, x, x, **mask)
    swap_linears(attention, Recipe(), ("in_proj", "out_proj"))
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, **mask)


def test_dropout_acts_in_training_alone():
    attention = calling(nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True))
    x = torch.randn(2, 5, WIDTH)
    for need_weights in (True, False):
        first, second = (attention.train()(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.allclose(first, second)
        first, second = (attention.eval()(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_checkpoints_with_pytorchs_names_load_and_a_pickle_returns():
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    quantized = swap_linears(nn.MultiheadAttention(WIDTH, HEADS), Recipe(), ("in_proj", "out_proj"))
    quantized.load_state_dict(attention.state_dict())
    assert torch.equal(quantized.in_proj.weight, attention.in_proj_weight)
    file = io.BytesIO()
    torch.save(quantized, file)
    file.seek(0)
    again, x = torch.load(file, weights_only=False), torch.randn(3, 2, WIDTH)
    assert type(again) is CallingAttention and torch.equal(again(x, x, x)[0], quantized(x, x, x)[0])


def test_the_output_projection_alone():
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    x = torch.randn(3, 2, WIDTH)
    plain = attention(x, x, x)[0]
    swap_linears(attention, Recipe(), "out_proj")
    assert type(attention.in_proj) is nn.Linear and type(attention.out_proj) is QuantLinear
    assert not torch.allclose(attention(x, x, x)[0], plain)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 16}, "its keys or values have another width"),
        ({"add_bias_kv": True}, "it adds a key"),
        ({"add_zero_attn": True}, "it adds a key"),
    ],
)
def test_other_kinds_of_attention_are_refused(options, reason):
    model = nn.ModuleDict({"cross": nn.MultiheadAttention(WIDTH, HEADS, **options)})
    with pytest.raises(ValueError, match=f"cross reads the weights of its linears, and {reason}"):
        swap_linears(model, Recipe(), "out_proj")
    assert type(model["cross"]) is nn.MultiheadAttention


def test_attention_whose_forward_was_replaced_is_refused():
    """Such a function, to look at attention maps for example, may read the weights, and no class can replace it."""
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    attention.forward = attention.forward
    with pytest.raises(ValueError, match="MultiheadAttention reads the weights .*, and its forward was replaced"):
        swap_linears(attention, Recipe(), ("in_proj", "out_proj"))
    assert type(attention) is nn.MultiheadAttention and type(attention.out_proj) is not QuantLinear


def test_a_subclass_of_attention_is_refused():
    class Mine(nn.MultiheadAttention):
        pass

    with pytest.raises(ValueError, match="Mine is a subclass of nn.MultiheadAttention"):
        swap_linears(nn.ModuleDict({"attn": Mine(WIDTH, HEADS)}), Recipe(), "out_proj")


@pytest.mark.parametrize("names", [None, ("linear1",), ("linear2", "self_attn.out_proj")])
def test_an_encoder_evaluates_what_it_trains(names):
    """The fast path would compute in full precision: with padding, without gradients, in evaluation mode."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2).eval()
    encoder = swap_linears(copy.deepcopy(plain), Recipe(), names)
    x, padding = torch.randn(3, 6, WIDTH), torch.arange(6) >= torch.tensor([[6], [4], [2]])
    for options in ({}, {"src_key_padding_mask": padding}):
        trained = encoder.train()(x, **options).detach()
        with torch.no_grad():
            evaluated, unquantized = encoder.eval()(x, **options), plain(x, **options)
        there = ~padding if options else torch.ones(3, 6, dtype=torch.bool)
        assert torch.allclose(evaluated[there], trained[there], atol=1e-5)
        assert not torch.allclose(evaluated[there], unquantized[there], atol=1e-3)
    found = coverage(encoder, x)
    assert not found.having(Status.BYPASSED)
    assert len(found.having(Status.QUANTIZED)) == 2 * len(names or ENCODER_LINEARS)


def test_the_fast_path_is_a_bypass_that_coverage_sees():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
    layer.linear1 = QuantLinear.from_linear(layer.linear1, Recipe())
    (bypassed,) = coverage(layer, torch.randn(2, 5, WIDTH)).having(Status.BYPASSED)
    assert bypassed.name == "linear1"
