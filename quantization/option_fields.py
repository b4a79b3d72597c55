"""How an option of main.py is declared: a dataclass field with its default, range and help.

`training/options.py` declares the program's options so, and each file of `remedies/` its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import Field, field
from functools import partial

LARGEST = {int: 2**31 - 1, float: 1e30}
"""The largest values that C integers and fp32 take."""


def number(kind: type, low: float, high: float | None = None, open_high: bool = False) -> Callable[[str], float]:
    """An argparse type: a `kind` in [low, high], or in [low, high) if `open_high`; `high` is LARGEST[kind] if None."""
    highest = LARGEST[kind] if high is None else high

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low <= value < highest if open_high else low <= value <= highest):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            if high is None and highest < value < float("inf"):
                limits += f" and at most {highest}"
            raise argparse.ArgumentTypeError(
                f"needs {'a whole number' if kind is int else 'a number'} {limits}"
                f"{', exclusive' if open_high else ''}, got {text!r}"
            )
        return value

    return parse


whole, real = partial(number, int), partial(number, float)
share, below_one = real(0, 1), real(0, 1, open_high=True)


def _told(text: str | Callable[[], str], default: object) -> str | Callable[[], str]:
    """The help with the default's value in place of {default}, so that it is written once."""
    if not isinstance(text, str):
        return text
    return text.replace("{default}", f"{default:g}" if isinstance(default, float) else str(default))


def option(
    default: object,
    text: str,
    kind: Callable[[str], object] | None = None,
    *,
    needs: str | None = None,
    **argparse_options,
) -> Field:
    """A field whose value `kind` parses; it refuses what is out of range. {default} in `text` is the default.

    If the option `needs` another one that is off, giving it is an error. If it is not given then, its value is None if
    its type allows None, else its default.
    """
    return field(
        default=default, metadata={"help": _told(text, default), "type": kind, "needs": needs, **argparse_options}
    )


def choice(
    default: str | None,
    text: str | Callable[[], str],
    choices: list[str] | Callable[[], list[str]],
    *,
    needs: str | None = None,
) -> Field:
    """An option with one of the `choices`. Text and choices that a registry decides are functions."""
    return field(default=default, metadata={"help": _told(text, default), "choices": choices, "needs": needs})


def switch(text: str | Callable[[], str], default: bool | None = False) -> Field:
    """An option without a value, which is off by default; `default` is the value that stands for off."""
    return field(default=default, metadata={"help": text, "action": "store_true"})
