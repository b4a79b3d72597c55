"""Remedies and counters act as if skipped steps had not been, and the host does not wait for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantization import Dampen, Freeze, OsciReset, QEma, RampingAdamW, Recipe, lerp_unless, swap_linears
from quantization.optim.step_count import count_steps

STEPS = 24
ANSWERS: dict[str, Callable] = {
    "dampen": lambda model: Dampen(model, STEPS, 0.1),
    "freeze": lambda model: Freeze(model, STEPS, 0.1, momentum=0.05),
    "osci-reset": lambda model: OsciReset(model, STEPS, start=0.2, interval=5, threshold=2.0),
    "osci-reset with pauses": lambda model: with_pauses(OsciReset(model, STEPS, 0.2, interval=5, threshold=2.0)),
}


def with_pauses(answer: OsciReset) -> OsciReset:
    answer.window = 3
    return answer


class NoReading(TorchDispatchMode):
    """A number that the host reads from a tensor is an error, on a CPU, too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        return function(*args, **(kwargs or {}))


def make(device: torch.device, recipe: Recipe | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 8)).to(device)
    return swap_linears(model, recipe or Recipe(), ("0", "1"))


@torch.no_grad()
def move(model: nn.Module, number: int, device: torch.device) -> None:
    """Change the weights as an optimizer with noise would."""
    generator = torch.Generator(device).manual_seed(number)
    for p in model.parameters():
        p += 2e-3 * torch.randn(p.shape, generator=generator, device=device)


def flat(part: object) -> list[Tensor]:
    """All numbers of a nest of dicts and lists."""
    if isinstance(part, (dict, list)):
        return [t for item in (part.values() if isinstance(part, dict) else part) for t in flat(item)]
    return [part if isinstance(part, Tensor) else torch.tensor(-1 if part is None else part)]


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("looking", [False, True])
def test_a_skipped_step_leaves_no_trace(name, looking, device, assert_same_bits):
    """Every step of the run is once preceded by skipped ones; whether someone looks in between makes no difference."""
    plain, model = make(device), make(device)
    answer, other = ANSWERS[name](plain), ANSWERS[name](model)
    for number in range(STEPS):
        for _ in range(number % 3):
            other.after_step(torch.ones((), device=device))
            if looking:
                assert other.step == number
                flat(other.state_dict())
        for answering, of, skip in ((answer, plain, None), (other, model, torch.zeros((), device=device))):
            move(of, number, device)
            answering.after_step(skip)
        if looking:
            assert other.step == number + 1 and other.log_numbers() == answer.log_numbers()
    assert other.log_numbers() == answer.log_numbers() and all(value > 0 for value in answer.log_numbers().values())
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert_same_bits(b, a)
    for a, b in zip(flat(other.state_dict()), flat(answer.state_dict()), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("name", ANSWERS)
def test_the_host_does_not_wait(name, device, host_must_not_wait):
    """Not even for the decision, which is still to come when a step's update returns."""
    for warm_up in (True, False):  # kernels are loaded at their first launch, and memory is allocated
        model = make(device)
        answer = ANSWERS[name](model)
        for number in range(STEPS):
            move(model, number, device)
            skip = torch.zeros((), device=device)
            if warm_up:
                answer.after_step(skip)
                continue
            with host_must_not_wait():  # which begins when the device is idle
                torch.cuda._sleep(100_000_000)  # clock cycles
                answer.after_step(skip)
                assert not torch.cuda.current_stream().query()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_counters_count_what_was_not_skipped(dtype, device):
    counters = [torch.zeros((), dtype=dtype, device=device) for _ in range(3)]
    with NoReading():
        for skip in (None, *torch.tensor([1.0, 0.0, 0.0], device=device)):
            count_steps(counters, skip)
    assert [int(counter) for counter in counters] == [3, 3, 3]


def test_q_ema_reads_nothing_back(device):
    model = make(device, Recipe().with_q_ema())
    q_ema = QEma(model)
    with NoReading():
        for skip in (None, *torch.tensor([1.0, 0.0, 0.0], device=device)):
            q_ema.after_step(skip)
    assert [int(layer.ema_updates) for layer in model] == [3, 3]


@pytest.mark.parametrize("how", ["Q-EMA", "Q-Ramping"])
def test_an_update_does_not_wait(how, device, host_must_not_wait):
    model = make(device, Recipe().with_q_ema())
    optimizer, q_ema = RampingAdamW(model.parameters(), lr=1e-3), QEma(model)
    optimizer.set_periods({layer.weight: torch.full_like(layer.weight, 2) for layer in model})
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.found_inf = skip = torch.zeros((), device=device)
    update = optimizer.step if how == "Q-Ramping" else lambda: q_ema.after_step(skip)
    update()
    with host_must_not_wait():
        update()


@pytest.mark.parametrize("weight", [0.002, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("how", ["kernel", "PyTorch"])
def test_averages_have_the_bits_of_numpy(how, weight, randn, device, assert_same_bits):
    """Several tensors, of more than one chunk and of less, together; nothing moves where the step is skipped.

    numpy rounds every operation by itself, as IEEE 754 has it; `torch.lerp` fuses two of them on some processors.
    """
    if how == "kernel":
        step = pytest.importorskip("quantization.triton.lerp", exc_type=ImportError).step
    else:

        def step(averages, targets, weight, skip):
            lerp_unless(skip, averages, targets, weight)

    shapes = ((70, 45), (3,), (5000,))
    averages, targets = ([randn(*shape) for shape in shapes] for _ in range(2))
    expected = []
    for average, target in zip(averages, targets):
        a, b, lerped = average.cpu().numpy(), target.cpu().numpy(), average.lerp(target, weight)
        if weight < 0.5:
            expected.append(torch.from_numpy(a + (b - a) * np.float32(weight)).to(device))
        else:
            expected.append(torch.from_numpy(b + (a - b) * np.float32(1 - weight)).to(device))
        torch.testing.assert_close(expected[-1], lerped, rtol=1e-6, atol=3e-7)
    for called_off in (0.0, 1.0):
        before = averages[0]._version
        step(averages, targets, weight, torch.tensor(called_off, device=device))
        assert averages[0]._version > before  # a write is noticed
        for got, want in zip(averages, expected):
            assert_same_bits(got, want)
    if weight == 1:
        assert all(torch.equal(average, target) for average, target in zip(averages, targets))


def test_a_skipped_average_keeps_the_sign_of_zero_whatever_the_target(device):
    average = torch.tensor([-0.0, 1.0], device=device)
    lerp_unless(torch.ones((), device=device), [average], [torch.tensor([torch.nan, torch.inf], device=device)], 0.1)
    assert average.tolist() == [0.0, 1.0] and average.signbit().tolist() == [True, False]
