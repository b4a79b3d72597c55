"""Reads and writes oscillation.csv, the file of the rows that `tracker.py` has measured, one number per line.

| column | |
| --- | --- |
| epoch | from 0, as in log.txt |
| step | optimizer steps done since the start of the run, at the end of the window |
| window | steps of the window, T0 |
| measure | a `Measure` |
| where | `all` linears of the blocks, or one, or a block, or a weight: `blocks.0.attn.qkv[3][17]` is row 3, column 17 |
| x | lower edge of the bin, or step within the window; empty for a single number |
| value | a plain number |

Q2 is the quantizer of the forward pass, Q-EMA included. Measures of Q2 are absent where nothing quantizes the weights.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from runtime.errors import UserError
from runtime.files import replacing

FILE_NAME = "oscillation.csv"
ALL = "all"


class Measure(str, Enum):
    """The quantity in a line. The quantities have no units; histograms are shares."""

    RATE_WEIGHT = "rate_w"
    """r(W) = mean over the window's steps of ||W_t - W_(t-1)||_F / ||W_(t-1)||_F; `all`: the mean of the layers'."""
    RATE_QUANTIZED = "rate_q2"
    """r(Q2(W)), likewise."""
    RATE_OUTPUT = "rate_y"
    """r(Y) of a block's output for fixed held-out images."""
    OSCILLATING = "oscillating"
    """Share of weights with an oscillation ratio R_w above `OSCILLATION_THRESHOLD`, from 0 to 1."""
    CONFIDENCE = "confidence"
    """Mean quantization confidence at the end of the window, from 0 to 1."""
    CONFIDENCE_HISTOGRAM = "confidence_histogram"
    """Share of the weights in the bin that starts at x; bins are of equal width."""
    LATENT_HISTOGRAM = "latent_histogram"
    """The same for w/S."""
    RATIO = "ratio"
    """R_w of a single weight, one of the largest among those of a few rows of each layer."""
    TRAJECTORY_LATENT = "trajectory_latent"
    """Its w/S after x steps of the window."""
    TRAJECTORY_QUANTIZED = "trajectory_q2"
    """Its Q2(w)/S."""


class Row(NamedTuple):
    epoch: int
    step: int
    window: int
    measure: Measure
    where: str
    x: float | None
    value: float


HEADER = ",".join(Row._fields) + "\n"


def start(path: Path, epoch: int) -> None:
    """Make the file, or drop its epochs from `epoch` on, which the run is about to repeat.

    A reader sees the old file or the new one. Raises UserError for a file that is not ours.
    """
    try:
        kept = [row for row in read(path) if row.epoch < epoch] if path.is_file() else []
    except ValueError as error:
        raise UserError(f"--track-oscillation cannot go on with its file: {error}; move it away") from error
    with replacing(path) as temporary:
        temporary.write_text(HEADER + _text(kept), encoding="utf-8")


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows in one write. `read` and `start` ignore the partial line that a killed run may leave."""
    with open(path, "ab", buffering=0) as file:
        file.write(_text(rows).encode())


def read(path: Path) -> list[Row]:
    """All rows in order; the file may be gzipped. Raises ValueError, with the line, for a file that is not ours."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            header, *lines = list(file) or [""]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); write it again") from error
    if header != HEADER:
        raise ValueError(f"{path} must start with {HEADER.strip()}, got {header.strip()[:80]!r}; is it an {FILE_NAME}?")
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = []
    for number, cells in enumerate(csv.reader(lines), start=2):
        try:
            epoch, step, window, measure, where, x, value = cells
            numbers = int(epoch), int(step), int(window)
            rows.append(Row(*numbers, Measure(measure), where, float(x) if x else None, float(value)))
        except ValueError as error:
            raise ValueError(
                f"line {number} of {path} is not a row of {FILE_NAME}: {','.join(cells)[:80]!r}"
            ) from error
    return rows


def _text(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        x = "" if row.x is None else f"{row.x:.9g}"
        writer.writerow((*row[:3], row.measure.value, row.where, x, f"{row.value:.9g}"))
    return text.getvalue()
