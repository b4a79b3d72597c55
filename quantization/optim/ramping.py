"""Q-Ramping updates weights that oscillate less often and on more data (paper section 6, Algorithm 2).

`detect_oscillation` measures how much every quantized weight oscillates, `update_periods` turns that into a period
N_w for each of its elements, and `RampingAdamW` updates the element every N_w steps with the mean gradient of these
steps and N_w times the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..adamw_update import Scalars, Update
from ..measures.oscillation import PathLengths
from ..operators import HAS_TRITON
from ..shards import local, sharded_like
from ..swap import plain_rounding
from .rewound import rewound
from .step_count import count_steps

if HAS_TRITON:
    from ..triton import adamw as _kernel
else:
    _kernel = None

Batch = TypeVar("Batch")


class RampingAdamW(torch.optim.Optimizer):
    """AdamW in which every element of a parameter may have a period of its own.

    `lr`, `betas`, `eps` and `weight_decay` mean the same as in `torch.optim.AdamW`, and have the same defaults.

    Let N be an element's period, and c the number of gradients accumulated in a since its last update. Every step does:

        decay:       w <- w (1 - lr * weight_decay)
        accumulate:  a <- a + g,  c <- c + 1                        not for a non-finite g
        and where c is a positive multiple of N:
            g~ = a / c
            m <- beta1 m + (1 - beta1) g~,  v <- beta2 v + (1 - beta2) g~^2
            w <- w - (lr * c) * m^ / (sqrt(v^) + eps)               bias correction by the global step
            a <- 0,  c <- 0

    Parameters without periods have N = 1; with N = 1 everywhere this is `torch.optim.AdamW`. Parameter groups are
    the usual ones (timm's weight-decay groups included). Periods, accumulators and counters are part of
    `state_dict`. They are kept in the parameter's dtype because `Optimizer.load_state_dict` casts all state to it.
    Every process updates its rows of a sharded parameter, whose state is sharded likewise.

    The device can skip a whole step: if the optimizer has an attribute `found_inf`, a scalar, and its value is 1,
    `step` changes nothing, neither by weight decay nor in the step count. PyTorch's fused optimizers read it as well.

    Raises ValueError for a learning rate, weight decay or eps below 0 and for betas outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def set_periods(self, periods: dict[Tensor, Tensor]) -> None:
        """Give parameters new periods: positive integers in the parameter's shape. Running counters continue.

        A sharded parameter gets the periods of this process's rows.
        Raises ValueError, and changes nothing, for a parameter of another optimizer or in half precision (whose
        counters could not count), a wrong shape, or a period that is not a whole number of at least 1.
        """
        own = {p for group in self.param_groups for p in group["params"]}
        for p, period in periods.items():
            if p not in own:
                raise ValueError(f"periods given for a parameter of shape {tuple(p.shape)} that is not optimized here")
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"periods need fp32 master weights, got a parameter in {p.dtype}")
            shape = local(p).shape
            if period.shape != shape or not ((period >= 1) & (period == period.floor())).all():
                raise ValueError(
                    f"periods must be whole numbers of at least 1 in the parameter's shape {tuple(shape)}, "
                    f"got shape {tuple(period.shape)} and minimum {period.min().item()}"
                )
        for p, period in periods.items():
            state = self.state[p]
            state["period"] = sharded_like(period.to(p.dtype, copy=True), p)
            if "grad_sum" not in state:
                state["grad_sum"], state["grad_count"] = torch.zeros_like(p), torch.zeros_like(p)

    def clear_periods(self) -> None:
        """Drop all periods and accumulated gradients: the next step is one of plain AdamW."""
        for state in self.state.values():
            for name in ("period", "grad_sum", "grad_count"):
                state.pop(name, None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip = getattr(self, "found_inf", None)
        if skip is not None and skip.device.type == "cpu":
            if skip:
                return loss
            skip = None
        together: dict[torch.device, list[Update]] = {}
        for update in self._updates(skip):
            if _kernel is not None and _kernel.fits(update):
                together.setdefault(update.parameter.device, []).append(update)
            else:
                step_parameter(update, skip)
        for updates in together.values():
            _kernel.step(updates, skip)
        return loss

    def _updates(self, skip: Tensor | None) -> Iterator[Update]:
        """Counts the step of every parameter that has a gradient, and yields its update."""
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in found:
            state = self.state[p]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] = state["step"].to(p.device)  # a loaded step may be on another device
        for (p, group), (correction, step_size) in zip(found, self._bias_corrections(found, skip)):
            state, lr, (beta1, beta2) = self.state[p], group["lr"], group["betas"]
            scalars = Scalars(
                keep=1 - lr * group["weight_decay"],
                weight1=1 - beta1,
                beta2=beta2,
                weight2=1 - beta2,
                correction=correction,
                eps=group["eps"],
                step_size=step_size,
            )
            names = ("exp_avg", "exp_avg_sq", "period", "grad_sum", "grad_count")
            states = (local(state[name]) if name in state else None for name in names)
            yield Update(local(p), local(p.grad), *states, scalars)

    def _bias_corrections(self, found: list[tuple[Tensor, dict]], skip: Tensor | None) -> Iterator[tuple]:
        """Counts the step, unless `skip` is 1; yields sqrt(1 - beta2**step), -lr / (1 - beta1**step) per parameter.

        On a GPU they are fp64 scalars there, because the host does not know how many steps were skipped.
        """
        if not found:
            return iter(())
        steps = [self.state[p]["step"] for p, _ in found]
        count_steps(steps, skip)
        constants = [(group["lr"], *group["betas"]) for _, group in found]
        if not steps[0].is_cuda:
            numbers = zip(map(float, steps), constants)
            return ((math.sqrt(1 - beta2**t), -lr / (1 - beta1**t)) for t, (lr, beta1, beta2) in numbers)
        constants = torch.tensor(constants, dtype=torch.float64).T.contiguous().pin_memory()
        lr, beta1, beta2 = constants.to(steps[0].device, non_blocking=True)
        t = torch.stack(steps).double()
        return zip((1 - beta2**t).sqrt().unbind(), (-lr / (1 - beta1**t)).unbind())


def step_parameter(update: Update, skip: Tensor | None = None) -> None:
    """Apply one parameter's update in plain PyTorch, in place. Nothing changes if `skip` is not 0.

    Every operation rounds once, to the same bits on every processor: + - * / of fp32, and a square root taken in fp64.
    """
    p, gradient, m, v, period, total, count, s = update
    wanted = True if skip is None else skip == 0
    decayed = p * s.keep
    p.copy_(decayed if skip is None else torch.where(wanted, decayed, p))
    due = gradient.isfinite() & wanted
    if period is not None:
        total += torch.where(due, gradient, 0)
        count += due
        due = (count > 0) & (count % period == 0) & wanted
        gradient = total / count

    new_m = m + (gradient - m) * s.weight1
    new_v = v * s.beta2 + s.weight2 * gradient * gradient
    # The correction must be a tensor: on a GPU, PyTorch divides by a number by multiplying with its reciprocal, which
    # rounds twice.
    correction = s.correction
    if not isinstance(correction, Tensor):
        correction = torch.full((), correction, dtype=torch.float64, device=p.device)
    # PyTorch's fp32 sqrt on AMD processors is one unit off in a fifth of all values. The error of an fp64 root vanishes
    # when it is rounded to fp32, because no root of an fp32 number lies nearer than 2^-50 (relative) to a rounding
    # boundary.
    root_of_v = new_v.double().sqrt().to(new_v.dtype)
    denominator = root_of_v / correction + s.eps
    numerator = new_m if period is None else new_m * count
    new_p = p + numerator * s.step_size / denominator

    # `where` instead of a boolean index, whose size the host would have to wait for.
    for old, new in ((m, new_m), (v, new_v), (p, new_p)):
        old.copy_(torch.where(due, new, old))
    if period is not None:
        total.masked_fill_(due, 0)
        count.masked_fill_(due, 0)


def detect_oscillation(
    model: nn.Module,
    optimizer: RampingAdamW,
    train_step: Callable[[Batch], object],
    loader: Iterable[Batch],
    steps: int = 30,
) -> dict[nn.Parameter, Tensor]:
    """Measure the oscillation ratio R_w of every quantized weight that `optimizer` trains.

    The measurement takes `steps` steps of plain AdamW from the present state. `train_step(batch)` does one step of
    forward, backward and `optimizer.step()` on `model`, which meanwhile rounds its weights without Q-EMA, even if that
    is on. A `loader` that is shorter than `steps` is repeated. Afterwards model, optimizer and random generators are as
    if nothing had happened; give `loader` an order of its own.

    Raises ValueError for a loader without a batch and for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"detection needs at least one step, got {steps}")
    with rewound(model, optimizer), plain_rounding(model):
        optimizer.clear_periods()
        paths = PathLengths(model)
        for batch in islice(_endless(loader), steps):
            train_step(batch)
            paths.record()
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    return {p: ratio for p, ratio in paths.ratios().items() if p in trained}


def update_periods(
    ratios: dict[nn.Parameter, Tensor], k1: float, k2: int, max_period: int
) -> dict[nn.Parameter, Tensor]:
    """The period N_w = min(k2 * floor(R_w / k1) + 1, max_period) of every element.

    Raises ValueError unless k1 is positive, k2 is not negative and max_period is at least 1.
    """
    if k1 <= 0 or k2 < 0 or max_period < 1:
        raise ValueError(f"need k1 > 0, k2 >= 0 and max_period >= 1, got {k1}, {k2} and {max_period}")
    return {p: (k2 * (ratio / k1).floor() + 1).clamp_(max=max_period) for p, ratio in ratios.items()}


def _endless(loader: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError("detection needs a loader with at least one batch, got an empty one")
