"""OsciReset: when its windows are, what it resets, and that an open window survives a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from quantization import OsciReset, Recipe, swap_linears


def make(device) -> nn.Module:
    torch.manual_seed(0)
    return swap_linears(nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 8)).to(device), Recipe(), ("0", "1"))


class Walk:
    """Moves weights as an optimizer with noise would: the same for the same step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def step(self, number: int) -> None:
        for i, p in enumerate(self.model.parameters()):
            generator = torch.Generator(p.device).manual_seed(100 * number + i)
            p += 2e-4 * torch.randn(p.shape, generator=generator, device=p.device)


@pytest.mark.parametrize("threshold", [3.0, 28.0], ids=["every jump", "half of the jumps"])
def test_windows_ratios_and_resets(threshold, device):
    """Recomputed from every step's weights, W and Q2(W)."""
    model = make(device)
    reset = OsciReset(model, total_steps=30, start=0.3, interval=8, threshold=threshold)
    reset.window = 5  # as 50 in a run of thousands of steps
    assert reset.start == 9
    walk, history, resets, total = Walk(model), [], [], 0
    for number in range(1, 31):
        walk.step(number)
        weights = [layer.weight.detach().clone() for layer in model]
        quantized = [layer.quantized_weight().clone() for layer in model]
        history.append((weights, quantized))
        reset.after_step()
        changed = any(not torch.equal(layer.weight, w) for layer, w in zip(model, weights))
        if number in (14, 22, 30):  # five steps after 9, 17 and 25
            for i, layer in enumerate(model):
                window = history[-6:]
                path = sum((b[0][i] - a[0][i]).abs() for a, b in zip(window, window[1:]))
                q_path = sum((b[1][i] - a[1][i]).abs() for a, b in zip(window, window[1:]))
                oscillates = q_path / path >= threshold
                assert torch.equal(layer.weight, torch.where(oscillates, quantized[i], weights[i]))
                total += int(oscillates.sum())
            # The next window's paths start at the weights after the reset.
            history[-1] = ([layer.weight.detach().clone() for layer in model], quantized)
        if changed:
            resets.append(number)
    assert resets == [14, 22, 30] and reset.log_numbers() == {"resets": total} and total > 10


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"start": 1500, "window": 200, "threshold": 3}, (1500, 200, 200)),  # AMD's Primus
        ({"start": 0.25, "window": 20, "interval": 100}, (2500, 100, 20)),
        ({"start": 1, "window": 20}, (10_000, 20, 20)),  # a share: the whole run
    ],
)
def test_windows_of_the_users_length(options, want, device):
    reset = OsciReset(make(device), 10_000, **options)
    assert (reset.start, reset.interval, reset.window) == want


def test_windows_back_to_back_measure_every_step(device):
    """From step 4 on, each window of 5 steps begins where the one before ends, so no path is lost."""
    model, resets = make(device), []
    reset, walk = OsciReset(model, total_steps=30, start=4, window=5, threshold=1e-6), Walk(model)
    for step in range(1, 31):
        walk.step(step)
        before = reset.log_numbers()["resets"]
        reset.after_step()
        if reset.log_numbers()["resets"] > before:
            resets.append(step)
    assert resets == [9, 14, 19, 24, 29]


@pytest.mark.parametrize(
    ("total_steps", "interval", "want"),
    [(12505, None, (7503, 1000, 50)), (88, None, (53, 8, 8)), (5, None, (3, 1, 1)), (50500, 400, (30300, 400, 50))],
)
def test_defaults_follow_the_length_of_the_run(total_steps, interval, want, device):
    reset = OsciReset(make(device), total_steps, interval=interval)
    assert (reset.start, reset.interval, reset.window) == want and reset.threshold == 16


def test_back_to_back_windows(device):
    """A window as long as the interval ends where the next begins, so from the second on every eighth step resets."""
    model = make(device)
    reset = OsciReset(model, total_steps=40, start=0.0, interval=3, threshold=2.0)
    counts, walk = [], Walk(model)
    for number in range(1, 14):
        walk.step(number)
        reset.after_step()
        counts.append(reset.log_numbers()["resets"])
    rises = [i + 2 for i, (a, b) in enumerate(zip(counts, counts[1:])) if b > a]
    assert rises == [4, 7, 10, 13]


@pytest.mark.parametrize("stop", [7, 12, 14, 20], ids=lambda n: f"stopped after {n}")
def test_state_goes_on_bit_for_bit(stop, device):
    """Before the first window, within one, at its end and between two."""

    def advance(model, reset, begin, end):
        for number in range(begin, end):
            Walk(model).step(number)
            reset.after_step()

    def answer(model):
        made = OsciReset(model, total_steps=30, start=0.3, interval=12, threshold=3.0)
        made.window = 5
        return made

    whole, parts = make(device), make(device)
    uninterrupted = answer(whole)
    advance(whole, uninterrupted, 1, 31)
    first = answer(parts)
    advance(parts, first, 1, stop + 1)
    state = copy.deepcopy(first.state_dict())
    second = answer(parts)
    second.load_state_dict(state)
    advance(parts, second, stop + 1, 31)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    assert second.log_numbers() == uninterrupted.log_numbers() != {"resets": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.5}, "got 1.5, 1, 1, 10"),
        ({"start": -1}, "got -1, 1, 1, 10"),
        ({"interval": 0}, "got 0.6, 0, 0, 10"),
        ({"window": 0}, "got 0.6, 0, 0, 10"),
        ({"threshold": 0.0}, "got 0.6, 1, 1, 10 and 0.0"),
        ({"interval": 3, "window": 4}, "--osci-reset-window must be at most --osci-reset-interval, 3, got 4; lower it"),
        ({"start": 8, "window": 3}, "must leave the window of 3 steps within the run's 10, got 8; lower it"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message, device):
    with pytest.raises(ValueError, match=message):
        OsciReset(make(device), total_steps=10, **options)


def test_a_model_without_plainly_rounded_weights_is_refused():
    with pytest.raises(ValueError, match="needs weights that Q2 quantizes without Q-EMA"):
        OsciReset(nn.Linear(3, 3), total_steps=10)
