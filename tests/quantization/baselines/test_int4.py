"""INT4 of Xi et al. 2023: the transform, the split, the sampling, LSQ's gradients, and the layer made of them."""

from __future__ import annotations

import math

import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from quantization import Int4Linear, Int4Recipe, initialise_steps, swap_linears
from quantization.baselines.int4 import (
    first_step_size,
    hadamard_transform,
    sample_rows,
    sampling_probabilities,
    split_bits,
)


def sylvester(size: int) -> torch.Tensor:
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), h)
    return h / math.sqrt(size)


def transform(x: torch.Tensor, block: int) -> torch.Tensor:
    return x @ torch.block_diag(*[sylvester(block)] * (x.shape[-1] // block)).to(x)


def make(device, in_features=96, out_features=40, **options) -> Int4Linear:
    torch.manual_seed(1)
    return Int4Linear(in_features, out_features, device=device, recipe=Int4Recipe(**options))


@pytest.mark.parametrize(("channels", "largest", "block"), [(96, 32, 32), (72, 32, 8), (7, 32, 1), (64, 16, 16)])
def test_hadamard_transform(channels, largest, block, randn, device):
    layer = make(device, channels, hadamard_size=largest)
    assert layer.block == block
    x = randn(3, 5, channels)
    assert torch.allclose(layer.transformed(x), transform(x, block), atol=1e-5)
    assert torch.allclose(hadamard_transform(layer.transformed(x), block), x, atol=1e-5)


class TestSplit:
    def test_whole_multiples_of_the_unit_are_exact(self, device):
        """All of -98 .. 98, in rows whose largest fixes the unit at a power of two."""
        dy = torch.arange(-98, 99, device=device).float().view(1, -1) * 2**-9
        for _ in range(20):
            halves, units = split_bits(dy)
            assert torch.equal((halves * units).sum(0), dy)
            assert torch.equal(halves, halves.round()) and halves.abs().max() == 7
            assert units.flatten().tolist() == [14 * 2**-9, 2**-9]

    def test_unbiased_elsewhere(self, randn, device):
        """Within 4.5 standard errors of the mean; no draw further off than one unit."""
        dy = randn(6, 11).double()
        unit = dy.abs().max() / 98
        draws = torch.stack([(h.double() * u).sum(0) for h, u in (split_bits(dy) for _ in range(4000))])
        assert (draws - dy).abs().max() < unit * (1 + 1e-4)
        fraction = dy / unit - (dy / unit).floor()
        error = unit * (fraction * (1 - fraction) / 4000).sqrt()
        assert ((draws.mean(0) - dy).abs() <= 4.5 * error + 1e-4 * unit).all()

    def test_zeros_and_broken_gradients(self, device):
        halves, units = split_bits(torch.zeros(2, 3, device=device))
        assert not halves.any() and units.isfinite().all()
        assert sample_rows(halves, units, None).abs().max() == 0
        broken = split_bits(torch.tensor([[1.0, float("nan")], [2.0, 3.0]], device=device))
        assert sample_rows(*broken, None).isnan().all()


class TestSampling:
    @pytest.mark.parametrize("spread", [0.1, 1, 4])
    def test_clamped_and_rescaled_until_none_exceeds_one(self, spread, randn):
        scores = torch.exp(spread * randn(2, 30))
        want, left = scores.double() * 30 / scores.sum(), torch.ones(2, 30, dtype=torch.bool, device=scores.device)
        while (want > 1 + 1e-9).any():
            left &= want < 1
            want = torch.where(left, scores.double() * (30 - (~left).sum()) / scores[left].sum(), 1)
        got = sampling_probabilities(scores, 30)
        assert torch.allclose(got.double(), want, rtol=1e-6) and abs(got.sum().item() - 30) < 1e-4

    @pytest.mark.parametrize(
        ("scores", "want"),
        [
            ([5.0, 5, 5, 5], [0.5, 0.5, 0.5, 0.5]),
            ([9.0, 1, 1, 0], [1, 0.5, 0.5, 0]),
            ([3.0, 0, 0, 0], [1, 0, 0, 0]),
            ([3.0, 1, 0, 0], [1, 1, 0, 0]),
            ([0.0, 0, 0, 0], [0, 0, 0, 0]),
        ],
    )
    def test_by_hand(self, scores, want, device):
        assert sampling_probabilities(torch.tensor(scores, device=device), 2).tolist() == want

    def test_keeps_half_the_rows_at_their_value_over_their_probability(self, randn):
        halves, units = split_bits(randn(200, 8) * torch.exp(randn(200, 1)))
        weights = torch.exp(randn(200))
        p = sampling_probabilities((halves * units).norm(dim=-1) * weights, 200)
        torch.manual_seed(3)
        kept = torch.rand_like(p) < p
        torch.manual_seed(3)
        got = sample_rows(halves, units, weights)
        want = torch.zeros_like(got)
        for half, row in kept.nonzero().tolist():
            want[row] += halves[half, row] * units[half, 0] / p[half, row]
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6) and 150 < kept.sum() < 250 and p.max() <= 1


def straight_through(layer: Int4Linear, x: torch.Tensor) -> torch.Tensor:
    """The same forward pass; its gradients are LSQ's, without any quantization of dY."""

    def quantized(t, step):
        scale = 1 / math.sqrt(7 * t.numel())
        step = step * scale + (step * (1 - scale)).detach()
        v = (transform(t, layer.block) / step).clamp(-8, 7)
        return (v + (v.round() - v).detach()) * step

    return quantized(x, layer.input_step) @ quantized(layer.weight, layer.weight_step).T + layer.bias


@pytest.fixture
def problem(randn):
    """Input with an outlier channel, and rows of dY that differ in size."""
    x = randn(3, 20, 96)
    x[..., 5] *= 30
    return x.requires_grad_(), randn(3, 20, 40) * torch.exp(2 * randn(3, 20, 1))


def gradients(y, layer, x, dy):
    return torch.autograd.grad(y, (x, layer.weight, layer.bias, layer.input_step, layer.weight_step), dy)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def test_forward_pass_and_exact_gradients(problem, device):
    """dY of whole units survives the split, so that without sampling nothing random is left."""
    x, dy = problem
    layer = make(device, sampling=False)
    dy = (dy / dy.abs().max() * 98).round() / 64
    assert dy.abs().max() == 98 / 64
    layer.input_step.data.fill_(0.4)  # some are clipped
    layer.weight_step.data.fill_(0.02)
    expected = straight_through(layer, x)
    want = list(gradients(expected, layer, x, dy))
    layer.weight_step.data.fill_(-0.02)  # of which the absolute value counts
    want[4] = -want[4]
    y = layer(x)
    assert relative_error(y, expected.double()) < 1e-6
    got = gradients(y, layer, x, dy)
    for g, w, name in zip(got, want, ("x", "weight", "bias", "input_step", "weight_step")):
        assert relative_error(g, w.double()) < 1e-5, name


def test_gradients_are_unbiased(problem, device):
    """The error of a mean falls with the root of the number of draws, which a bias would stop."""
    x, dy = problem
    layer = make(device)
    initialise_steps(layer, x)
    want = gradients(straight_through(layer, x), layer, x, dy)
    many, few = 400, 16
    draws = [gradients(layer(x), layer, x, dy) for _ in range(many)]
    for i in (0, 1):
        blocks = torch.stack([d[i] for d in draws]).unflatten(0, (many // few, few)).mean(1)
        error_few = torch.stack([((b - want[i]).norm() / want[i].norm()) ** 2 for b in blocks]).mean().sqrt()
        error_many = relative_error(blocks.mean(0), want[i].double())
        assert error_few < 1 and error_many < 1.5 * error_few / math.sqrt(many / few)
    assert all(torch.equal(d[2], want[2]) or torch.allclose(d[2], want[2], rtol=1e-5) for d in draws[:3])


def test_rows_of_dy_are_sampled_by_what_they_multiply(problem, device):
    """For dX by their own length, for dW by that times the length of X^'s row; the same draws, step by step."""
    x, dy = problem
    layer = make(device)
    layer.input_step.data.fill_(layer.transformed(x).abs().max() / 7)  # nothing is clipped
    layer.weight_step.data.fill_(layer.transformed(layer.weight).abs().max() / 7)
    y = layer(x)
    torch.manual_seed(3)
    got = torch.autograd.grad(y, (x, layer.weight), dy)
    integers_x = (transform(x.detach().double(), 32).view(60, 96) / layer.input_step.item()).round()
    integers_w = (transform(layer.weight.detach().double(), 32) / layer.weight_step.item()).round()
    assert integers_x.norm(dim=1).unique().numel() > 20
    torch.manual_seed(3)
    halves, units = split_bits(dy.view(60, 40))
    for_dx = sample_rows(halves, units, None).double()
    for_dw = sample_rows(halves, units, integers_x.norm(dim=1).float()).double()
    dx = transform(for_dx @ integers_w * layer.weight_step.item(), 32).view_as(x)
    dw = transform(for_dw.T @ integers_x * layer.input_step.item(), 32)
    assert relative_error(got[0], dx) < 1e-5 and relative_error(got[1], dw) < 1e-5


def test_step_sizes_start_from_the_first_batch(randn, device):
    """Layer after layer: the second one sees what the first makes of the batch with its step sizes set."""
    model = swap_linears(nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 8)), Int4Recipe(), ("0", "2"))
    model.to(device).train()
    x = randn(50, 96) * 3
    initialise_steps(model, x)
    first, _, second = model
    assert torch.equal(first.input_step, first_step_size(first.transformed(x)))
    hidden = nn.functional.gelu(first(x))
    assert torch.equal(second.input_step, first_step_size(second.transformed(hidden)))
    v = transform(second.weight, 32)
    assert torch.allclose(second.weight_step, 2 * v.abs().mean() / math.sqrt(7), rtol=1e-5)
    assert model.training and not first._forward_pre_hooks


class TestLayer:
    def test_shares_parameters_and_loads_stock_weights(self, device):
        linear = nn.Linear(96, 40, device=device)
        layer = Int4Linear.from_linear(linear, Int4Recipe())
        assert layer.weight is linear.weight and layer.bias is linear.bias
        other = nn.Linear(96, 40, device=device)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer.weight, other.weight)
        assert torch.equal(layer.weight_step, first_step_size(layer.transformed(other.weight)))
        assert set(layer.state_dict()) == {"weight", "bias", "input_step", "weight_step"}
        with torch.no_grad():
            layer.input_step += 1
        copy = Int4Linear(96, 40, device=device)
        copy.load_state_dict(layer.state_dict())
        assert torch.equal(copy.input_step, layer.input_step)

    def test_the_first_input_step_suits_unit_variance(self, device):
        """2 E|x| / sqrt(7), where E|x| of the normal distribution is sqrt(2 / pi) = 0.79788."""
        layer = make(device)
        assert layer.input_step.item() == pytest.approx(2 * 0.7978846 / 2.6457513)
        draws = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
        assert first_step_size(draws).item() == pytest.approx(layer.input_step.item(), rel=5e-3)

    def test_step_sizes_do_not_decay(self, device):
        decayed = next(g for g in param_groups_weight_decay(make(device), 0.1) if g["weight_decay"] > 0)
        assert [p.ndim for p in decayed["params"]] == [2]

    def test_bf16_autocast_multiplies_the_integers_exactly(self, problem, device):
        x, _ = problem
        layer = make(device)
        with torch.autocast(device.type, torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), layer(x), rtol=2**-8, atol=1e-5)

    def test_refuses_what_does_not_fit(self, device):
        with pytest.raises(ValueError, match=r"the last axis must have 96 channels, got \(2, 95\)"):
            make(device)(torch.zeros(2, 95, device=device))
        assert "int4, hadamard_size=32" in repr(make(device))


def test_no_host_synchronisation(device, randn, host_must_not_wait):
    layer = make(device)
    x, dy = randn(64, 96).requires_grad_(), randn(64, 40)
    layer(x).backward(dy)
    with host_must_not_wait():
        layer(x).backward(dy)
