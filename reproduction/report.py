"""The paper's numbers next to ours, in Markdown, from the runs that a directory holds."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

import oscillation_log
from oscillation_log import ALL, Measure
from reproduction.protocols import Protocol
from reproduction.runs import OSCILLATION, Existing, Run, columns, existing, read_log, read_record, run_of, shell
from reproduction.targets import TARGETS, Metric, Target

HOW = (
    "Accuracies are those of the last epoch on the held-out images, not the best epoch's, which would be chosen by "
    "those images. Ours: mean +- sample standard deviation over n seeds. Differences of ours are taken seed by seed, "
    'over the seeds that both rows have. "-": no number in the paper.'
)


def read_metric(metric: Metric, directory: Path) -> float:
    """From a finished run, which has tracked oscillation if the metric is a rate."""
    if metric.is_accuracy:
        return read_log(directory)[-1]["test_acc1" if metric is Metric.TOP1 else "test_acc5"]
    measure = Measure.RATE_QUANTIZED if metric is Metric.RATE_QW else Measure.RATE_OUTPUT
    rows = [row for row in oscillation_log.read(directory / OSCILLATION) if row.measure is measure]
    # The output is measured at one block, weights in every linear and in all of them.
    return next(row.value for row in reversed(rows) if measure is Measure.RATE_OUTPUT or row.where == ALL)


def write_reports(names: list[str], protocol_name: str, protocol: Protocol, out: Path) -> list[Path]:
    """`out`/NAME.md for each of `names`, the figures among them drawn, and `out`/results.md with every target."""
    found = existing(out)
    texts = {}
    for name, target in TARGETS.items():
        if name in names and not target.metrics:
            draw(name, target, protocol, found, out)
        texts[name] = describe(name, target, protocol, found, out)
    head = f"# Results: `--protocol {protocol_name}`\n\n{protocol.description}. {HOW}"
    written = []
    for name in names:
        written.append(out / f"{name}.md")
        written[-1].write_text(f"{head}\n\n{texts[name]}", encoding="utf-8")
    written.append(out / "results.md")
    written[-1].write_text("\n".join((f"{head}\n", *texts.values())), encoding="utf-8")
    return written


def draw(name: str, target: Target, protocol: Protocol, found: Existing, out: Path) -> None:
    """`out`/NAME.png, if every curve has a run."""
    curves = _curves(target, protocol, found)
    if all(curves.values()):
        from reproduction.figures import FIGURES  # matplotlib takes a second, and tables do without

        FIGURES[name](curves, out / f"{name}.png")


def _curves(target: Target, protocol: Protocol, found: Existing) -> dict[str, list[Path]]:
    setup = next(iter(columns(target, protocol).values()))
    runs = {row.label: run_of(target, row, setup, protocol) for row in target.rows}
    return {label: [d / OSCILLATION for d in found.directories(run).values()] for label, run in runs.items()}


def describe(name: str, target: Target, protocol: Protocol, found: Existing, out: Path) -> str:
    """One target's section: a table for each model, or the figure; commands; where the runs ran."""
    parts = [f"## {target.title}"] + [target.note] * bool(target.note)
    shown = columns(target, protocol)
    missing = [model for model in target.models if model not in protocol.setups]
    if missing:
        parts.append(f"Not in this protocol: {', '.join(missing)}.")
    commands, environments = [], Counter()
    for model, setup in shown.items():
        runs = {row.label: run_of(target, row, setup, protocol) for row in target.rows}
        directories = {label: found.directories(run) for label, run in runs.items()}
        parts.append(f"### {setup.model}" + (f" (the paper: {model})" if target.metrics else ""))
        if target.metrics:
            parts.append(
                table(target, model, directories, {label for label, run in runs.items() if found.started(run)})
            )
        elif all(directories.values()):
            seeds = ", ".join(f"{label}: n = {len(places)}" for label, places in directories.items())
            parts.append(f"![{target.title}]({name}.png)\n\n{seeds}.")
        else:
            parts.append("Not run: " + ", ".join(label for label, places in directories.items() if not places) + ".")
        for label, run in runs.items():
            commands.append(f"- {label}: `{_command(run, directories[label])}`")
        for place in {place for places in directories.values() for place in places.values()}:
            environments.update("; ".join(f"{k} {v}" for k, v in e.items()) for e in read_record(place)["environments"])
    parts.append("Commands, of the first seed:\n\n" + "\n".join(commands))
    ran = "\n".join(f"- {count} runs: {text}" for text, count in environments.most_common()) or "- nothing has run"
    parts.append(f"Where they ran:\n\n{ran}")
    return "\n\n".join(parts) + "\n"


def _command(run: Run, directories: dict[int, Path]) -> str:
    """As it was, or as it would be on one GPU."""
    return read_record(next(iter(directories.values())))["command"] if directories else shell(run.command())


def table(target: Target, model: str, directories: dict[str, dict[int, Path]], started: set[str]) -> str:
    """For each metric: the paper's number, ours, and how far each is from the reference row's."""
    lines = {row.label: [row.label] for row in target.rows}
    heads = ["row"]
    papers = {row.label: row.paper.get(model) for row in target.rows}
    for index, metric in enumerate(target.metrics):
        digits = 2 if metric.is_accuracy else 4
        ours = {
            label: {seed: read_metric(metric, place) for seed, place in places.items()}
            for label, places in directories.items()
        }
        heads += [f"{metric.value}: paper", "to reference", "ours", "to reference"]
        for label, cells in lines.items():
            number, reference = papers[label], papers[target.reference]
            is_reference = label == target.reference
            cells.append("-" if number is None else f"{number[index]:.{digits}f}")
            compared = number is not None and reference is not None and not is_reference
            cells.append(f"{number[index] - reference[index]:+.{digits}f}" if compared else "")
            missing = "not finished" if label in started else "not run"
            cells.append(spread(list(ours[label].values()), f".{digits}f") if ours[label] else missing)
            common = sorted(ours[label].keys() & ours[target.reference].keys())
            differences = [ours[label][seed] - ours[target.reference][seed] for seed in common]
            cells.append(spread(differences, f"+.{digits}f") if differences and not is_reference else "")
    rows = [heads, ["---"] * len(heads), *lines.values()]
    return f"Reference: {target.reference}.\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(numbers: list[float], form: str) -> str:
    """Mean, sample standard deviation where there are two numbers or more, and how many there are."""
    text = format(statistics.fmean(numbers), form)
    if len(numbers) > 1:
        text += f" +- {format(statistics.stdev(numbers), form.removeprefix('+'))}"
    return f"{text} (n = {len(numbers)})"
