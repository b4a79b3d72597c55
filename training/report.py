"""report.html: one page for a run, or for several beside each other, that needs no other file and no network.

    python -m training.report RUN [RUN ...] --out FILE

Each run writes its own after every epoch. Everything on the page comes from log.txt, dllogger.json and oscillation.csv
in the run's directory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from runtime.errors import UserError
from runtime.files import replacing
from tracking import oscillation_csv
from tracking.oscillation_csv import ALL, Measure
from training.charts import COLOURS, DASHES, MARKERS, Series, chart, number
from training.run_files import DLLOGGER, LOG

USER_MISTAKE = 2
BEGINNING = "<!doctype html>\n<!-- a report of training/report.py -->\n"
ENVIRONMENT, COMMAND = "environment", "command"
"""Keys of the parameters in dllogger.json that are no options."""
STYLE = """
:root { color-scheme: light; font: 16px/1.45 system-ui, sans-serif; color: #1b1f24; background: #fff }
body { max-width: 1240px; margin: 0 auto; padding: 16px }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 1.6em 0 .5em }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 16px }
figure { margin: 0; padding: 10px 12px; border: 1px solid #d0d7de; border-radius: 6px; min-width: 0 }
figcaption span { color: #57606a }
figure svg { width: 100%; height: auto; display: block; font-size: 13px }
svg text { fill: #424a53 } svg .grid { stroke: #d8dee4 }
polyline { fill: none; stroke-width: 2 } .sample line { stroke-width: 2 }
.legend { list-style: none; margin: 4px 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .9rem }
.legend li { overflow-wrap: anywhere }
figure .sample { width: 34px; height: 12px; display: inline-block; margin-right: 6px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem }
th, td { text-align: left; vertical-align: top; padding: 3px 14px 3px 0; border-bottom: 1px solid #e3e8ee }
td { overflow-wrap: anywhere; min-width: 5em } tr.differs td, tr.differs th { background: #fff4d6 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: 10px; border-radius: 6px }
pre, h3 { margin: 4px 0; font-size: .9rem }
"""


@dataclass(frozen=True)
class Run:
    name: str
    epochs: list[dict[str, float | None]]
    """The lines of log.txt."""
    parameters: dict[str, object]
    """The options, the versions, the machine and the command of the latest start; {} if dllogger.json is missing."""
    seconds: float
    """From each start to the last epoch that was logged after it, summed."""
    starts: int
    oscillation: dict[Measure, list[tuple[float, float | None]]]
    """(epochs done, value) for each measure of all layers together; {} for a run that did not track it."""

    def points(self, key: str) -> list[tuple[float, float | None]]:
        return [(line["epoch"] + 1, line.get(key)) for line in self.epochs]

    def has(self, key: str) -> bool:
        return any(line.get(key) is not None for line in self.epochs)


def read_run(directory: Path, name: str | None = None) -> Run:
    """The run in `directory`. Raises UserError if it holds none, or if a file there is not a run's."""
    path = directory / LOG
    if not path.is_file():
        raise UserError(f"RUN must be a run's directory, with a {LOG}, got {directory}; give what --output-dir was")
    try:
        epochs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
        if not all(isinstance(line, dict) and isinstance(line["epoch"], int) for line in epochs):
            raise ValueError("no line of an epoch")
        measured = directory / oscillation_csv.FILE_NAME
        rows = oscillation_csv.read(measured) if measured.is_file() else []
    except (ValueError, KeyError) as error:
        raise UserError(f"{directory} must hold a run's files, they hold something else ({error})") from error
    oscillation: dict[Measure, list[tuple[float, float | None]]] = {}
    blocks: dict[float, list[float]] = {}
    for row in rows:
        if row.x is None and row.where == ALL:
            oscillation.setdefault(row.measure, []).append((row.epoch + 1, row.value))
        elif row.measure is Measure.RATE_OUTPUT:
            blocks.setdefault(row.epoch + 1, []).append(row.value)
    if blocks:
        oscillation[Measure.RATE_OUTPUT] = [(epoch, sum(values) / len(values)) for epoch, values in blocks.items()]
    parameters, seconds, starts = _read_starts(directory / DLLOGGER)
    return Run(name or directory.resolve().name, epochs, parameters, seconds, starts, oscillation)


def _read_starts(path: Path) -> tuple[dict[str, object], float, int]:
    """The parameters of the latest start, the seconds of all starts together, and their number."""
    parameters, seconds, starts = {}, 0.0, 0
    began = last = 0.0
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text.removeprefix("DLLL "))
            step, data, now = line["step"], line["data"], float(line["timestamp"])
        except (ValueError, KeyError, TypeError):  # a partial line of a killed run
            continue
        if step == "PARAMETER":
            seconds, starts = seconds + last - began, starts + 1
            began = last = now
            parameters = data
        else:
            last = now
    return parameters, seconds + last - began, starts


@dataclass(frozen=True)
class Plot:
    title: str
    unit: str
    lines: dict[str, Callable[[Run], list[tuple[float, float | None]]]]
    """By label, the points of a run; none for a run that lacks the numbers."""


def _of_log(*keys: tuple[str, str]) -> dict[str, Callable[[Run], list]]:
    return {label: lambda run, key=key: run.points(key) if run.has(key) else [] for label, key in keys}


def _of_csv(*measures: tuple[str, Measure]) -> dict[str, Callable[[Run], list]]:
    return {label: lambda run, measure=measure: run.oscillation.get(measure, []) for label, measure in measures}


PLOTS = (
    Plot("Loss", "cross-entropy", _of_log(("held out", "test_loss"), ("training", "train_loss"))),
    Plot(
        "Top-1 accuracy",
        "% of held-out images",
        _of_log(("model", "test_acc1"), ("average of the weights", "ema_acc1"), ("quantized", "quantized_acc1")),
    ),
    Plot("Learning rate", "of AdamW, without unit", _of_log(("learning rate", "lr"))),
    Plot("Speed", "images a second, training", _of_log(("images a second", "img_per_s"))),
    Plot("Skipped steps", "steps an epoch", _of_log(("skipped steps", "skipped_steps"))),
    Plot("Detected oscillation", "% of weights with a period above 1", _of_log(("oscillating", "oscillating"))),
    Plot(
        "Rate of change",
        "relative change a step",
        _of_csv(("weights", Measure.RATE_WEIGHT), ("quantized weights", Measure.RATE_QUANTIZED))
        | _of_csv(("outputs of blocks", Measure.RATE_OUTPUT)),
    ),
    Plot("Oscillating weights", "share, 0 to 1", _of_csv(("oscillating", Measure.OSCILLATING))),
    Plot("Quantization confidence", "mean, 0 to 1", _of_csv(("confidence", Measure.CONFIDENCE))),
)


def page(runs: list[Run]) -> str:
    """The page as text. Several runs are told apart by colour and marker, the lines of one plot by their dashes."""
    title = runs[0].name if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    charts = "".join(filter(None, (_figure(plot, runs) for plot in PLOTS)))
    commands = "".join(
        f"<h3>{escape(run.name)}</h3><pre>{escape(str(run.parameters.get(COMMAND, 'not recorded')))}</pre>"
        for run in runs
    )
    options = {run.name: _options(run) for run in runs}
    return (
        f'{BEGINNING}<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"{_table({run.name: _summary(run) for run in runs})}<h2>Curves</h2>"
        f'<div class="charts">{charts}</div><h2>Commands</h2>{commands}'
        f"<h2>Machine and versions</h2>{_table({run.name: _machine(run) for run in runs}, mark=True)}"
        f"<h2>Configuration</h2>{_table(options, mark=True)}</body></html>\n"
    )


def _figure(plot: Plot, runs: list[Run]) -> str:
    series = []
    for i, run in enumerate(runs):
        for j, (label, points_of) in enumerate(plot.lines.items()):
            if not (points := points_of(run)):
                continue
            number_of = i if len(runs) > 1 else j
            names = [run.name] * (len(runs) > 1) + [label] * (len(runs) == 1 or len(plot.lines) > 1)
            look = COLOURS[number_of % len(COLOURS)], DASHES[j % len(DASHES)], MARKERS[number_of % len(MARKERS)]
            series.append(Series(", ".join(names), points, *look))
    return chart(plot.title, plot.unit, "epoch", series) if series else ""


def _summary(run: Run) -> dict[str, str]:
    def of(key: str) -> list[float]:
        return [line[key] for line in run.epochs if line.get(key) is not None]

    facts = {"epochs done": f"{len(run.epochs)} of {run.parameters.get('epochs', 'unknown')}"}
    if accuracy := of("test_acc1"):
        facts |= {"best top-1": f"{max(accuracy):.2f} %", "last top-1": f"{accuracy[-1]:.2f} %"}
    if loss := of("test_loss"):
        facts["last held-out loss"] = f"{loss[-1]:.4f}"
    if speed := sorted(of("img_per_s")):
        facts["images a second"] = f"{number(speed[len(speed) // 2])} (median)"
    if parameters := of("n_parameters"):
        facts["parameters"] = f"{parameters[-1]:,}"
    facts["skipped steps"] = f"{sum(of('skipped_steps')):,}"
    hours, rest = divmod(round(run.seconds), 3600)
    again = f", in {run.starts} starts" if run.starts > 1 else ""
    facts["wall time"] = f"{hours} h {rest // 60:02} min {rest % 60:02} s{again}" if run.starts else "not recorded"
    return facts


def _machine(run: Run) -> dict[str, str]:
    return {name: str(value) for name, value in dict(run.parameters.get(ENVIRONMENT) or {}).items()}


def _options(run: Run) -> dict[str, str]:
    """The options that have a value; the versions are among the facts of the machine, too."""
    others = (ENVIRONMENT, COMMAND, "torch", "timm")
    return {name: str(value) for name, value in run.parameters.items() if name not in others and value is not None}


def _table(columns: dict[str, dict[str, str]], mark: bool = False) -> str:
    """Facts by their names, a column for each run; with `mark`, rows in which runs differ come first, in colour."""
    names = dict.fromkeys(name for facts in columns.values() for name in facts)
    if not names:
        return "<p>not recorded</p>"
    rows = {name: [facts.get(name, "") for facts in columns.values()] for name in names}
    differing = [name for name in rows if mark and len(set(rows[name])) > 1]
    head = "<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = [f"<tr>{head}</tr>"] if len(columns) > 1 else []
    for name in sorted(rows, key=lambda name: name not in differing):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rows[name])
        body.append(f"<tr{' class=differs' if name in differing else ''}><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(body)}</table></div>'


def check_target(path: Path) -> None:
    """Raise UserError for a file that a page would overwrite and that is not such a page."""
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(BEGINNING.encode())):
        raise UserError(f"a report needs a new file or an earlier report, {path} is something else; move it away")


def write(path: Path, runs: list[Run]) -> None:
    """Put the page of the runs into `path`, as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(page(runs), encoding="utf-8")


def _names(directories: list[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell the runs apart."""
    paths = [directory.resolve() for directory in directories]
    if len(set(paths)) < len(paths):
        raise UserError("RUN must be given once for each run, got one twice; drop it")
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{' '.join(message.split())}; see --help")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 the user must change something."""
    parser = _Parser(prog="training.report", description="One page with the curves and settings of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the page, such as report.html")
    try:
        options = parser.parse_args(argv)
        check_target(options.out)
        names = _names(options.runs)
        write(options.out, [read_run(directory, name) for directory, name in zip(options.runs, names)])
    except (UserError, OSError) as error:
        print(f"training.report: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_MISTAKE
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
