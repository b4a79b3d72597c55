"""The paper's numbers next to ours, in Markdown, from the runs that a directory holds."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

from reproduction.claims import CLAIMS, LEAST_GAP, RULE, gap, standard_error
from reproduction.metrics import read_metric
from reproduction.protocols import ModelSettings, Protocol
from reproduction.runs import Existing, Run, columns, existing, oscillation_file, read_record, run_of, shell
from reproduction.targets import TARGETS, Metric, Target

HOW = (
    "Accuracies are those of the last epoch on the held-out images, not the best epoch's, which would be chosen by "
    "those images. Ours: mean +- sample standard deviation over n seeds. Differences of ours are taken seed by seed, "
    'over the seeds that both rows have. "-": no number in the paper.'
)


def write_reports(names: list[str], protocol_name: str, protocol: Protocol, out: Path) -> list[Path]:
    """`out`/NAME.md for each of `names`, `out`/results.md with all claims and targets; figures that have their runs."""
    found = existing(out)
    texts = {name: describe(name, target, protocol, found, out) for name, target in TARGETS.items()}
    head = f"# Results: `--protocol {protocol_name}`\n\n{protocol.description}. {HOW}\n\n"
    everything = [methods(protocol, found, out), gaps(protocol, found), claims(protocol, found), *texts.values()]
    reports = {out / f"{name}.md": texts[name] for name in names} | {out / "results.md": "\n".join(everything)}
    for path, text in reports.items():
        path.write_text(head + text, encoding="utf-8")
    return list(reports)


def numbers(
    target: Target, label: str, metric: Metric, setup: ModelSettings, protocol: Protocol, found: Existing
) -> dict[int, float]:
    """A row's numbers by seed."""
    row = next(row for row in target.rows if row.label == label)
    places = found.directories(run_of(target, row, setup, protocol))
    return {seed: read_metric(metric, place) for seed, place in places.items()}


def methods(protocol: Protocol, found: Existing, out: Path) -> str:
    """Draws `out`/methods.png, the top-1 of every method of Tables 2 and 4, if two of them have runs."""
    accuracies = {}
    for model, setup in columns(TARGETS["table2"], protocol).items():
        shown = {}
        for target in (TARGETS["table2"], TARGETS["table4"]):
            for row in target.rows:
                by_seed = numbers(target, row.label, Metric.TOP1, setup, protocol, found)
                label = f"TetraJet {row.label}" if row.label.startswith("+") else row.label
                shown.setdefault(row.options, (label, list(by_seed.values())))
        shown = {label: values for label, values in shown.values() if values}
        if len(shown) > 1:
            accuracies[f"{setup.model} (the paper: {model})"] = shown
    if not accuracies:
        return "No two methods have run.\n"
    from reproduction.figures import methods_figure  # matplotlib takes a second, which tables do without

    methods_figure(accuracies, out / "methods.png")
    return "![Top-1 accuracy of every method, seed by seed](methods.png)\n"


def gaps(protocol: Protocol, found: Existing) -> str:
    """Says if the protocol can tell methods apart at all: full precision from Microscaling."""
    lines = []
    for model, setup in columns(TARGETS["table2"], protocol).items():
        ahead, behind = (
            list(numbers(TARGETS["table2"], label, Metric.TOP1, setup, protocol, found).values())
            for label in ("full precision", "Microscaling")
        )
        if min(len(ahead), len(behind)) < 2:
            text = "cannot be told, n < 2"
        else:
            difference, errors = gap(ahead, behind)
            text = f"{spread(ahead, '.2f')} against {spread(behind, '.2f')}, {difference:+.2f} points: "
            text += f"{errors:.1f} standard errors, {'enough' if errors >= LEAST_GAP else 'too few'}"
        lines.append(f"- {setup.model} (the paper: {model}): {text}")
    rule = (
        f"Full precision should be {LEAST_GAP} standard errors or more ahead of Microscaling: of the difference of "
        "their means, seeds not paired. Otherwise the protocol is no place to compare methods."
    )
    return f"## Can this protocol tell methods apart?\n\n{rule}\n\n" + "\n".join(lines) + "\n"


def claims(protocol: Protocol, found: Existing) -> str:
    """The paper's claims one by one, on every model that the protocol has for them."""
    heads = ["claim", "where", "of", "paper", "ours", "standard error", "verdict"]
    rows, verdicts = [heads, ["---"] * len(heads)], Counter()
    for claim in CLAIMS:
        target = TARGETS[claim.target]
        for model, setup in columns(target, protocol).items():
            ours = claim.ours(
                lambda label, metric, target=target, setup=setup: numbers(target, label, metric, setup, protocol, found)
            )
            form = f"+.{claim.metric.digits}f"
            paper = claim.paper(model)
            verdict = claim.verdict(ours)
            verdicts[verdict] += 1
            rows.append([claim.text, f"{target.title.partition(':')[0]}, {model}", claim.metric.value])
            rows[-1] += ["-" if paper is None else format(paper, form), spread(ours, form) if ours else ""]
            rows[-1] += [format(standard_error(ours), form[1:]) if len(ours) > 1 else "", verdict]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    counts = ", ".join(f"{verdict}: {count}" for verdict, count in sorted(verdicts.items()))
    return f"## The paper's claims\n\n{RULE}\n\n{lines}\n\n{counts}.\n"


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
        for place in sorted({place for places in directories.values() for place in places.values()}):
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

    curves = {label: [oscillation_file(place) for place in places.values()] for label, places in directories.items()}
    FIGURES[name](curves, out / f"{name}.png")
    seeds = ", ".join(f"{label}: n = {len(paths)}" for label, paths in curves.items())
    return f"![{target.title}]({name}.png)\n\n{seeds}."


def _command(run: Run, directories: dict[int, Path]) -> str:
    """The command of a finished run; without one, the command that would run it on one GPU."""
    return read_record(next(iter(directories.values())))["command"] if directories else shell(run.command())


def table(target: Target, model: str, directories: dict[str, dict[int, Path]], started: set[str]) -> str:
    """For each metric: the paper's number, ours, and how far each is from the reference row's."""
    lines = {row.label: [row.label] for row in target.rows}
    heads = ["row"]
    papers = {row.label: row.paper.get(model) for row in target.rows}
    for index, metric in enumerate(target.metrics):
        digits = metric.digits
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
