"""Whatever state a run is in, its checkpoint holds all of it: saved, loaded into new objects, and trained on."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from engine import EpochSums
from quantization import Dampen, Freeze, Int4Recipe, OsciReset, QEma, RampingAdamW, Recipe, quant_linears, swap_linears
from quantization.reference import NUMERICS
from runtime.errors import UserError
from runtime.rng import rng_state, set_rng_state
from training import checkpoint

IDENTITY = {"model": "tiny", "recipe": "any"}
STEPS = 20


class Parts:
    """A run's objects, with a state that follows from the arguments."""

    def __init__(self, method: str, averaged: bool, seed: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        recipe = {"int4": Int4Recipe(), "q-ema": Recipe().with_q_ema(0.9)}.get(method, Recipe())
        self.model = swap_linears(nn.Sequential(nn.Linear(5, 34), nn.GELU(), nn.Linear(34, 3)), recipe, ("0", "2"))
        self.ramping = method == "q-ramping"
        self.optimizer = (RampingAdamW if self.ramping else torch.optim.AdamW)(self.model.parameters(), lr=0.05)
        self.scheduler = CosineLRScheduler(self.optimizer, STEPS, 1e-5, warmup_t=2, warmup_lr_init=1e-6)
        self.q_ema = QEma(self.model) if method == "q-ema" else None
        self.model_ema = ModelEmaV3(self.model, 0.9) if averaged else None
        self.answer = None
        if method == "dampen":
            self.answer = Dampen(self.model, STEPS, 0.1)
        elif method == "freeze":
            self.answer = Freeze(self.model, STEPS, 0.002)
        elif method == "osci-reset":
            self.answer = OsciReset(self.model, STEPS, 0.1, 3, 2.0)
        more = {} if self.answer is None else {"oscillation": self.answer}
        self.run = checkpoint.RunState(
            IDENTITY, self.model, self.optimizer, self.scheduler, self.model_ema, EpochSums(), more=more
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            if self.ramping and random.random() < 0.3:
                layers = quant_linears(self.model).values()
                self.optimizer.set_periods({x.weight: torch.randint(1, 5, x.weight.shape).float() for x in layers})
            x = torch.randn(6, 5) * float(np.random.uniform(0.1, 10))
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            if isinstance(self.answer, Dampen):
                self.answer.before_update()
            self.optimizer.step()
            for part in (self.q_ema, self.answer):
                if part is not None:
                    part.after_step()
            if self.model_ema is not None:
                self.model_ema.update(self.model)
        self.run.epoch += steps
        self.scheduler.step(self.run.epoch)

    def state(self) -> dict:
        run = self.run
        parts = [run.model, run.optimizer, run.scheduler, *run.more.values()]
        parts += [] if run.model_ema is None else [run.model_ema]
        return {"parts": [p.state_dict() for p in parts], "numbers": [run.epoch, run.best_acc1], "rng": rng_state()}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.skipif(torch.cuda.is_available(), reason="a search on the CPU")
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(["plain", "q-ema", "q-ramping", "int4", "dampen", "freeze", "osci-reset"]),
    st.booleans(),
    st.integers(0, 7),
    st.integers(0, 2**31 - 1),
    st.floats(0, 100),
)
def test_what_is_loaded_is_what_was_saved_and_goes_on_alike(tmp_path_factory, method, averaged, steps, seed, best):
    directory = tmp_path_factory.mktemp("run")
    original = Parts(method, averaged, seed)
    original.train(steps)
    original.run.best_acc1 = best
    original.run.save(directory, best=False)
    saved = original.state()
    other = Parts(method, averaged, seed + 1)
    other.train(2)
    assert not same(other.state(), saved)
    other.run.restore(checkpoint.load(directory / checkpoint.LAST, IDENTITY))
    assert same(other.state(), saved)
    other.train(3)
    state = other.state()
    set_rng_state(saved["rng"])  # the process's generators, which the other run has used meanwhile
    original.train(3)
    assert same(original.state(), state)


def test_a_checkpoint_that_does_not_know_of_an_option_is_refused(tmp_path):
    Parts("plain", False, 0).run.save(tmp_path)
    wanted = "needs a checkpoint of the same --later: this run has 0.5, .* has None"
    with pytest.raises(UserError, match=wanted):
        checkpoint.load(tmp_path / checkpoint.LAST, IDENTITY | {"--later": 0.5})


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]


@pytest.mark.parametrize(("stored", "wanted"), [(("counter",), 7), ((), 3)])
def test_a_part_that_an_older_checkpoint_lacks_stays_as_it_was(stored, wanted, tmp_path):
    """`more` without and with a part that the present program adds."""
    parts, counter = Parts("plain", False, 0), Counter()
    counter.count = 7
    parts.run.more |= {name: counter for name in stored}
    parts.run.save(tmp_path)
    counter.count = 3
    parts.run.more["counter"] = counter
    parts.run.restore(checkpoint.load(tmp_path / checkpoint.LAST, IDENTITY))
    assert counter.count == wanted


def test_sums_of_an_epoch_take_new_fields_from_the_defaults_and_tensors_to_the_cpu(device):
    """What `EpochSums` promises to those who add a field to it."""

    @dataclass
    class More(EpochSums):
        norms: float | torch.Tensor = 0.5

    old = EpochSums(steps=3, totals=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).state_dict()
    sums = More()
    sums.load_state_dict(old)
    assert (sums.steps, sums.norms, sums.totals.tolist()) == (3, 0.5, [1.0, 2.0, 3.0])
    sums.norms = torch.tensor(2.0, device=device)
    assert sums.state_dict()["norms"].device.type == "cpu" and sums.state_dict()["norms"] == 2


def test_the_parts_that_no_checkpoint_may_lack_are_those_that_are_written():
    """Beside them a checkpoint has its format, an average if there is one, and options, which older ones lack."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = checkpoint.RunState({}, model, optimizer, CosineLRScheduler(optimizer, 2), None, sums=EpochSums())
    assert run._state().keys() == {*checkpoint.PARTS, "format", "version", "numerics", "model_ema", "options"}


@pytest.mark.parametrize("numerics", [None, 1, NUMERICS])
def test_a_checkpoint_of_other_numerics_goes_on_with_one_line(numerics, tmp_path, capsys):
    parts = Parts("none", False, 0)
    parts.run.save(tmp_path)
    state = checkpoint.load(tmp_path / checkpoint.LAST, IDENTITY)
    assert state["numerics"] == NUMERICS
    if numerics is None:
        del state["numerics"]  # as in checkpoints from before it was recorded
    else:
        state["numerics"] = numerics
    parts.run.restore(state)
    printed = capsys.readouterr().out
    if numerics == NUMERICS:
        assert printed == ""
    else:
        assert (
            printed.startswith("note    the checkpoint has numerics 1, this program 2: ") and printed.count("\n") == 1
        )
