"""Freezing against Nagel et al.'s Algorithm 1, one weight at a time in plain Python."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from quantization import Freeze, Quantizer, Recipe, swap_linears

GRIDS = {"e2m1": [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], "e3m0": [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]}
OPTIONS = [{}, {"element": "e3m0"}, {"scaling": "floor"}]


def make(device, recipe: Recipe, rows=3, columns=40) -> nn.Module:
    torch.manual_seed(0)
    return swap_linears(nn.Sequential(nn.Linear(columns, rows)).to(device), recipe, ("0",))


def code_and_scale(weight: torch.Tensor, grid: list[float], scaling: str) -> tuple[list[list[int]], list[list[float]]]:
    """Signed code and scale of every weight: nearest value, the even code on a tie."""
    codes, scales = [], []
    for row in weight.double().tolist():
        codes.append([])
        scales.append([])
        for begin in range(0, len(row), 32):
            group = row[begin : begin + 32]
            largest = max(map(abs, group))
            if scaling == "floor":
                scale = 2.0 ** (math.floor(math.log2(largest)) - math.floor(math.log2(grid[-1])))
            else:
                scale = 2.0 ** math.ceil(math.log2(largest / grid[-1]))
            for w in group:
                code = min(range(8), key=lambda c: (abs(grid[c] - abs(w) / scale), c % 2))
                codes[-1].append(int(math.copysign(code, w)))
                scales[-1].append(scale)
    return codes, scales


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_algorithm_1(options, device):
    """60 steps of noise that grows along the columns, with a momentum so high that some weights freeze."""
    model = make(device, Recipe(q2=Quantizer(**options)))
    grid, scaling = GRIDS[options.get("element", "e2m1")], options.get("scaling", "truncation_free")
    weight, steps, momentum = model[0].weight, 60, 0.03
    freeze = Freeze(model, total_steps=steps, threshold=0.07, momentum=momentum)
    mirror = weight.detach().cpu().double()
    codes, _ = code_and_scale(mirror, grid, scaling)
    shape = (len(codes), len(codes[0]))
    every = [(i, j) for i in range(shape[0]) for j in range(shape[1])]
    direction, frequency = dict.fromkeys(every, 0), dict.fromkeys(every, 0.0)
    mean = {(i, j): float(codes[i][j]) for i, j in every}
    frozen: dict[tuple[int, int], float] = {}
    centre, noise = weight.detach().clone(), torch.linspace(0, 0.02, shape[1], device=device)
    generator = torch.Generator(device).manual_seed(5)
    frozen_at = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            weight.copy_(centre + noise * torch.randn(shape, generator=generator, device=device))
        mirror = weight.detach().cpu().double()
        freeze.after_step()

        for (i, j), value in frozen.items():
            mirror[i, j] = value
        new, scales = code_and_scale(mirror, grid, scaling)
        progress = (step / steps - 0.25) / 0.75
        threshold = math.inf if progress < 0 else 0.07 + 0.03 * (1 + math.cos(math.pi * progress)) / 2
        for i, j in every:
            change = (new[i][j] > codes[i][j]) - (new[i][j] < codes[i][j])
            turned = change != 0 and change == -direction[i, j]
            frequency[i, j] = momentum * turned + (1 - momentum) * frequency[i, j]
            mean[i, j] = momentum * new[i][j] + (1 - momentum) * mean[i, j]
            direction[i, j] = change or direction[i, j]
            if frequency[i, j] > threshold and (i, j) not in frozen:
                code = round(mean[i, j])
                frozen[i, j] = mirror[i, j] = math.copysign(grid[abs(code)], code) * scales[i][j]
                frozen_at.append(step)
        codes = new
        assert torch.equal(weight.detach().cpu().double(), mirror), step
    assert 0 < len(frozen) < len(every) and min(frozen_at) >= 15
    assert freeze.log_numbers() == {"frozen": pytest.approx(100 * len(frozen) / len(every))}


def oscillate(model, freeze, start, stop):
    """Half of the weights jump between 3 and 4 in units of the scale, the others stay."""
    weight = model[0].weight
    for step in range(start, stop):
        with torch.no_grad():
            weight[:, ::2] = 3.4 if step % 2 else 3.6
            weight[:, 1::2] = 5.9
        freeze.after_step()


def test_frozen_for_good_and_free_before_a_quarter(device):
    model = make(device, Recipe())
    nn.init.constant_(model[0].weight, 5.9)
    freeze = Freeze(model, total_steps=40, threshold=0.1, momentum=0.05)
    oscillate(model, freeze, 0, 9)
    assert freeze.log_numbers()["frozen"] == 0
    oscillate(model, freeze, 9, 20)
    assert freeze.log_numbers()["frozen"] == 50
    value = model[0].weight[0, 0].item()
    assert value == 4.0  # the mean of codes 5 and 6, and of 7 before
    with torch.no_grad():
        model[0].weight.fill_(0.3)
    freeze.after_step()
    assert (model[0].weight[:, ::2] == value).all() and (model[0].weight[:, 1::2] == 0.3).all()
    with torch.no_grad():
        model[0].weight[:, 1::2] = 40.0  # the scale becomes eight times as large
    freeze.after_step()
    assert (model[0].weight[:, ::2] == value).all() and (model[0].weight[:, 1::2] == 40).all()


# With momentum 0.01, f is 1 - 0.99**n after n turns in a row, and then falls by 1 % per step. The threshold at step t
# of 100 is 0.02 + 0.04 (1 + cos(pi (t - 25) / 75)). The table gives the first step at which f exceeds the threshold, by
# the number of turns.
FREEZES_AT = {6: 87, 7: 81, 8: 76, 9: 71, 10: 66, 11: 60, 12: 25}


@pytest.mark.parametrize("skipping", [False, True])
def test_a_weight_freezes_at_the_first_step_whose_threshold_it_exceeds(skipping, device):
    """The threshold of the same step counts, not that of the step before. Skipped steps change nothing."""
    model = make(device, Recipe(), rows=1)
    weight, turns = model[0].weight, list(FREEZES_AT)
    nn.init.constant_(weight, 5.9)  # a scale of 1
    nn.init.constant_(weight[0, : len(turns)], 3.6)
    freeze = Freeze(model, total_steps=100, threshold=0.02, momentum=0.01)
    frozen_at = {}
    for step in range(1, 101):
        for column, count in enumerate(turns):
            if step <= count + 1:  # the first change is no turn
                nn.init.constant_(weight[0, column], 3.4 if step % 2 else 3.6)
        if skipping:
            for _ in range(step % 3):
                freeze.after_step(torch.ones((), device=device))
        freeze.after_step(torch.zeros((), device=device) if skipping else None)
        frozen = ~freeze.state_dict()["tracks"][0]["frozen"].isnan()
        for column in frozen[0].nonzero().flatten().tolist():
            frozen_at.setdefault(column, step)
    assert {turns[column]: step for column, step in frozen_at.items()} == FREEZES_AT


def test_state_goes_on_bit_for_bit(device):
    whole, parts = make(device, Recipe()), make(device, Recipe())
    a = Freeze(whole, total_steps=40, threshold=0.1, momentum=0.05)
    oscillate(whole, a, 0, 30)
    first = Freeze(parts, total_steps=40, threshold=0.1, momentum=0.05)
    oscillate(parts, first, 0, 13)
    state = copy.deepcopy(first.state_dict())
    second = Freeze(parts, total_steps=40, threshold=0.1, momentum=0.05)
    second.load_state_dict(state)
    oscillate(parts, second, 13, 30)
    assert torch.equal(whole[0].weight, parts[0].weight) and second.step == 30
    for got, want in zip(second.state_dict()["tracks"], a.state_dict()["tracks"]):
        assert all(torch.equal(got[name].nan_to_num(9), tensor.nan_to_num(9)) for name, tensor in want.items())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_forward_pass_keeps_a_frozen_value(options, device):
    """On every grid, at the moment of freezing, whatever that does to the group's scale."""
    model = make(device, Recipe(q2=Quantizer(**options)))
    freeze = Freeze(model, total_steps=40, threshold=0.1, momentum=0.05)
    generator = torch.Generator(device).manual_seed(5)
    centre = model[0].weight.detach().clone()
    count = 0
    for _ in range(40):
        held = ~freeze.state_dict()["tracks"][0]["frozen"].isnan()
        with torch.no_grad():
            model[0].weight.copy_(centre + 0.03 * torch.randn(centre.shape, generator=generator, device=device))
        freeze.after_step()
        frozen = freeze.state_dict()["tracks"][0]["frozen"]
        new = ~frozen.isnan() & ~held
        assert torch.equal(model[0].quantized_weight()[new], frozen[new])
        count += int(new.sum())
    assert count > 60


@pytest.mark.parametrize(
    ("recipe", "threshold", "message"),
    [
        (Recipe(), 0.001, "between twice the momentum, 0.002, and 0.1, .* got 0.001"),
        (Recipe(), 0.2, "got 0.2"),
        (Recipe().with_q_ema(), 0.01, "needs weights that Q2 quantizes without Q-EMA"),
        (Recipe().with_only(("q1",)), 0.01, "needs weights that Q2 quantizes without Q-EMA"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe, threshold, message, device):
    with pytest.raises(ValueError, match=message):
        Freeze(make(device, recipe), total_steps=10, threshold=threshold)


def test_no_host_synchronisation(device, host_must_not_wait):
    model = make(device, Recipe())
    freeze = Freeze(model, total_steps=4, threshold=0.1)
    freeze.after_step()
    with host_must_not_wait():
        freeze.after_step()
        freeze.after_step()
