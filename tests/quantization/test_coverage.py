"""`coverage` tells what is quantized by what was computed, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantization import Int4Linear, Int4Recipe, QuantLinear, Recipe, Status, coverage, initialise_steps, swap_linears

TOKENS = 2 * 5  # of the inputs
X = (2, 5, 32)


class Reading(nn.Module):
    """A linear that is called, or whose weight goes to a function, in training or in evaluation mode."""

    def __init__(self, layer: nn.Linear, when: str, how: str) -> None:
        super().__init__()
        self.layer, self.when, self.how = layer, when, how

    def forward(self, x: Tensor) -> Tensor:
        if self.when not in ("always", "training" if self.training else "evaluation"):
            return self.layer(x)
        weight, bias = self.layer.weight, self.layer.bias
        if self.how == "linear":
            return F.linear(x, weight, bias)
        if self.how == "part":
            return torch.cat((F.linear(x, weight[:16], bias[:16]), F.linear(x, weight[16:], bias[16:])), dim=-1)
        if self.how == "matmul":
            return x @ weight.t() + bias
        if self.how == "einsum":
            return torch.einsum("btd,cd->btc", x, weight) + bias
        if self.how == "copy":
            return F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
        raise ValueError(self.how)


def status_of(model: nn.Module) -> dict[str, Status]:
    return {linear.name: linear.status for linear in coverage(model, torch.randn(X)).linears}


@pytest.mark.parametrize("layer", [QuantLinear, Int4Linear])
@pytest.mark.parametrize("when", ["always", "training", "evaluation", "never"])
@pytest.mark.parametrize("how", ["linear", "part", "matmul", "einsum", "copy"])
def test_a_weight_that_something_else_reads_is_a_bypass(layer, when, how):
    model = Reading(layer(32, 32), when, how)
    assert status_of(model) == {"layer": Status.QUANTIZED if when == "never" else Status.BYPASSED}


def test_looking_at_a_weight_is_no_bypass():
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QuantLinear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            assert self.layer.weight.t().shape[0] == x.shape[-1] and self.layer.weight.dtype == x.dtype
            return self.layer(x)

    assert status_of(Looking()) == {"layer": Status.QUANTIZED}


def test_every_kind_of_linear_has_its_status():
    """A parameter that is multiplied is a linear; an embedding, a convolution and a vector are none."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantized, self.plain, self.idle = QuantLinear(32, 64), nn.Linear(64, 32), QuantLinear(32, 8)
            self.raw, self.position = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(5, 32))
            self.conv, self.embedding = nn.Conv1d(5, 5, 3, padding=1), nn.Embedding(7, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x) + self.position + self.embedding(torch.zeros(5, dtype=torch.int64))
            return self.plain(self.quantized(x)) @ self.raw

    found = {linear.name: linear for linear in coverage(Mixed(), torch.randn(X)).linears}
    assert {name: linear.status for name, linear in found.items()} == {
        "quantized": Status.QUANTIZED,
        "plain": Status.FULL_PRECISION,
        "idle": Status.UNUSED,
        "raw": Status.FULL_PRECISION,
    }
    flops = {name: linear.flops for name, linear in found.items()}
    assert flops == {
        "quantized": 2 * TOKENS * 32 * 64,
        "plain": 2 * TOKENS * 64 * 32,
        "idle": 0,
        "raw": 2 * TOKENS * 512,
    }
    assert found["quantized"].parameters == 32 * 64 + 64 and found["raw"].parameters == 512


def test_a_weight_that_autocast_copies_keeps_its_flops():
    """`nn.MultiheadAttention` reads its weights, which autocast copies to bf16 for both passes at once."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.layer = nn.MultiheadAttention(32, 4, batch_first=True), QuantLinear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.attn(x, x, x)[0])

    with torch.autocast("cpu", torch.bfloat16):
        found = {linear.name: linear for linear in coverage(Attending(), torch.randn(X)).linears}
    flops = {name: linear.flops / (2 * TOKENS * 32) for name, linear in found.items()}
    assert flops == {"attn.in_proj_weight": 96, "attn.out_proj": 32, "layer": 32}
    assert found["layer"].status is Status.QUANTIZED


def test_a_linear_may_take_its_input_by_name_and_return_more():
    class WithBias(nn.Linear):
        def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(input), self.bias

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mx, self.int4, self.odd = QuantLinear(32, 32), Int4Linear(32, 32), WithBias(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.odd(self.int4(input=self.mx(input=x)))[0]

    model = Net()
    initialise_steps(model, torch.randn(X))
    flops = {linear.name: linear.flops for linear in coverage(model, torch.randn(X)).linears}
    assert flops == {"mx": 2 * TOKENS * 32 * 32, "int4": 2 * TOKENS * 32 * 32, "odd": 2 * TOKENS * 32 * 64}


def test_two_layers_may_share_a_weight():
    model = nn.Sequential(QuantLinear(32, 32), QuantLinear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[2].weight = model[0].weight
    assert status_of(model) == {"0": Status.QUANTIZED, "1": Status.QUANTIZED, "2": Status.FULL_PRECISION}


def test_the_table_and_its_sum():
    """32 x 96 and 96 x 32 quantized in two blocks, and a head of 32 x 4: 98.97 % of the FLOPs."""
    blocks = [nn.ModuleDict({"fc1": nn.Linear(32, 96), "fc2": nn.Linear(96, 32)}) for _ in range(2)]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block["fc2"](block["fc1"](x))
            return self.head(x)

    found = coverage(swap_linears(Net(), Recipe(), ("fc1", "fc2")), torch.randn(X))
    lines = [line.split() for line in str(found).splitlines()]
    assert lines[1] == ["blocks.*.fc1", "2", "quantized", f"{2 * 33 * 96:,}", "49.5", "%"]
    assert lines[3] == ["head", "1", "full", "precision", "132", "1.0", "%"]
    share = 100 * 2 * (33 * 96 + 97 * 32) / (2 * (33 * 96 + 97 * 32) + 33 * 4)
    assert found.summary() == (
        f"4 of 5 linears quantized: {share:.1f} % of their parameters, 99.0 % of their FLOPs; full precision: head"
    )
    assert found.flops_share(Status.QUANTIZED) == pytest.approx(100 * 4 * 32 * 96 / (4 * 32 * 96 + 32 * 4))


@pytest.mark.parametrize("recipe", [Recipe().with_q_ema(0.5), Int4Recipe()])
def test_the_model_and_the_generators_stay_as_they_were(recipe):
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(5), nn.Dropout(0.5))
    swap_linears(model, recipe, "0")
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    coverage(model, torch.randn(X))
    drawn = torch.rand(4)
    torch.manual_seed(3)
    torch.randn(X)
    assert torch.equal(drawn, torch.rand(4))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes and "forward" not in vars(model[0])
    assert all(p.grad is None for p in model.parameters())


def test_buffers_that_are_replaced_and_caches_between_evaluations_leave_no_trace():
    """timm's LeViT keeps a function of its parameters until `train` or `eval` is called."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bias, self.cache = QuantLinear(32, 32), nn.Parameter(torch.ones(32)), None
            self.register_buffer("mean", torch.zeros(()))
            self.register_buffer("last", None)

        def train(self, mode: bool = True) -> nn.Module:
            self.cache = None
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            self.mean, self.last = 0.9 * self.mean + 1, x
            if self.cache is None:
                self.cache = 2 * self.bias
            return self.layer(x) + self.cache

    model = nn.Sequential(Caching()).eval()
    buffer = model[0].mean
    coverage(model, torch.randn(X))
    assert model[0].cache is None and model[0].last is None and model[0].mean is buffer and buffer == 0
    assert not model[0].training


def test_a_forward_pass_that_fails_leaves_no_trace():
    model = nn.Sequential(QuantLinear(32, 32), nn.BatchNorm1d(5), nn.Linear(16, 4)).eval()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        coverage(model, torch.randn(X))
    assert not model.training and "forward" not in vars(model[0])
    assert model[1].num_batches_tracked == 0 and not model[1].running_mean.any()
