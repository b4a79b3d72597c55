"""Writes a run's numbers to log.txt, oscillation.csv, TensorBoardX events, DLLogger's JSON lines, report.html, and says
them on the terminal."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from datetime import datetime
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from runtime import processes
from runtime.errors import UserError
from runtime.files import replacing
from tracking import oscillation_csv
from tracking.oscillation_csv import Measure, Row
from training import report
from training.run_files import DLLOGGER, LOG, REPORT, TENSORBOARD


def json_line(value: dict[str, object]) -> str:
    """JSON, which has no NaN and no infinity: they become null."""

    def finite(part: object) -> object:
        if isinstance(part, dict):
            return {name: finite(inner) for name, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), allow_nan=False)


class RunLog:
    """Writes the numbers that `training/loop.py` collects for each epoch, on the main process only.

    Files are appended to, so that a resumed run continues them. log.txt and TensorBoard drop their epochs from `epoch`
    on, which the run is about to repeat.
    """

    def __init__(self, directory: Path, parameters: dict, epoch: int = 0) -> None:
        self.directory = directory
        self._active = processes.is_main()
        if self._active:
            report.check_target(directory / REPORT)
            _drop_epochs(directory / LOG, epoch)
            self._events = SummaryWriter(str(directory / TENSORBOARD), purge_step=epoch)
            self._dllogger = _dllogger(directory / DLLOGGER)
            self._dllogger("PARAMETER", parameters)

    def epoch(self, numbers: dict[str, float]) -> None:
        """One line in log.txt and in dllogger.json, a point on every TensorBoard curve, and report.html anew."""
        if not self._active:
            return
        with open(self.directory / LOG, "a", encoding="utf-8") as file:
            file.write(json_line(numbers) + "\n")
        epoch = numbers["epoch"]
        for name, value in numbers.items():
            if name != "epoch":
                self._events.add_scalar(name, value, epoch)
        self._dllogger([epoch], numbers)
        self._events.flush()
        report.write(self.directory / REPORT, [report.read_run(self.directory)])

    def oscillation(self, rows: list[Row]) -> None:
        """Write one epoch's measurements as lines of oscillation.csv, TensorBoard curves and histograms."""
        if not self._active:
            return
        oscillation_csv.append(self.directory / oscillation_csv.FILE_NAME, rows)
        histograms: dict[Measure, list[tuple[float, float]]] = {}
        for row in rows:
            if row.x is None and row.measure is not Measure.RATIO:
                self._events.add_scalar(f"{row.measure.value}/{row.where}", row.value, row.epoch)
            elif row.measure in (Measure.CONFIDENCE_HISTOGRAM, Measure.LATENT_HISTOGRAM):
                histograms.setdefault(row.measure, []).append((row.x, row.value))
        for measure, bins in histograms.items():
            edges, shares = np.array(bins).T
            edges, width = np.append(edges, 2 * edges[-1] - edges[-2]), edges[1] - edges[0]
            middles = edges[:-1] + width / 2
            self._events.add_histogram_raw(
                measure.value,
                min=edges[0],
                max=edges[-1],
                num=1,
                sum=float(shares @ middles),
                sum_squares=float(shares @ middles**2),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=shares.tolist(),
                global_step=rows[0].epoch,
            )
        self._events.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._active:
            self._events.close()


def _drop_epochs(path: Path, first: int) -> None:
    """Keep the lines of the epochs before `first`; a partial line of a killed run is dropped.

    Raises UserError if the file is no run's log.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] < first]
        if lines and not lines[0].startswith(("{", "\0")):  # some file systems leave zeros where power fails
            raise ValueError("no JSON object")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} must be a run's log, it holds something else; move it away") from error
    if kept != lines:
        with replacing(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


MOST_WAITING = 10
"""Percent of the time that a GPU may wait for data before the table says so."""
TABLE_HEAD = f"{'epoch':>8} {'train loss':>11} {'test loss':>10} {'top-1 %':>8} {'top-5 %':>8} {'img/s':>8} {'lr':>8}"


def table_row(numbers: dict[str, float], epochs: int) -> str:
    row = f"{numbers['epoch'] + 1:>{8 - len(str(epochs)) - 1}}/{epochs} {numbers['train_loss']:>11.4f} "
    row += f"{numbers['test_loss']:>10.4f} {numbers['test_acc1']:>8.2f} {numbers['test_acc5']:>8.2f} "
    row += f"{numbers['img_per_s']:>8.0f} {numbers['lr']:>8.1e}"
    if "ema_acc1" in numbers:
        row += f"   average: {numbers['ema_acc1']:.2f} %"
    if "quantized_acc1" in numbers:
        row += f"   healed; quantized: {numbers['quantized_acc1']:.2f} %"
    if "oscillating" in numbers:
        row += f"   {numbers['oscillating']:.2f} % oscillate, mean period {numbers['mean_period']:.2f}"
    if numbers.get("waited_for_data", 0) > MOST_WAITING:
        row += f"   waited {numbers['waited_for_data']:.0f} % of the time for data: more --num-workers may help"
    if numbers["lost_groups"]:
        row += f"   {numbers['lost_groups']:,} groups out of FP8's range became zero"
    if numbers["bad_images"]:
        row += f"   {numbers['bad_images']:,} images were not readable"
    if numbers["skipped_steps"]:
        row += f"   {numbers['skipped_steps']:,} steps were not finite and skipped"
    return row


def _dllogger(path: Path):
    """log(step, data), by NVIDIA's dllogger where it is installed, else into the same format.

    PyPI's `nvidia-dllogger` is a placeholder that cannot be installed, so the package may well be absent. The format
    is that of its JSONStreamBackend: "DLLL " and one JSON object per line.
    """
    if importlib.util.find_spec("dllogger") is not None:
        dllogger = importlib.import_module("dllogger")
        backend = dllogger.JSONStreamBackend(dllogger.Verbosity.VERBOSE, str(path), append=path.exists())
        logger = dllogger.Logger([backend])

        def log(step, data: dict) -> None:
            logger.log(step, data)
            logger.flush()

        return log

    started = datetime.now()

    def log(step, data: dict) -> None:
        now = datetime.now()
        line = {
            "timestamp": str(now.timestamp()),
            "datetime": str(now),
            "elapsedtime": str((now - started).total_seconds()),
            "type": "LOG",
            "step": step,
            "data": data,
        }
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"DLLL {json_line(line)}\n")

    return log
