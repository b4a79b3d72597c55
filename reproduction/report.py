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
    """`out`/NAME.md for each of `names` and `out`/results.md with every target; figures that have their runs."""
    found = existing(out)
    texts = {name: describe(name, target, protocol, found, out) for name, target in TARGETS.items()}
    head = f"# Results: `--protocol {protocol_name}`\n\n{protocol.description}. {HOW}\n\n"
    reports = {out / f"{name}.md": texts[name] for name in names} | {out / "results.md": "\n".join(texts.values())}
    for path, text in reports.items():
        path.write_text(head + text, encoding="utf-8")
    return list(reports)


def describe(name: str, target: Target, protocol: Protocol, found: Existing, out: Path) -> str:
    """One target's section: a table for each model, or the figure, which is drawn; commands; where the runs ran."""
    parts = [f"## {target.title}"] + [target.note] * bool(target.note)
    missing = [model for model in target.models if model not in protocol.setups]
    if missing:
        parts.append(f"Not in this protocol: {', '.join(missing)}.")
    commands, environments = [], Counter()
    for model, setup in columns(target, protocol).items():
        runs = {row.label: run_of(target, row, setup, protocol) for row in target.rows}
        directories = {label: found.directories(run) for label, run in runs.items()}
        parts.append(f"### {setup.model}" + (f" (the paper: {model})" if target.metrics else ""))
        if target.metrics:
            started = {label for label, run in runs.items() if found.started(run)}
            parts.append(table(target, model, directories, started))
        else:
            parts.append(figure(name, target, directories, out))
        commands += [f"- {label}: `{_command(run, directories[label])}`" for label, run in runs.items()]
        for place in {place for places in directories.values() for place in places.values()}:
            environments.update(tuple(e.items()) for e in read_record(place)["environments"])
    commands = "\n".join(commands)
    parts.append(f"<details><summary>Commands</summary>\n\n{commands}\n\n</details>")
    ran = (f"- {count} runs: {', '.join(f'{k} {v}' for k, v in e)}" for e, count in environments.most_common())
    parts.append("Where they ran:\n\n" + ("\n".join(ran) or "- nothing has run"))
    return "\n\n".join(parts) + "\n"


def figure(name: str, target: Target, directories: dict[str, dict[int, Path]], out: Path) -> str:
    """Draws `out`/NAME.png if every curve has a run; returns how it stands in the report."""
    missing = [label for label, places in directories.items() if not places]
    if missing:
        return f"Not run: {', '.join(missing)}."
    from reproduction.figures import FIGURES  # matplotlib takes a second, which tables do without

    curves = {label: [place / OSCILLATION for place in places.values()] for label, places in directories.items()}
    FIGURES[name](curves, out / f"{name}.png")
    seeds = ", ".join(f"{label}: n = {len(paths)}" for label, paths in curves.items())
    return f"![{target.title}]({name}.png)\n\n{seeds}."


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
