"""This file defines what a remedy for oscillation is, and holds the registry of remedies.

A remedy is one file of this folder: a dataclass with its options and a `Remedy` under the decorator `@remedy`. The
program finds the file by itself; docs/extending.md has an example. A run calls the methods in this order:

    change_recipe, change_model     before the weights are loaded
    attach, connect                 before the first step, or before a checkpoint is restored
    before_epoch                    before the first step of each epoch
    before_update, after_step       around the optimizer step of each step
    views, log_numbers              after each epoch
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..recipe import Recipe

EVERY_REMEDY = ("every remedy",)
"""The value of `goes_with` for a remedy that may be combined with any other one."""


@dataclass(frozen=True)
class RunLength:
    epochs: int
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch


class TrainingRun(Protocol):
    """The parts of the training program that a remedy may use besides the model."""

    optimizer: torch.optim.Optimizer
    steps_per_epoch: int

    def measure_ratios(self, epoch: int, steps: int) -> dict[nn.Parameter, Tensor]:
        """The oscillation ratio of every quantized weight over `steps` steps, which are then undone.

        If a signal asks the run to end meanwhile, the steps are undone and the run's exception is raised.
        """

    def sum_over_shards(self, sums: Tensor) -> Tensor:
        """Sums over the processes, where each of them has only a part of the weights."""


class Remedy:
    """The base class of remedies. Its methods do nothing; a subclass overrides `from_options` and those it needs."""

    name: ClassVar[str]
    """The option that switches it on, such as q_ema."""
    options: ClassVar[type]
    """A frozen dataclass whose fields are options, the first of them `name`."""
    goes_with: ClassVar[tuple[str, ...]] = ()
    """Names of the remedies that may be on at the same time. It is enough if one of two remedies names the other."""
    can_shard: ClassVar[bool] = True
    """True if it works with --fsdp, where each process has only some rows of a weight."""
    needs_q2: ClassVar[bool] = True
    """True if it acts on weights that Q2 quantizes, so that it needs Q2."""
    in_evaluation: ClassVar[bool] = False
    """True if it changes what a model computes. Then --eval builds it, too, with a `RunLength` of no steps."""
    optimizer_class: ClassVar[type[torch.optim.Optimizer] | None] = None
    """The optimizer that it needs instead of AdamW, if any."""

    @classmethod
    def from_options(cls, options: object, length: RunLength) -> Remedy:
        """The remedy that `options`, which has the fields of `cls.options`, asks for.

        Raises ValueError, with the option, the value and a remedy in one line, for options that do not fit the run.
        """
        raise NotImplementedError(f"{cls.__name__} must say how it is made from its options")

    def change_recipe(self, recipe: Recipe) -> Recipe:
        """The recipe to build the model with instead of `recipe`."""
        return recipe

    def change_model(self, model: nn.Module) -> None:
        """Change which linears of the model are quantized. Called once, before weights are loaded into it."""

    def attach(self, model: nn.Module) -> None:
        """Take the model that is going to be trained, with its first weights on their device."""

    def connect(self, run: TrainingRun) -> None:
        """Take what else of the run the remedy needs. Called once, after `attach`."""

    def before_epoch(self, epoch: int) -> dict[str, float]:
        """Called before the first step of epoch 0, 1, ...; returns numbers for that epoch's line of the log.

        A run that goes on within an epoch does not call it, so `state_dict` must hold what this method sets.
        """
        return {}

    def before_update(self) -> None:
        """Called between the backward pass and the optimizer step, before gradients are clipped."""

    def after_step(self, skip: Tensor | None = None) -> None:
        """Called after every optimizer step. `skip` is None, or a scalar on the device that is 1 for a skipped step.

        Nothing may change in a skipped step, and the host must not wait for `skip`: `torch.where(skip > 0, old, new)`.
        """

    def views(self) -> dict[str, AbstractContextManager]:
        """Other ways to evaluate the present weights: a prefix for the log's numbers, and a context to evaluate in."""
        return {}

    def log_numbers(self) -> dict[str, float]:
        """Numbers for the line of the log that ends an epoch."""
        return {}

    def state_dict(self) -> dict:
        """The tensors and plain values that a checkpoint keeps of it, beside the model's buffers."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`. Called after `attach`; in an evaluation, after `change_model`."""

    def update(self, skip: Tensor | None = None) -> None:
        """The older name of `after_step`, which works until the next release."""
        renamed(type(self), "update", "after_step")
        self.after_step(skip)

    def numbers(self) -> dict[str, float]:
        """The older name of `log_numbers`, which works until the next release."""
        renamed(type(self), "numbers", "log_numbers")
        return self.log_numbers()


def renamed(cls: type, old: str, new: str) -> None:
    """Warn the caller of a method that has another name now."""
    text = f"{cls.__name__}.{old} will be removed in the next release; call {new}"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


REMEDIES: dict[str, type[Remedy]] = {}
"""Every remedy by the option that switches it on."""


def remedy(name: str, options: type) -> Callable[[type[Remedy]], type[Remedy]]:
    """Class decorator: enter a remedy into `REMEDIES` under `name`, the first field of its `options`."""

    def register(cls: type[Remedy]) -> type[Remedy]:
        cls.name, cls.options = name, options
        REMEDIES[name] = cls
        return cls

    return register


def go_together(first: str, second: str) -> bool:
    """Tell if the remedies of these two names may be on in one run."""
    a, b = REMEDIES[first], REMEDIES[second]
    return second in a.goes_with or first in b.goes_with or EVERY_REMEDY in (a.goes_with, b.goes_with)


class Remedies:
    """The remedies of one run; each method calls that of every remedy, in the order of `REMEDIES`."""

    def __init__(self, remedies: Iterable[Remedy] = ()) -> None:
        self._by_name = {one.name: one for one in remedies}

    @classmethod
    def from_options(cls, options: object, length: RunLength) -> Remedies:
        """Those that `options` switches on; without a step in `length`, only those that matter to an evaluation.

        Raises ValueError for options that do not fit the run.
        """
        values = ((one, getattr(options, name)) for name, one in REMEDIES.items())
        wanted = (one for one, value in values if value is not None and value is not False)  # 0 counts as on
        return cls(one.from_options(options, length) for one in wanted if length.steps or one.in_evaluation)

    def __iter__(self) -> Iterator[Remedy]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Remedy:
        return self._by_name[name]

    @property
    def optimizer_class(self) -> type[torch.optim.Optimizer] | None:
        return next((one.optimizer_class for one in self if one.optimizer_class is not None), None)

    def change_recipe(self, recipe: Recipe) -> Recipe:
        for one in self:
            recipe = one.change_recipe(recipe)
        return recipe

    def change_model(self, model: nn.Module) -> None:
        for one in self:
            one.change_model(model)

    def attach(self, model: nn.Module) -> None:
        for one in self:
            one.attach(model)

    def connect(self, run: TrainingRun) -> None:
        for one in self:
            one.connect(run)

    def before_epoch(self, epoch: int) -> dict[str, float]:
        return {name: value for one in self for name, value in one.before_epoch(epoch).items()}

    def before_update(self) -> None:
        for one in self:
            one.before_update()

    def after_step(self, skip: Tensor | None = None) -> None:
        for one in self:
            one.after_step(skip)

    def views(self) -> dict[str, AbstractContextManager]:
        return {prefix: context for one in self for prefix, context in one.views().items()}

    def log_numbers(self) -> dict[str, float]:
        return {name: value for one in self for name, value in one.log_numbers().items()}

    def state_dict(self) -> dict:
        return {name: one.state_dict() for name, one in self._by_name.items()}

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError if `state` lacks that of a remedy which has one."""
        for name, one in self._by_name.items():
            if name in state or one.state_dict():
                one.load_state_dict(state[name])
