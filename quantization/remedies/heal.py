"""Healing: from some epoch on, the linears multiply in high precision.

Submissions to MLPerf Training in MXFP4 do this late in a run (AMD's Primus, `mxfp4_healing.py`). The healed model is no
4-bit model any more. So each line of the log also has its numbers in the recipe's precision: `quantized_loss`,
`quantized_acc1` and `quantized_acc5`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import nn

from ..option_fields import option, whole
from ..swap import quant_linears
from .base import EVERY_REMEDY, Remedy, RunLength, remedy


@dataclass(frozen=True)
class HealOptions:
    heal: int | None = option(
        None, "from this epoch on, counted from 1, the linears multiply in high precision", whole(1), metavar="EPOCH"
    )


@remedy("heal", HealOptions)
class Heal(Remedy):
    """Switches every MX linear of the model to high precision before epoch number `epoch`, counted from 1.

    Other remedies go on as before: they act on the weights and on what Q2 would make of them.
    """

    goes_with = EVERY_REMEDY
    needs_q2 = False
    in_evaluation = True

    def __init__(self, epoch: int) -> None:
        self.epoch, self.healed = epoch, False

    @classmethod
    def from_options(cls, options: HealOptions, length: RunLength) -> Heal:
        if options.heal > length.epochs:
            raise ValueError(f"--heal must be an epoch of the run, from 1 to {length.epochs}, got {options.heal}")
        return cls(options.heal)

    def change_model(self, model: nn.Module) -> None:
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        self.layers = list(quant_linears(model).values())
        self._switch(self.healed)

    def before_epoch(self, epoch: int) -> dict[str, float]:
        self._switch(epoch + 1 >= self.epoch)
        return {}

    def views(self) -> dict[str, AbstractContextManager]:
        return {"quantized": self._in_low_precision()} if self.healed else {}

    def state_dict(self) -> dict:
        return {"healed": self.healed}

    def load_state_dict(self, state: dict) -> None:
        self._switch(state["healed"])

    def _switch(self, healed: bool) -> None:
        self.healed = healed
        for layer in self.layers:
            layer.high_precision = healed

    @contextmanager
    def _in_low_precision(self) -> Iterator[None]:
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)
