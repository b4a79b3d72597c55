"""The registry of remedies: what each one says of itself, and that the program finds a new one by its file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import combinations

import pytest
from torch import nn

from quantization import REMEDIES, Dampen, QEma, Recipe, Remedies, Remedy, RunLength, swap_linears
from quantization.remedies.base import EVERY_REMEDY, go_together, remedy
from training.options import FIELDS

OURS = ("q_ema", "q_ramping", "dampen", "freeze", "heal", "keep_blocks", "osci_reset")
TOGETHER = {("q_ema", "q_ramping")}


@pytest.fixture
def registered():
    """A remedy of the test's own, which records its calls."""

    @dataclass(frozen=True)
    class Options:
        recorded: bool = False

    @remedy("recorded", Options)
    class Recorded(Remedy):
        def __init__(self) -> None:
            self.calls = []

        @classmethod
        def from_options(cls, options, length):
            return cls()

        def before_epoch(self, epoch):
            self.calls.append(epoch)
            return {"epochs_begun": epoch + 1}

        def before_update(self):
            self.calls.append("update")

        def after_step(self, skip=None):
            self.calls.append(skip)

        def log_numbers(self):
            return {"calls": len(self.calls)}

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    yield Options, Recorded
    del REMEDIES["recorded"]


def test_each_is_switched_on_by_its_first_option():
    for name, one in REMEDIES.items():
        assert one.name == name == fields(one.options)[0].name
        assert {f.name for f in fields(one.options)} <= FIELDS.keys()
        assert {f.metadata.get("needs") for f in fields(one.options)[1:]} <= {name}


@pytest.mark.parametrize(("first", "second"), list(combinations(OURS, 2)))
def test_what_goes_together(first, second):
    """The paper's pair, and whatever healing and kept blocks are combined with."""
    everything = {"heal", "keep_blocks"} & {first, second}
    assert go_together(first, second) == bool(everything or (first, second) in TOGETHER) == go_together(second, first)
    assert bool(everything) == (EVERY_REMEDY in (REMEDIES[first].goes_with, REMEDIES[second].goes_with))


def test_a_run_calls_every_remedy(registered):
    options, recorded = registered
    remedies = Remedies([recorded(), QEma(swap_linears(nn.Sequential(nn.Linear(3, 2)), Recipe().with_q_ema(), "0"))])
    assert remedies.before_epoch(0) == {"epochs_begun": 1}
    remedies.before_update()
    remedies.after_step(None)
    assert remedies["recorded"].calls == [0, "update", None] and remedies.log_numbers() == {"calls": 3}
    assert remedies.state_dict() == {"recorded": {"calls": [0, "update", None]}, "q_ema": {}}


def test_a_state_that_is_missing_is_an_error_only_where_there_is_one(registered):
    _, recorded = registered
    Remedies([QEma()]).load_state_dict({})
    one = Remedies([recorded()])
    one.load_state_dict({"recorded": {"calls": [7]}})
    assert one["recorded"].calls == [7]
    with pytest.raises(KeyError):
        one.load_state_dict({})


def test_an_evaluation_builds_only_what_changes_the_outputs(registered):
    @dataclass(frozen=True)
    class Values:
        q_ema: bool = True
        q_ema_beta: float = 0.5
        dampen: float = 0.0
        dampen_reduction: str = "sum"
        heal: int = 2
        recorded: bool = True

        def __getattr__(self, name: str) -> None:
            """All other remedies are off."""

    assert [one.name for one in Remedies.from_options(Values(), RunLength(3, 0))] == ["q_ema", "heal"]
    assert [one.name for one in Remedies.from_options(Values(), RunLength(3, 5))] == [
        *("q_ema", "dampen", "heal", "recorded")
    ]


def test_older_names_work_with_a_warning():
    model = swap_linears(nn.Sequential(nn.Linear(3, 2)), Recipe(), "0")
    dampen = Dampen(model, 4, 0.1)
    for call, name in (
        (dampen.update, "after_step"),
        (dampen.numbers, "log_numbers"),
        (dampen.add_gradients, "before"),
    ):
        with pytest.warns(DeprecationWarning, match=f"call {name}"):
            call()
    assert dampen.step == 1
