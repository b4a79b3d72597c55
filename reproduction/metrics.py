"""The numbers that a finished run has."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from reproduction.runs import oscillation_file, read_log
from reproduction.targets import Metric
from runtime.errors import UserError
from tracking import oscillation_csv
from tracking.oscillation_csv import ALL, Measure

_ACCURACIES = {Metric.TOP1: "test_acc1", Metric.TOP5: "test_acc5"}
_MEASURES = {
    Metric.RATE_W: Measure.RATE_WEIGHT,
    Metric.RATE_QW: Measure.RATE_QUANTIZED,
    Metric.RATE_Y: Measure.RATE_OUTPUT,
    Metric.OSCILLATING: Measure.OSCILLATING,
    Metric.CONFIDENCE: Measure.CONFIDENCE,
}


def read_metric(metric: Metric, directory: Path) -> float:
    """The metric after the last epoch. All but accuracies need a run that has tracked oscillation."""
    if metric in _ACCURACIES:
        return read_log(directory)[-1][_ACCURACIES[metric]]
    path = oscillation_file(directory)
    value = _last_epoch(path, path.stat().st_mtime_ns)[_MEASURES[metric]]
    return 100 * value if metric is Metric.OSCILLATING else value


def read_oscillation(path: Path) -> list[oscillation_csv.Row]:
    """Raises UserError for a damaged file."""
    try:
        return oscillation_csv.read(path)
    except ValueError as error:
        raise UserError(str(error)) from error


@cache  # thousands of lines, of which a report asks for several numbers
def _last_epoch(path: Path, changed: int) -> dict[Measure, float]:
    """Measures of all linears, and of the one block whose output is measured."""
    rows = read_oscillation(path)
    last = max(row.epoch for row in rows)
    rows = [row for row in rows if row.epoch == last and row.x is None]
    return {row.measure: row.value for row in rows if row.where == ALL or row.measure is Measure.RATE_OUTPUT}
