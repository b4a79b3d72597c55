"""The schedule that dampening and freezing share (Nagel et al. 2022)."""

from __future__ import annotations

from math import cos, pi

FIRST_QUARTER = 0.25
"""The share of the training after which both begin."""


def cosine(step: int, total_steps: int, start: float, end: float) -> float | None:
    """None in the first quarter of `total_steps`, then half a cosine from `start` to `end`.

    `step` counts the optimizer steps done.
    """
    progress = (step / total_steps - FIRST_QUARTER) / (1 - FIRST_QUARTER)
    return None if progress < 0 else end + (start - end) * (1 + cos(pi * min(progress, 1.0))) / 2
