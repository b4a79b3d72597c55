"""Q-Ramping: the optimizer against torch's AdamW and against Algorithm 2 written out, detection, periods."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from quantization import (
    QEma,
    QuantLinear,
    RampingAdamW,
    Recipe,
    detect_oscillation,
    plain_rounding,
    quantize_mx,
    update_periods,
)
from quantization.adamw_update import Scalars, Update
from quantization.measures.oscillation import PathLengths
from quantization.optim.ramping import step_parameter

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


class Net(nn.Module):
    """Two quantized layers with dropout between them, whose rounding and masks draw random numbers."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.fc1, self.fc2 = QuantLinear(40, 64, recipe=recipe), QuantLinear(64, 10, recipe=recipe)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.drop(torch.relu(self.fc1(x))))


def make(device, recipe: Recipe | None = None):
    torch.manual_seed(0)
    net = Net(recipe or Recipe()).to(device)
    optimizer = RampingAdamW(
        [{"params": [net.fc1.weight, net.fc2.weight]}, {"params": [net.fc1.bias, net.fc2.bias], "weight_decay": 0.0}],
        **OPTIONS,
    )

    def step(batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return net, optimizer, step


def feed(optimizer_params, gradients) -> None:
    for p, g in zip(optimizer_params, gradients):
        p.grad = g.clone()


@pytest.mark.parametrize("explicit", [False, True], ids=["without periods", "with periods of 1"])
def test_period_1_is_torch_adamw(explicit, any_processor, randn, device):
    """Against PyTorch's AdamW in float64, whose own errors are negligible on every processor."""
    shapes = [(17, 33), (64,), (5, 4, 3)]
    mine = [nn.Parameter(randn(*shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().double()) for p in mine]

    def groups(ps):
        return [{"params": ps[:1]}, {"params": ps[1:], "weight_decay": 0.0, "lr": 3e-3}]

    a, b = RampingAdamW(groups(mine), **OPTIONS), torch.optim.AdamW(groups(theirs), **OPTIONS, foreach=False)
    if explicit:
        a.set_periods({p: torch.ones_like(p) for p in mine})
    for step in range(10):
        gradients = [randn(*shape) * 10.0 ** (step - 5) for shape in shapes]
        feed(mine, gradients)
        feed(theirs, [gradient.double() for gradient in gradients])
        for group in (*a.param_groups, *b.param_groups):
            group["lr"] *= 0.9
        a.step()
        b.step()
        for p, q, lr in zip(mine, theirs, (OPTIONS["lr"], 3e-3, 3e-3)):
            # Half units in the last place that one step can be off, constants counted as rounded, too: three of p
            # (decay's constant and product, the last sum); of the update, whose size is at most lr, four in m, three in
            # the root of v (half of v's four, and its own), and six in the rest of the quotient.
            one_step = torch.finfo(torch.float32).eps / 2 * (3 * q.abs() + 13 * lr)
            assert ((p - q).abs() <= one_step * (step + 1)).all()


def algorithm_2(w, gradients, periods_by_step, lr, betas, eps, weight_decay):
    """One element in Python floats, line by line."""
    m = v = a = 0.0
    c, history = 0, []
    for t, (g, period) in enumerate(zip(gradients, periods_by_step), start=1):
        w *= 1 - lr * weight_decay
        if np.isfinite(g):
            a, c = a + g, c + 1
        if c > 0 and c % period == 0:
            mean = a / c
            m = betas[0] * m + (1 - betas[0]) * mean
            v = betas[1] * v + (1 - betas[1]) * mean * mean
            m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
            w -= lr * c * m_hat / (v_hat**0.5 + eps)
            a, c = 0.0, 0
        history.append(w)
    return history


def test_periods_follow_algorithm_2_element_by_element(randn, device):
    """Mixed periods, non-finite gradients, and periods that change under running counters."""
    p = nn.Parameter(randn(6, 8))
    start = p.detach().clone()
    optimizer = RampingAdamW([p], **OPTIONS)
    generator = torch.Generator().manual_seed(3)
    early = torch.randint(1, 7, p.shape, generator=generator)
    late = torch.randint(1, 4, p.shape, generator=generator)
    gradients = randn(23, 6, 8)
    gradients[4, 2, 3], gradients[9, 0, 0] = torch.nan, torch.inf
    optimizer.set_periods({p: early.to(device)})
    history = []
    for step in range(23):
        if step == 11:
            optimizer.set_periods({p: late.to(device)})
        p.grad = gradients[step].clone()
        optimizer.step()
        history.append(p.detach().clone())
    history = torch.stack(history).double().cpu()
    for i in range(6):
        for j in range(8):
            periods = [early[i, j].item()] * 11 + [late[i, j].item()] * 12
            expected = algorithm_2(start[i, j].item(), gradients[:, i, j].tolist(), periods, **OPTIONS)
            assert history[:, i, j].tolist() == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_a_shrinking_period_does_not_stall_an_element(device):
    p = nn.Parameter(torch.ones(1, device=device))
    optimizer = RampingAdamW([p], lr=0.1, weight_decay=0.0)
    optimizer.set_periods({p: torch.full((1,), 10.0, device=device)})
    values = []
    for step in range(9):
        if step == 7:
            optimizer.set_periods({p: torch.full((1,), 3.0, device=device)})  # the counter stands at 7
        p.grad = torch.ones_like(p)
        optimizer.step()
        values.append(p.item())
    assert values[7] == 1.0 and values[8] < 1.0


def test_without_periods_nothing_accumulated_is_left(randn, device):
    """Periods that are given again start from no gradients, and until then it is torch's AdamW."""
    p = nn.Parameter(randn(4, 5))
    optimizer = RampingAdamW([p], **OPTIONS)
    optimizer.set_periods({p: torch.full_like(p, 3)})
    p.grad = randn(4, 5)
    optimizer.step()
    optimizer.clear_periods()
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.set_periods({p: torch.full_like(p, 2)})
    gradients, before = randn(2, 4, 5), p.detach().clone()
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    mean = gradients.double().mean(0)  # of the two, not of three
    update = 0.1 * mean / (1 - 0.9**3) / ((0.01 * mean**2 / (1 - 0.99**3)).sqrt() + OPTIONS["eps"])
    wanted = before.double() * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) ** 2 - 2 * OPTIONS["lr"] * update
    assert torch.allclose(p.double(), wanted, rtol=1e-5, atol=1e-6)


def test_state_dict_round_trip_goes_on_with_the_same_bits(device):
    runs = []
    for interrupted in (False, True):
        net, optimizer, step = make(device)
        batches = torch.randn(9, 12, 40, device=device)
        periods = torch.randint(1, 5, net.fc1.weight.shape, device=device)
        optimizer.set_periods({net.fc1.weight: periods})
        for i, batch in enumerate(batches):
            if interrupted and i == 5:
                state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
                rng = torch.get_rng_state(), torch.cuda.get_rng_state_all() if device.type == "cuda" else None
                net, optimizer, step = make(device)
                net.load_state_dict(state[0])
                optimizer.load_state_dict(state[1])
                torch.set_rng_state(rng[0])
                if rng[1] is not None:
                    torch.cuda.set_rng_state_all(rng[1])
            step(batch)
        runs.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_descends_and_takes_a_closure(device):
    net, optimizer, step = make(device)
    batch = torch.randn(64, 40, device=device)
    optimizer.set_periods({net.fc1.weight: torch.full_like(net.fc1.weight, 3)})
    first = step(batch)
    for _ in range(60):
        last = step(batch)
    assert last < 0.2 * first

    def closure():
        optimizer.zero_grad()
        loss = net(batch).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() < first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1}, "lr must not be negative, got -1"),
        ({"eps": -1}, "eps must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\)"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        RampingAdamW([nn.Parameter(torch.ones(1))], **arguments)


def test_bad_periods():
    p, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = RampingAdamW([p])
    with pytest.raises(ValueError, match="not optimized here"):
        optimizer.set_periods({other: torch.ones(3)})
    with pytest.raises(ValueError, match=r"parameter's shape \(3,\), got shape \(2,\)"):
        optimizer.set_periods({p: torch.ones(2)})
    for bad in ([1, 0, 1], [1.0, 1.5, 2.0], [1.0, torch.nan, 2.0]):
        with pytest.raises(ValueError, match="whole numbers of at least 1"):
            optimizer.set_periods({p: torch.tensor(bad)})
    assert not optimizer.state
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="fp32 master weights, got a parameter in torch.bfloat16"):
        RampingAdamW([half]).set_periods({half: torch.ones(3)})
    mine = torch.ones(3)
    optimizer.set_periods({p: mine})
    mine.fill_(7)
    assert (optimizer.state[p]["period"] == 1).all()


def test_update_periods_formula():
    p = nn.Parameter(torch.ones(6))
    ratios = torch.tensor([0.0, 15.9, 16.0, 33.0, 500.0, torch.inf])
    assert update_periods({p: ratios}, 16, 5, 40)[p].tolist() == [1, 1, 6, 11, 40, 40]
    with pytest.raises(ValueError, match="k1 > 0"):
        update_periods({p: ratios}, 0, 5, 40)


class TestDetection:
    def test_ratio_is_that_of_the_paths(self, device):
        """Against paths recorded by hand over the same steps, with `quantize_mx`, the quantizer of training."""
        net, optimizer, step = make(device)
        batches = list(torch.randn(6, 12, 40, device=device))
        rng = torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None
        ratios = detect_oscillation(net.train(), optimizer, step, batches, steps=6)
        torch.set_rng_state(rng[0])
        if rng[1] is not None:
            torch.cuda.set_rng_state(rng[1])
        w = [net.fc1.weight.detach().clone()]
        for batch in batches:
            step(batch)
            w.append(net.fc1.weight.detach().clone())
        q = [quantize_mx(x).dequantize() for x in w]
        way = sum((b - a).abs().double() for a, b in zip(w, w[1:]))
        jumps = sum((b - a).abs().double() for a, b in zip(q, q[1:]))
        assert (jumps > 0).any()
        assert torch.allclose(ratios[net.fc1.weight].double(), jumps / way, rtol=1e-4)

    def test_a_weight_that_did_not_move_has_ratio_0(self, device):
        net, _, _ = make(device)
        paths = PathLengths(net)
        paths.record()
        assert all((ratio == 0).all() for ratio in paths.ratios().values())

    def test_goes_round_a_short_loader(self, device):
        net, optimizer, step = make(device)
        seen = []
        batches = list(torch.randn(2, 4, 40, device=device))
        detect_oscillation(net, optimizer, lambda b: seen.append(b) or step(b), batches, steps=5)
        assert [id(b) for b in seen] == [id(batches[i % 2]) for i in range(5)]

    @pytest.mark.parametrize("q_ema", [False, True])
    def test_leaves_everything_as_it_was(self, q_ema, device):
        """Two runs of three steps, one with a detection in between: the same bits, also of every generator."""
        outcomes = []
        for detect in (False, True):
            net, optimizer, step = make(device, Recipe().with_q_ema(0.9) if q_ema else None)
            averages = QEma(net) if q_ema else None
            optimizer.set_periods({net.fc1.weight: torch.full_like(net.fc1.weight, 2)})
            np.random.seed(1)
            random.seed(1)
            batches = torch.randn(3, 12, 40, device=device)
            for i, batch in enumerate(batches):
                if detect and i == 2:
                    net.eval()

                    def noisy_step(b, step=step):
                        random.random(), np.random.rand()
                        return step(b)

                    detect_oscillation(net.train(), optimizer, noisy_step, batches[:2], steps=4)
                step(batch)
                if averages:
                    averages.after_step()
            state = [p.detach().clone() for p in (*net.parameters(), *net.buffers())]
            state += [v.clone() for s in optimizer.state.values() for v in s.values()]
            outcomes.append((state, random.random(), np.random.rand(), torch.rand(2), torch.rand(2, device=device)))
        assert len(outcomes[0][0]) == len(outcomes[1][0])
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0][0], outcomes[1][0]))
        assert outcomes[0][1:3] == outcomes[1][1:3]
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0][3:], outcomes[1][3:]))

    def test_studies_plain_rounding_and_plain_adamw(self, device):
        net, optimizer, step = make(device, Recipe().with_q_ema(0.9))
        for layer in (net.fc1, net.fc2):
            layer.ema_updates.fill_(10)
            layer.weight_ema.add_(1)
        optimizer.set_periods({net.fc1.weight: torch.full_like(net.fc1.weight, 2)})
        seen = []

        def look(batch):
            step(batch)
            seen.append((net.fc1.use_q_ema, "period" in optimizer.state[net.fc1.weight]))
            assert torch.equal(net.fc1.quantized_weight(), quantize_mx(net.fc1.weight).dequantize())

        detect_oscillation(net, optimizer, look, [torch.randn(4, 40, device=device)], steps=2)
        assert seen == [(False, False)] * 2
        assert net.fc1.use_q_ema and "period" in optimizer.state[net.fc1.weight]

    def test_restores_after_an_error_too(self, device):
        net, optimizer, step = make(device, Recipe().with_q_ema())
        before = copy.deepcopy(net.state_dict())

        def fail(batch):
            step(batch)
            raise RuntimeError("out of patience")

        with pytest.raises(RuntimeError, match="out of patience"):
            detect_oscillation(net, optimizer, fail, [torch.randn(4, 40, device=device)], steps=2)
        assert net.fc1.use_q_ema and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

    def test_refuses_an_empty_loader_and_no_steps(self, device):
        net, optimizer, step = make(device)
        with pytest.raises(ValueError, match="at least one batch"):
            detect_oscillation(net, optimizer, step, [], steps=2)
        with pytest.raises(ValueError, match="at least one step, got 0"):
            detect_oscillation(net, optimizer, step, [1], steps=0)


def test_plain_rounding_is_for_the_block_only(device):
    net, _, _ = make(device, Recipe().with_q_ema())
    with plain_rounding(net):
        assert not net.fc1.use_q_ema
    assert net.fc1.use_q_ema


def random_update(randn, shape, ramped: bool) -> Update:
    tensors = [randn(*shape), randn(*shape), 0.1 * randn(*shape), randn(*shape).square()]
    tensors[1].view(-1)[3] = torch.nan
    ramping = [None] * 3
    if ramped:
        ramping = [(4 * randn(*shape)).abs().ceil() + 1, randn(*shape), (3 * randn(*shape)).abs().floor()]
    scalars = Scalars(0.999, 0.1, 0.99, 0.01, 0.3, 1e-8, -1e-3)
    return Update(*tensors, *ramping, scalars)


def numpy_step(update: Update) -> dict[str, np.ndarray]:
    """The update in numpy's fp32, whose operations IEEE 754 rounds correctly; results by name of the tensor."""
    p, g, m, v, *ramping = (None if t is None else t.cpu().numpy() for t in update[:7])
    s = Scalars(*map(np.float32, update.scalars))
    p, due, count = p * s.keep, np.isfinite(g), np.float32(1)
    results = {}
    if ramping[0] is not None:
        period, total, count = ramping
        total, count = total + np.where(due, g, np.float32(0)), count + due.astype(np.float32)
        due = (count > 0) & (np.fmod(count, period) == 0)
        g = total / np.where(due, count, np.float32(1))
        results = {"grad_sum": np.where(due, np.float32(0), total), "grad_count": np.where(due, np.float32(0), count)}
    new_m = m + (g - m) * s.weight1
    new_v = v * s.beta2 + s.weight2 * g * g
    new_p = p + new_m * count * s.step_size / (np.sqrt(new_v) / s.correction + s.eps)
    pairs = {"parameter": (new_p, p), "exp_avg": (new_m, m), "exp_avg_sq": (new_v, v)}
    return results | {name: np.where(due, new, old) for name, (new, old) in pairs.items()}


@pytest.mark.parametrize("ramped", [False, True])
def test_a_step_has_the_bits_of_numpy(ramped, any_processor, randn, device, assert_same_bits):
    update = random_update(randn, (300, 40), ramped)
    expected = numpy_step(update)
    step_parameter(update)
    for name, want in expected.items():
        assert_same_bits(getattr(update, name).cpu(), torch.from_numpy(want), name)


def test_kernel_steps_like_pytorch_bit_for_bit(any_processor, randn, device, assert_same_bits):
    """Parameters with and without periods, of more than one chunk, with a NaN in the gradient, in one launch.

    In the last two steps bias corrections come as tensors, and the very last one is skipped.
    """
    adamw_kernel = pytest.importorskip("quantization.triton.adamw", exc_type=ImportError)
    shapes = (((70, 45), True), ((100,), False), ((5000,), True))
    updates = [random_update(randn, shape, ramped) for shape, ramped in shapes]
    expected = [Update(*(t.clone() if isinstance(t, torch.Tensor) else t for t in update)) for update in updates]
    for number in range(4):
        adamw_kernel.step(updates)
        assert updates[0].parameter._version == updates[0].grad_count._version == number + 1  # a write is noticed
        for update in expected:
            step_parameter(update)
    for called_off in (0.0, 1.0):
        skip = torch.tensor(called_off, device=device)
        scalars = updates[0].scalars
        corrections = torch.tensor([scalars.correction, scalars.step_size], dtype=torch.float64, device=device)
        on_device = scalars._replace(correction=corrections[0], step_size=corrections[1])
        before = [[t.clone() for t in update[:7] if t is not None] for update in expected]
        adamw_kernel.step([update._replace(scalars=on_device) for update in updates], skip)
        for update, old in zip(expected, before):
            step_parameter(update._replace(scalars=on_device), skip)
            if called_off:
                for now, then in zip((t for t in update[:7] if t is not None), old):
                    assert_same_bits(now, then)
    for got, want in zip(updates, expected):
        for name, a, b in zip(Update._fields[:7], got, want):
            if b is not None:
                assert_same_bits(a, b, name)
