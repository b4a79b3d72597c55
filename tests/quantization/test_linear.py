"""The linear layer: exact operands, unbiased gradients, saved bits, key handling, recipes, module behaviour."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from quantization import (
    RECIPES,
    Element,
    QEma,
    Quantizer,
    QuantLinear,
    Recipe,
    Rounding,
    Scaling,
    quant_linears,
    quantize_mx,
    reference,
    swap_linears,
    take_lost_groups,
    weights_quantized_once,
)
from quantization import linear as linear_module

OFF = Quantizer(enabled=False)
ALL_NEAREST = Recipe(*[Quantizer()] * 6)
"""Deterministic double quantization: the gradients can be compared exactly."""


def make(recipe: Recipe, device, in_features=70, out_features=45, bias=True) -> QuantLinear:
    torch.manual_seed(1)
    return QuantLinear(in_features, out_features, bias, device=device, recipe=recipe)


def gradients(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)


@pytest.fixture
def problem(randn):
    """Input with an outlier channel, and an output gradient; 3 x 17 tokens, no axis a multiple of 32."""
    x = randn(3, 17, 70)
    x[..., 5] *= 30
    return x.requires_grad_(), randn(3, 17, 45) * torch.exp(3 * randn(3, 17, 1))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def test_off_recipe_is_nn_linear(problem, device):
    x, dy = problem
    layer = make(RECIPES["none"], device)
    plain = nn.Linear(70, 45, device=device)
    plain.load_state_dict(layer.state_dict())
    assert relative_error(layer(x), plain(x).double()) < 1e-6
    for got, expected in zip(gradients(layer, x, dy), gradients(plain, x, dy)):
        assert relative_error(got, expected.double()) < 1e-6


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("scaling", list(Scaling))
def test_three_matmuls_of_six_quantized_operands(double, scaling, problem, device):
    """Every operand rebuilt with `quantize_mx`, multiplied in float64."""
    q = Quantizer(scaling=scaling)
    layer = make(Recipe(*[q] * 6, double=double), device)
    x, dy = problem
    x2, dy2, w = x.detach().reshape(-1, 70), dy.reshape(-1, 45), layer.weight.detach()

    def quantized(t, axis):
        return quantize_mx(t, axis=axis, scaling=scaling).dequantize()

    q1, q2 = quantized(x2, 1), quantized(w, 1)
    q3, q5 = quantized(dy2, 1), quantized(dy2, 0)
    q4, q6 = quantized(q2 if double else w, 0), quantized(q1 if double else x2, 0)
    y = q1.double() @ q2.double().T + layer.bias.double()
    expected = ((q3.double() @ q4.double()).view_as(x), q5.double().T @ q6.double(), dy2.double().sum(0))
    assert relative_error(layer(x).reshape(-1, 45), y) < 1e-6
    for got, want in zip(gradients(layer, x, dy), expected):
        assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("index", range(1, 7))
def test_each_quantizer_switches_off_alone(index, problem, device):
    x, dy = problem
    x2, dy2 = x.detach().reshape(-1, 70), dy.reshape(-1, 45)
    layer = make(replace(ALL_NEAREST, **{f"q{index}": OFF}), device)

    def q(number, t, axis):
        return t if number == index else quantize_mx(t, axis=axis).dequantize()

    q1, q2 = q(1, x2, 1), q(2, layer.weight.detach(), 1)
    dx = q(3, dy2, 1).double() @ q(4, q2, 0).double()
    dw = q(5, dy2, 0).double().T @ q(6, q1, 0).double()
    y = q1.double() @ q2.double().T + layer.bias.double()
    assert relative_error(layer(x).reshape(-1, 45), y) < 1e-6
    got = gradients(layer, x, dy)
    assert relative_error(got[0].reshape(-1, 70), dx) < 1e-6
    assert relative_error(got[1], dw) < 1e-6


@pytest.mark.parametrize("of_e3m0", [("q1", "q4", "q5"), ("q2", "q3", "q6")], ids=str)
def test_every_quantizer_has_its_own_element(of_e3m0, problem, device):
    """Q4 and Q6 read what Q2 and Q1 have made, in the element of those."""
    x, dy = problem
    x2, dy2 = x.detach().reshape(-1, 70), dy.reshape(-1, 45)
    elements = {f"q{i}": "e3m0" if f"q{i}" in of_e3m0 else "e2m1" for i in range(1, 7)}
    layer = make(Recipe(**{name: Quantizer(element=element) for name, element in elements.items()}), device)

    def q(name, t, axis):
        return quantize_mx(t, axis=axis, element=elements[name]).dequantize()

    q1, q2 = q("q1", x2, 1), q("q2", layer.weight.detach(), 1)
    y = q1.double() @ q2.double().T + layer.bias.double()
    dx = q("q3", dy2, 1).double() @ q("q4", q2, 0).double()
    dw = q("q5", dy2, 0).double().T @ q("q6", q1, 0).double()
    assert relative_error(layer(x).reshape(-1, 45), y) < 1e-6
    got = gradients(layer, x, dy)
    assert relative_error(got[0].reshape(-1, 70), dx) < 1e-6
    assert relative_error(got[1], dw) < 1e-6


@pytest.mark.parametrize("off", ["q4", "q6"])
def test_what_the_backward_pass_does_not_quantize_is_read_in_its_element(off, problem, device):
    """E3M0 codes of the forward pass, multiplied as they are."""
    x, dy = problem
    forward = Quantizer(element="e3m0")
    layer = make(replace(ALL_NEAREST, q1=forward, q2=forward, **{off: OFF}), device)
    x2, dy2 = x.detach().reshape(-1, 70), dy.reshape(-1, 45)
    got_dx, got_dw, _ = gradients(layer, x, dy)
    if off == "q4":
        q2 = quantize_mx(layer.weight, element="e3m0").dequantize()
        assert relative_error(got_dx.reshape(-1, 70), quantize_mx(dy2).dequantize().double() @ q2.double()) < 1e-6
    else:
        q1 = quantize_mx(x2, element="e3m0").dequantize()
        assert relative_error(got_dw, quantize_mx(dy2, axis=0).dequantize().double().T @ q1.double()) < 1e-6


def mean_gradient_errors(recipe: Recipe, randn, device, few=16, many=256) -> list[tuple[float, float]]:
    """Relative error of the mean of `few` and of `many` draws of (dX, dW) against the straight-through gradient.

    Root mean square over the disjoint blocks of `few` draws, so that chance has little say in the ratio of the two.
    """
    x, dy = randn(96, 70).requires_grad_(), randn(96, 45)
    layer = make(recipe, device)
    scaling = recipe.q1.scaling
    q1 = quantize_mx(x, scaling=scaling).dequantize().double()
    q2 = quantize_mx(layer.weight, scaling=scaling).dequantize().double()
    expected = (dy.double() @ q2, dy.double().T @ q1)
    torch.manual_seed(0)
    y = layer(x)
    draws = [torch.autograd.grad(y, (x, layer.weight), dy, retain_graph=True) for _ in range(many)]
    errors = []
    for wanted, drawn in zip(expected, zip(*draws)):
        blocks = torch.stack([g.double() for g in drawn]).view(many // few, few, *wanted.shape).mean(dim=1)
        error_few = (blocks - wanted).square().sum((1, 2)).mean().sqrt() / wanted.norm()
        errors.append((error_few.item(), relative_error(blocks.mean(dim=0), wanted)))
    return errors


def test_tetrajet_gradients_are_unbiased(randn, device):
    """From 16 to 256 draws the error of the mean falls by sqrt(16) = 4, for dX and for dW; within 10 %."""
    for before, after in mean_gradient_errors(Recipe(), randn, device):
        assert before / after == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPES["microscaling"],
        replace(Recipe(), double=False),
        Recipe(*[Quantizer()] * 2, *[Quantizer(scaling=Scaling.FLOOR, rounding=Rounding.STOCHASTIC)] * 4),
    ],
    ids=["microscaling", "direct", "floor"],
)
def test_microscaling_choices_leave_a_bias(recipe, randn, device):
    """Nearest rounding, direct quantization or a clipping scale: the error stays, however many draws are averaged."""
    errors = mean_gradient_errors(recipe, randn, device)
    assert any(before / after < 2 for before, after in errors)
    assert max(after for _, after in errors) > 0.02


@pytest.mark.parametrize("recipe", [Recipe(), RECIPES["microscaling"], RECIPES["none"]], ids=Recipe.describe)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_gradient_is_the_unquantized_sum_in_fp32(dtype, recipe, problem, device):
    """The sum of a bf16 gradient is in fp32, too: a sum in bf16 would have an error of 2e-3."""
    x, dy = problem
    layer, dy = make(recipe, device), dy.to(dtype)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
    (db,) = torch.autograd.grad(y, layer.bias, dy)
    assert y.dtype == dtype and db.dtype == torch.float32
    assert relative_error(db, dy.double().sum((0, 1))) < 1e-6


def test_saved_operands_take_4_25_bits(device, randn):
    layer = make(Recipe(), device, 256, 128)
    x = randn(64, 256).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {t.dtype for t in saved} == {torch.uint8}
    assert 8 * sum(t.nbytes for t in saved) == 4.25 * (x.numel() + layer.weight.numel())


def test_nothing_is_saved_without_gradients(device, randn):
    layer, x = make(Recipe(), device), randn(4, 70)
    with torch.no_grad():
        y = layer(x)
    assert y.grad_fn is None and torch.equal(y, layer(x).detach())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_repeats_every_bit(use_reentrant, problem, device):
    x, dy = problem
    model = nn.Sequential(make(Recipe(), device), nn.GELU(), nn.Dropout(0.3), make(Recipe(), device, 45, 45))
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
        model.zero_grad()
        x.grad = None
        y.backward(dy)
        results.append((y.detach(), x.grad, *(p.grad for p in model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_saved_tensor_hooks_see_the_operands(problem, device):
    x, dy = problem
    layer = make(Recipe(), device)
    torch.manual_seed(2)
    expected = gradients(layer, x, dy)
    torch.manual_seed(2)
    with torch.autograd.graph.save_on_cpu():
        y = layer(x)
    for a, b in zip(torch.autograd.grad(y, (x, *layer.parameters()), dy), expected):
        assert torch.equal(a, b)


def test_every_backward_pass_layer_and_tensor_has_its_own_key(problem, device, monkeypatch):
    from quantization import linear

    drawn = []
    fresh = linear.fresh_keys
    monkeypatch.setattr(linear, "fresh_keys", lambda *args: drawn.append(fresh(*args)) or drawn[-1])
    x, dy = problem
    first, second = make(Recipe(), device), make(Recipe(), device, 45, 45)
    torch.manual_seed(9)
    for _ in range(2):
        second(first(x)).backward(dy)
    keys = torch.cat(drawn)
    assert keys.numel() == 2 * 2 * 3 and keys.unique().numel() == keys.numel()
    torch.manual_seed(9)
    second(first(x)).backward(dy)
    assert torch.equal(torch.cat(drawn[-2:]), keys[:6])  # the generator's state repeats them


STOCHASTIC = Quantizer(rounding="stochastic")
KEYED = {
    "tetrajet": (Recipe(), "bf16"),
    "stochastic forward pass": (Recipe(STOCHASTIC, STOCHASTIC), "bf16"),
    "direct": (replace(Recipe(), double=False), "bf16"),
    "tetrajet in fp8": (Recipe(), "fp8"),
    "fp8 for dX alone": (replace(Recipe(), q6=OFF), "fp8"),
    "fp8 for dW alone": (replace(Recipe(), q4=OFF), "fp8"),
}


@pytest.mark.parametrize("name", KEYED)
@pytest.mark.parametrize("autocast", [False, True])
def test_every_tensor_is_rounded_by_its_own_key(autocast, name, problem, device):
    """PyTorch's generator gives the keys: two for a stochastic forward pass, for X and W, and three new ones for each
    of two backward passes, for dY, W and X. The test rebuilds every operand from its key."""
    x, dy = problem
    recipe, matmul = KEYED[name]
    layer = make(recipe, device)
    layer.matmul = matmul
    dy = dy.bfloat16() if autocast else dy
    torch.manual_seed(9)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = layer(x)
    got = [torch.autograd.grad(y, (x, layer.weight), dy, retain_graph=True) for _ in range(2)]

    torch.manual_seed(9)
    seen = []

    def keys(count):
        seen.append(torch.randint(-(2**63), 2**63 - 1, (count,), device=device))
        return seen[-1].split(1)

    def operand(q, t, axis, key):
        if not q.enabled:
            return t
        rows, columns, _ = reference.quantize_both(t, q, q, key=key, dtype=torch.float32)
        return rows.values_RL if axis == 1 else columns.values_RL.T

    x2, dy2, w = x.detach().reshape(-1, 70), dy.float().reshape(-1, 45), layer.weight.detach()
    key1, key2 = keys(2) if recipe.q1.rounding is Rounding.STOCHASTIC else (None, None)
    q1, q2 = operand(recipe.q1, x2, 1, key1), operand(recipe.q2, w, 1, key2)
    close = 2**-7 if autocast else 1e-6
    assert relative_error(y.reshape(-1, 45), q1.double() @ q2.double().T + layer.bias.double()) < close
    for dx, dw in got:
        key_dy, key_w, key_x = keys(3)
        q3, q5 = operand(recipe.q3, dy2, 1, key_dy), operand(recipe.q5, dy2, 0, key_dy)
        q4 = operand(recipe.q4, q2 if recipe.double else w, 0, key_w)
        q6 = operand(recipe.q6, q1 if recipe.double else x2, 0, key_x)
        assert relative_error(dx.reshape(-1, 70), q3.double() @ q4.double()) < close
        assert relative_error(dw, q5.double().T @ q6.double()) < close
    assert torch.cat(seen).unique().numel() == torch.cat(seen).numel()


class TestFp8:
    """There are 32 groups, each a binade below the one before. E5M2 holds E2M1 groups that lie up to 28 binades apart,
    which are 29 of the 32. E4M3 holds 14 binades, which are 15 groups. The smaller groups are lost."""

    E5M2, E4M3 = 32 - 29, 32 - 15

    @staticmethod
    def lost(layer: QuantLinear, x: torch.Tensor, dy: torch.Tensor) -> tuple[int, int]:
        """The numbers of groups that became zero in the forward and in the backward pass."""
        layer.matmul = "fp8"
        take_lost_groups(x.device)
        with torch.autocast(x.device.type, torch.bfloat16):
            y = layer(x.requires_grad_())
        forward = int(take_lost_groups(x.device))
        y.backward(dy.bfloat16())
        return forward, int(take_lost_groups(x.device))

    @pytest.fixture
    def binades(self, device) -> torch.Tensor:
        return torch.exp2(-torch.arange(32.0, device=device))[:, None]

    def test_a_gradient_over_20_binades_loses_nothing(self, randn, device):
        """E4M3 would lose about 18 of the 64 rows. Every row of dX is compared with float64."""
        layer, x = make(ALL_NEAREST, device, 70, 45), randn(64, 70)
        dy = (randn(64, 45) * torch.exp2(torch.linspace(0, -20, 64, device=device))[:, None]).bfloat16()
        assert self.lost(layer, x, dy) == (0, 0)
        q2 = quantize_mx(layer.weight.detach()).dequantize()
        wanted = quantize_mx(dy.float()).dequantize().double() @ quantize_mx(q2, axis=0).dequantize().double()
        assert ((x.grad - wanted).norm(dim=1) < 1e-5 * wanted.norm(dim=1)).all()

    def test_the_output_gradient_is_e5m2(self, binades, device):
        """Each row of dY is a group of Q3, and each column is a group of Q5."""
        layer, x = make(ALL_NEAREST, device, 32, 32), torch.ones(32, 32, device=device)
        assert self.lost(layer, x, binades.expand(32, 32)) == (0, self.E5M2)

    def test_the_input_is_e5m2_and_again_quantized_e4m3(self, binades, device):
        """Each of 32 rows has 32 groups of Q1, with 32 channels each, and each channel is a group of Q6."""
        layer = make(ALL_NEAREST, device, 32 * 32, 32)
        nn.init.ones_(layer.weight)
        x = binades.repeat_interleave(32, dim=0).T.repeat(32, 1)
        assert self.lost(layer, x, torch.ones(32, 32, device=device)) == (32 * self.E5M2, 32 * self.E4M3)

    def test_the_weight_is_e4m3_both_times(self, binades, device):
        layer = make(ALL_NEAREST, device, 32 * 32, 32)
        with torch.no_grad():
            layer.weight.copy_(binades.repeat_interleave(32, dim=0).T)
        x, dy = torch.ones(32, 32 * 32, device=device), torch.ones(32, 32, device=device)
        assert self.lost(layer, x, dy) == (32 * self.E4M3, 32 * self.E4M3)


def test_stochastic_forward_rounding_works(problem, device):
    x, _ = problem
    noisy = Quantizer(rounding=Rounding.STOCHASTIC)
    layer = make(replace(Recipe(), q1=noisy, q2=noisy), device)
    assert not torch.equal(layer(x), layer(x))
    assert not torch.equal(layer.quantized_weight(), layer.quantized_weight())
    layer.bias.data.zero_()
    product = layer(layer.weight.detach())  # symmetric if input and weight were rounded by one key
    assert not torch.allclose(product, product.T, rtol=1e-2)


def test_bf16_and_autocast(problem, device):
    """Under autocast the operands are the same MX numbers, so only the output's rounding to bf16 differs."""
    x, dy = problem
    layer = make(ALL_NEAREST, device)
    full = layer(x).detach()
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, full.double()) < 2**-8
    got = torch.autograd.grad(y, (x, *layer.parameters()), dy.bfloat16())
    expected = gradients(layer, x, dy.bfloat16().float())
    for a, b in zip(got, expected):
        assert a.dtype == torch.float32 and relative_error(a, b.double()) < 2**-8
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_non_finite_input_is_never_a_silent_number(problem, device):
    x, _ = problem
    x = x.detach().clone()
    x[1, 2, 3] = torch.inf
    y = make(Recipe(), device)(x)
    assert y[1, 2].isnan().all() and y[0].isfinite().all() and y[1, 3].isfinite().all()


@pytest.mark.parametrize("shape", [(70,), (1, 70), (0, 70), (2, 197, 70), (2, 3, 5, 70)])
def test_any_number_of_leading_axes(shape, randn, device):
    x = randn(*shape).requires_grad_()
    layer = make(Recipe(), device)
    y = layer(x)
    assert y.shape == (*shape[:-1], 45)
    (y * randn(*y.shape)).sum().backward()
    assert x.grad.shape == shape and layer.weight.grad.isfinite().all()


def test_expanded_gradient_and_transposed_input(randn, device):
    layer = make(Recipe(), device)
    x = randn(70, 40).T.requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(layer.bias.grad, torch.full((45,), 40.0, device=device))


def test_frozen_parts_get_no_gradient(randn, device):
    layer = make(Recipe(), device)
    layer.weight.requires_grad_(False)
    x = randn(8, 70)
    layer(x).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    layer.bias.requires_grad_(False)
    assert not layer(x).requires_grad


def test_wrong_channels_are_refused(device):
    with pytest.raises(ValueError, match=r"last axis must have 70 channels, got \(2, 71\)"):
        make(Recipe(), device)(torch.ones(2, 71, device=device))


def test_integers_are_refused(device):
    with pytest.raises(TypeError, match="floating-point tensor, got torch.int64"):
        make(Recipe(), device)(torch.ones(2, 70, device=device, dtype=torch.int64))


def test_float64_stays_float64_under_autocast(device, randn):
    layer, x = make(ALL_NEAREST, device).double(), randn(5, 70)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x.double())
    expected = quantize_mx(x).dequantize().double() @ quantize_mx(layer.weight).dequantize().double().T + layer.bias
    assert y.dtype == torch.float64 and relative_error(y, expected) < 1e-12


class TestModule:
    def test_a_layer_in_two_places_is_swapped_in_both(self):
        model = nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(4, 4)}), "b": nn.ModuleDict()})
        model["b"]["fc"] = model["a"]["fc"]
        swap_linears(model, Recipe(), names="fc")
        assert isinstance(model["a"]["fc"], QuantLinear) and model["a"]["fc"] is model["b"]["fc"]

    def test_a_loaded_average_has_memory_of_its_own(self):
        layer, weights = QuantLinear(8, 4, recipe=Recipe().with_q_ema()), nn.Linear(8, 4).state_dict()
        layer.load_state_dict(weights, assign=True)
        assert layer.weight_ema.data_ptr() != layer.weight.data_ptr()

    def test_shares_parameters_and_state_dict_keys_of_nn_linear(self):
        linear = nn.Linear(8, 4).eval()
        layer = QuantLinear.from_linear(linear, Recipe())
        assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
        assert layer.state_dict().keys() == linear.state_dict().keys()
        assert QuantLinear.from_linear(nn.Linear(8, 4, bias=False), Recipe()).bias is None

    def test_loads_a_checkpoint_without_averages(self):
        linear = nn.Linear(8, 4)
        layer = QuantLinear(8, 4, recipe=Recipe().with_q_ema())
        layer.ema_updates += 5
        layer.load_state_dict(linear.state_dict())
        assert torch.equal(layer.weight_ema, linear.weight) and layer.ema_updates == 0
        layer.weight_ema += 1
        other = QuantLinear(8, 4, recipe=Recipe().with_q_ema())
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.weight_ema, layer.weight_ema)

    def test_says_its_recipe(self):
        assert "tetrajet, q_ema_beta=0.998" in repr(QuantLinear(8, 4, recipe=Recipe().with_q_ema()))
        assert "q3=off" in repr(QuantLinear(8, 4, recipe=replace(Recipe(), q3=OFF)))

    def test_swap_takes_the_named_layers_only(self):
        parts = {name: nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc10": nn.Linear(4, 4)}) for name in ("mlp", "xmlp")}
        model = nn.ModuleDict({**parts, "blocks": nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(4, 4)})})})
        swap_linears(model, Recipe(), names=("mlp.fc1",))
        assert list(quant_linears(model)) == ["mlp.fc1", "blocks.mlp.fc1"]
        with pytest.raises(ValueError, match="no linear layer named attn.q"):
            swap_linears(model, Recipe(), names=("attn.q",))
        assert swap_linears(nn.Linear(2, 2), RECIPES["none"]).__class__ is nn.Linear


class TestWeightsQuantizedOnce:
    @pytest.fixture
    def calls(self, monkeypatch):
        """The number of times that a weight of 45 rows was quantized."""
        seen = []
        original = reference.quantize

        def counted(x_RL, *args, **options):
            if x_RL.shape == (45, 70):
                seen.append(1)
            return original(x_RL, *args, **options)

        monkeypatch.setattr(reference, "quantize", counted)
        monkeypatch.setattr(linear_module, "backend_for", lambda *args: reference)
        return seen

    def test_within_the_block_only_changes_are_quantized(self, calls, problem, device):
        x, dy = problem
        layer = make(Recipe().with_q_ema(0.5), device)
        layer(x), layer(x)
        assert len(calls) == 2
        with weights_quantized_once(layer):
            draws = [torch.autograd.grad(layer(x), x, dy)[0] for _ in range(3)]
            assert len(calls) == 3  # the micro-batches share Q2(W),
            assert not torch.equal(draws[0], draws[1])  # and draw Q4 afresh
        layer(x)
        assert len(calls) == 4

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.weight.mul_(2),
            lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
            lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight)),
            lambda layer: layer.weight.set_(2 * layer.weight),
            lambda layer: torch.optim.SGD([layer.weight], lr=1.0).step(),
            lambda layer: (layer.weight_ema.add_(0.2), layer.ema_updates.fill_(10)),
            lambda layer: layer.ema_updates.zero_(),
            lambda layer: QEma(layer).after_step(),
            lambda layer: setattr(layer, "use_q_ema", False),
            lambda layer: setattr(layer, "recipe", Recipe(q2=OFF)),
        ],
        ids=["in place", "load", "replaced", "set_", "optimizer", "average", "not yet", "Q-EMA", "plain", "recipe"],
    )
    def test_a_stale_weight_is_impossible(self, change, problem, device):
        x, dy = problem
        layer = make(Recipe().with_q_ema(0.5), device)
        layer.ema_updates.fill_(10)
        layer.weight_ema.add_(0.05)
        with weights_quantized_once(layer):
            layer(x).backward(dy)
            with torch.no_grad():
                change(layer)
            inside = layer(x)
        assert torch.equal(inside, layer(x))

    def test_evaluation_and_training_do_not_mix(self, calls, problem, device):
        x, dy = problem
        layer = make(Recipe(), device)
        with weights_quantized_once(layer):
            with torch.no_grad():
                y = layer(x)
            assert torch.equal(layer(x), y)
            layer(x).backward(dy)
        assert len(calls) == 2 and layer.weight.grad is not None


class TestQEma:
    @pytest.mark.parametrize("flagged", [False, True])
    @pytest.mark.parametrize("betas", [(0.9, 0.9), (0.9, 0.998)], ids=str)
    def test_starts_at_the_present_weight_and_follows_algorithm_1(self, betas, flagged, device):
        """The formula holds before and after the tenth update, from which on Q2 uses the average, with a flag for
        skipped steps and without one. Each layer has its own beta."""
        layers = nn.ModuleList([make(Recipe().with_q_ema(beta), device) for beta in betas])
        for layer in layers:
            nn.init.normal_(layer.weight)
        starts = [layer.weight.detach().clone() for layer in layers]
        q_ema = QEma(layers)
        assert all(torch.equal(layer.weight_ema, start) for layer, start in zip(layers, starts))
        expected, updates = [start.double() for start in starts], 0
        for step in range(2 * linear_module.Q_EMA_START):
            with torch.no_grad():
                for layer in layers:
                    layer.weight += 0.1 * (step % 5 - 1)
            skipped = flagged and step % 3 == 2
            q_ema.after_step(torch.tensor(float(skipped), device=device) if flagged else None)
            updates += not skipped
            for i, (layer, beta) in enumerate(zip(layers, betas)):
                if not skipped:
                    expected[i] = beta * expected[i] + (1 - beta) * layer.weight.detach().double()
                assert relative_error(layer.weight_ema, expected[i]) < 1e-6, (step, beta)
                assert layer.ema_updates == updates and layer.weight_ema.dtype == torch.float32
        assert updates > linear_module.Q_EMA_START

    def test_every_layer_has_its_own_beta(self, randn, device):
        betas = {"a": 0.5, "b": 0.75, "c": None}
        recipes = {name: replace(Recipe(), q_ema_beta=beta) for name, beta in betas.items()}
        layers = nn.ModuleDict({name: make(recipe, device) for name, recipe in recipes.items()})
        q_ema, moves = QEma(layers), randn(2, 45, 70)
        for skip in (None, torch.zeros((), device=device)):
            starts = {name: layers[name].weight_ema.double() for name in "ab"}
            with torch.no_grad():
                for layer in layers.values():
                    layer.weight += moves[int(skip is None)]
            q_ema.after_step(skip)
            for name, start in starts.items():
                wanted = betas[name] * start + (1 - betas[name]) * layers[name].weight.detach().double()
                assert relative_error(layers[name].weight_ema, wanted) < 1e-6
        assert [int(layers[name].ema_updates) for name in "ab"] == [2, 2]

    def test_is_used_from_the_tenth_update_on_in_training_and_evaluation(self, randn, device):
        layer = make(Recipe().with_q_ema(0.5), device)
        q_ema = QEma(layer)
        layer.weight_ema.add_(randn(45, 70))
        plain = quantize_mx(layer.weight).dequantize()
        for update in range(1, 12):
            q_ema.after_step()
            expected = (
                plain if update < 10 else quantize_mx(layer.weight, rounding="ema", ema=layer.weight_ema).dequantize()
            )
            assert torch.equal(layer.quantized_weight(), expected), update
            x = randn(5, 70)
            want = make(RECIPES["none"], device)
            want.load_state_dict({"weight": expected, "bias": layer.bias})
            x1 = quantize_mx(x).dequantize()
            for training in (True, False):
                assert relative_error(layer.train(training)(x), want(x1).double()) < 1e-6
        assert not torch.equal(layer.quantized_weight(), plain)

    def test_only_q2_changes(self, problem, device):
        """dX reads Q4 of the averaged Q2; dW does not see the average at all."""
        x, dy = problem
        layer = make(replace(ALL_NEAREST, q_ema_beta=0.5), device)
        plain = make(ALL_NEAREST, device)
        layer.weight_ema.add_(0.1)
        layer.ema_updates.fill_(10)
        got, expected = gradients(layer, x, dy), gradients(plain, x, dy)
        assert not torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])

    def test_needs_a_q_ema_layer(self, device):
        with pytest.raises(ValueError, match="no Q-EMA layer"):
            QEma(make(Recipe(), device))


class TestRecipe:
    def test_defaults_are_the_papers(self):
        r = Recipe()
        assert [q.rounding for q in (r.q1, r.q2)] == [Rounding.NEAREST] * 2
        assert [q.rounding for q in (r.q3, r.q4, r.q5, r.q6)] == [Rounding.STOCHASTIC] * 4
        assert r.double and all(q.scaling is Scaling.TRUNCATION_FREE for q in (r.q1, r.q2, r.q3, r.q4, r.q5, r.q6))
        assert RECIPES["mxfp4"] == RECIPES["tetrajet"] == r
        m = RECIPES["microscaling"]
        assert not m.double and {q.rounding for q in (m.q1, m.q3, m.q6)} == {Rounding.NEAREST}
        assert m.q5.scaling is Scaling.FLOOR and not RECIPES["none"].quantizes

    def test_strings_are_taken(self):
        q = Quantizer(element="e3m0", scaling="floor", rounding="stochastic")
        assert q.element is Element.E3M0 and q.scaling is Scaling.FLOOR and q.rounding is Rounding.STOCHASTIC

    @pytest.mark.parametrize(
        ("make_it", "message"),
        [
            (lambda: Recipe(q_ema_beta=1.0), r"q_ema_beta must lie in \[0, 1\), got 1.0"),
            (lambda: Recipe(q2=OFF, q_ema_beta=0.9), "Q-EMA replaces Q2"),
            (lambda: Recipe(q3=Quantizer(rounding="ema")), "EMA rounding belongs to Q2 alone, got it for q3"),
            (lambda: Quantizer(element="e4m3"), "e4m3"),
        ],
    )
    def test_contradictions_are_refused(self, make_it, message):
        with pytest.raises(ValueError, match=message):
            make_it()


def test_no_host_synchronisation(device, randn, host_must_not_wait):
    layer = make(Recipe().with_q_ema(), device)
    x, dy = randn(64, 70).requires_grad_(), randn(64, 45)
    layer(x).backward(dy)
    with host_must_not_wait():
        layer(x).backward(dy)


@pytest.mark.parametrize("shape", [(5, 70), (2, 5, 70), (2, 3, 5, 70)])
def test_the_result_may_be_changed_in_place(shape, device, randn):
    """timm's BEiT, EVA-02 and Swin V2 add a bias so. The gradients are those of a sum that is a new tensor."""
    layer, x, gradients = make(ALL_NEAREST, device), randn(*shape), []
    for in_place in (True, False):
        layer.zero_grad()
        y = layer(x)
        if in_place:
            y += 1
        else:
            y = y + 1
        y.square().sum().backward()
        gradients.append((y.detach(), layer.weight.grad, layer.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and gradients[0][1].any()
