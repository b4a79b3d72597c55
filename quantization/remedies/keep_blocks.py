"""Kept blocks: the linears of some blocks stay in high precision from the start.

It is a common remedy for training in 4 bits to keep the first and the last blocks; AMD's Primus keeps two at each end.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from torch import nn

from ..option_fields import option
from ..swap import quant_linears, restore_linears
from .base import EVERY_REMEDY, Remedy, RunLength, remedy


def block_numbers(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers from 0, separated by commas."""
    numbers = text.split(",")
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"needs numbers of blocks from 0, separated by commas, got {text!r}")
    return tuple(sorted({int(number) for number in numbers}))


@dataclass(frozen=True)
class KeepBlocksOptions:
    keep_blocks: tuple[int, ...] | None = option(
        None, "blocks that stay in high precision, counted from 0", block_numbers, metavar="0,11,..."
    )


@remedy("keep_blocks", KeepBlocksOptions)
class KeepBlocks(Remedy):
    """Puts ordinary linears back into the blocks of these numbers, which count all blocks of the model from 0."""

    goes_with = EVERY_REMEDY
    needs_q2 = False
    in_evaluation = True

    def __init__(self, blocks: tuple[int, ...]) -> None:
        self.blocks = blocks

    @classmethod
    def from_options(cls, options: KeepBlocksOptions, length: RunLength) -> KeepBlocks:
        return cls(options.keep_blocks)

    def change_model(self, model: nn.Module) -> None:
        """Raises ValueError for a number that no block has, and if no block would be left."""
        blocks: dict[str, list[str]] = {}
        for name in quant_linears(model):
            blocks.setdefault(block_of(name), []).append(name)
        last = len(blocks) - 1
        if self.blocks[-1] > last:
            raise ValueError(f"--keep-blocks takes numbers from 0 to {last} for this model, got {self.blocks[-1]}")
        if len(self.blocks) == len(blocks):
            raise ValueError(f"--keep-blocks must leave a block, got all {len(blocks)}; use --quant none")
        kept = [names for number, names in enumerate(blocks.values()) if number in self.blocks]
        restore_linears(model, [name for names in kept for name in names])


def block_of(name: str) -> str:
    """The innermost numbered module above a linear: blocks.3 for blocks.3.mlp.fc1."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else name.rpartition(".")[0]
