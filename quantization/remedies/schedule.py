"""The schedule that Nagel et al. 2022 share between dampening and freezing."""

from __future__ import annotations

from math import cos, pi

FIRST_QUARTER = 0.25
"""The share of the training that passes before either begins."""


def cosine(step: int, total_steps: int, start: float, end: float) -> float | None:
    """From `start` after the first quarter of `total_steps` along half a cosine to `end`; None in that quarter.

    `step` counts the optimizer steps done.
    """
    progress = (step / total_steps - FIRST_QUARTER) / (1 - FIRST_QUARTER)
    return None if progress < 0 else end + (start - end) * (1 + cos(pi * min(progress, 1.0))) / 2
