"""The paper's figures 2 to 6, each from the oscillation.csv of labelled runs (`main.py --track-oscillation`), and one
of all methods' accuracies.

A label stands for one method and has one file for each of its seeds. Lines over epochs are means over the seeds, in a
band from the least to the greatest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from quantization.measures.oscillation import OSCILLATION_THRESHOLD
from reproduction.metrics import read_oscillation
from tracking.oscillation_csv import ALL, Measure, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = dict[str, list[Path]]

# Okabe and Ito's palette for all kinds of colour vision, yellow left out: it is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))
DPI = 150
RATES = {Measure.RATE_WEIGHT: "weights W", Measure.RATE_QUANTIZED: "quantized weights Q2(W)"}


def figure_2(runs: Runs, png: Path) -> None:
    """Rate of change of W, Q2(W) and a block's output over the epochs."""
    tables = _read(runs)
    block = _need(tables, Measure.RATE_OUTPUT)[0].where
    measures = {**RATES, Measure.RATE_OUTPUT: f"output Y of {block}"}
    fig, axes = _subplots(1, 3, width=10)
    for ax, (measure, name) in zip(axes, measures.items()):
        _need(tables, measure)
        _lines_over_epochs(ax, tables, measure, ALL if measure in RATES else None)
        ax.set(title=name, yscale="log")
    axes[0].set_ylabel("rate of change a step, r (relative)")
    _legend_below(fig, axes[0])
    _save(fig, png, "How much weights, quantized weights and outputs still change")


def figure_3(runs: Runs, png: Path) -> None:
    """Trajectories of the most oscillating weights in the last epoch, of each label's first seed."""
    tables = {label: seeds[:1] for label, seeds in _read(runs).items()}
    _need(tables, Measure.TRAJECTORY_LATENT)
    drawn = {label: _trajectories(rows[0]) for label, rows in tables.items()}
    drawn = {label: weights for label, weights in drawn.items() if weights}
    columns = max(len(weights) for weights in drawn.values())
    fig, axes = _subplots(len(drawn), columns, width=2.9 * columns)
    axes = np.reshape(axes, (len(drawn), columns))
    for line, (label, weights) in zip(axes, drawn.items()):
        line[0].set_ylabel(f"{label}\nvalue on the grid, w/S")
        for ax in line[len(weights) :]:
            ax.set_axis_off()
        for ax, (where, ratio, latent, quantized) in zip(line, weights):
            ax.step(range(len(quantized)), quantized, COLOURS[1], where="mid", lw=1.2, label="quantized, Q2(w)/S")
            ax.plot(latent, COLOURS[0], marker=".", ms=4, lw=1.2, label="latent, w/S")
            ax.set_title(f"{where}\n$R_w$ = {ratio:.0f}", fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("step within the window")
    _legend_below(fig, axes[0, 0])
    _save(fig, png, "Latent weights hardly move, quantized weights jump: the largest oscillation ratios")


def figure_4(runs: Runs, png: Path) -> None:
    """Distributions of latent weights and of confidence, a third of the way through and at the end."""
    tables = _read(runs)
    measures = {
        Measure.LATENT_HISTOGRAM: "latent weight, w/S",
        Measure.CONFIDENCE_HISTOGRAM: "quantization confidence",
    }
    for measure in measures:
        _need(tables, measure)
    last = max(row.epoch for row in _need(tables, Measure.LATENT_HISTOGRAM))
    epochs = sorted({(last + 1) // 3 - 1 if last > 1 else 0, last})
    fig, axes = _subplots(len(epochs), 2, width=9)
    for line, epoch in zip(np.reshape(axes, (len(epochs), 2)), epochs):
        for ax, (measure, name) in zip(line, measures.items()):
            _histograms(ax, tables, measure, epoch)
            ax.set(title=f"epoch {epoch + 1}", xlabel=name)
        line[0].set_ylabel("weights in a bin, %")
    _legend_below(fig, np.ravel(axes)[0])
    _save(fig, png, "Where weights lie on the quantizer's grid, and how far from its thresholds")


def figure_5(runs: Runs, png: Path) -> None:
    """Confidence in the last epoch, by method."""
    tables = _read(runs)
    last = max(row.epoch for row in _need(tables, Measure.CONFIDENCE_HISTOGRAM))
    fig, ax = _subplots(1, 1, width=6.5)
    _histograms(ax, tables, Measure.CONFIDENCE_HISTOGRAM, last, Measure.CONFIDENCE)
    ax.set(xlabel="quantization confidence (0: on a threshold, 1: farthest from one)", ylabel="weights in a bin, %")
    _legend_below(fig, ax)
    _save(fig, png, f"Quantization confidence after epoch {last + 1}")


def figure_6(runs: Runs, png: Path) -> None:
    """Share of oscillating weights by epoch and method."""
    tables = _read(runs)
    _need(tables, Measure.OSCILLATING)
    fig, ax = _subplots(1, 1, width=6.5)
    _lines_over_epochs(ax, tables, Measure.OSCILLATING, ALL, percent=True)
    ax.set_ylabel(f"weights with $R_w$ > {OSCILLATION_THRESHOLD}, %")
    ax.set_ylim(bottom=0)
    _legend_below(fig, ax)
    _save(fig, png, "Share of weights that oscillate")


def methods_figure(accuracies: dict[str, dict[str, list[float]]], png: Path) -> None:
    """Top-1 of every method, one panel a model: `accuracies` are its seeds' by panel and method."""
    most = max(len(by_method) for by_method in accuracies.values())
    fig, axes = _subplots(len(accuracies), 1, width=7.5, height=0.6 + 0.3 * most)
    for ax, (title, by_method) in zip(np.ravel(axes), accuracies.items()):
        lines = range(len(by_method))
        means = [np.mean(values) for values in by_method.values()]
        seeds = [(value, y) for y, values in zip(lines, by_method.values()) for value in values]
        ax.plot(*zip(*seeds), "o", color=COLOURS[0], ms=5, alpha=0.6, mew=0, label="one seed")
        ax.plot(means, lines, "|", color=COLOURS[1], ms=14, mew=2, label="mean")
        for y, (mean, values) in enumerate(zip(means, by_method.values())):
            text = f"{mean:.2f}, n = {len(values)}"
            ax.text(1.01, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
        ax.set_yticks(lines, by_method)
        ax.set_ylim(len(by_method) - 0.5, -0.5)
        ax.set(title=title, xlabel="top-1 after the last epoch, %")
    _legend_below(fig, np.ravel(axes)[0])
    _save(fig, png, "Held-out accuracy, method by method")


FIGURES: dict[str, Callable[[Runs, Path], None]] = {
    "fig2": figure_2,
    "fig3": figure_3,
    "fig4": figure_4,
    "fig5": figure_5,
    "fig6": figure_6,
}
"""Each draws one PNG from labelled oscillation.csv files, and raises ValueError if none of them has what it shows."""

Tables = dict[str, list[list[Row]]]


def _read(runs: Runs) -> Tables:
    """Rows by label and seed. Raises ValueError for a label without a file."""
    for label, paths in runs.items():
        if not paths:
            raise ValueError(f"every label needs the oscillation.csv of at least one run, {label!r} has none")
    return {label: [read_oscillation(path) for path in paths] for label, paths in runs.items()}


def _need(tables: Tables, measure: Measure) -> list[Row]:
    """The rows of `measure`, of which there must be some."""
    found = [row for seeds in tables.values() for rows in seeds for row in rows if row.measure is measure]
    if not found:
        raise ValueError(
            f"this figure needs rows of {measure.value!r}, found none for {', '.join(tables) or 'any label'}; "
            "run main.py with --track-oscillation" + ("" if measure in _OF_ANY_RUN else " and a --quant that has Q2")
        )
    return found


_OF_ANY_RUN = (Measure.RATE_WEIGHT, Measure.RATE_OUTPUT)


def _lines_over_epochs(ax: Axes, tables: Tables, measure: Measure, where: str | None, percent: bool = False) -> None:
    """Mean over the seeds, with a band from the least to the greatest. A label has one style in all panels."""
    for index, (label, seeds) in enumerate(tables.items()):
        by_epoch = defaultdict(list)
        for rows in seeds:
            for row in rows:
                if row.measure is measure and where in (None, row.where):
                    by_epoch[row.epoch + 1].append(row.value * (100 if percent else 1))
        epochs = sorted(by_epoch)
        if not epochs:
            continue
        colour = COLOURS[index % len(COLOURS)]
        marker = "o" if len(epochs) < 15 else None
        means = [np.mean(by_epoch[epoch]) for epoch in epochs]
        ax.plot(epochs, means, color=colour, ls=LINES[index % len(LINES)], marker=marker, ms=3, label=label)
        if any(len(values) > 1 for values in by_epoch.values()):
            low, high = ([pick(by_epoch[epoch]) for epoch in epochs] for pick in (min, max))
            ax.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
    ax.set_xlabel("epoch")
    ax.xaxis.get_major_locator().set_params(integer=True)


def _histograms(ax: Axes, tables: Tables, measure: Measure, epoch: int, mean: Measure | None = None) -> None:
    """Outlines, as means over the seeds; with `mean`, the label says its value too."""
    for index, (label, seeds) in enumerate(tables.items()):
        counts = defaultdict(list)
        for row in (row for rows in seeds for row in rows if row.measure is measure and row.epoch == epoch):
            counts[row.x].append(100 * row.value)
        if not counts:
            continue
        if mean is not None:
            values = [r.value for rows in seeds for r in rows if (r.measure, r.where, r.epoch) == (mean, ALL, epoch)]
            label += f", mean {np.mean(values):.3f}"
        low = np.array(sorted(counts))
        shares = np.array([np.mean(counts[x]) for x in low])
        filled = np.flatnonzero(shares)
        if not len(filled):  # weights that are not finite are in no bin
            continue
        low, shares = (part[filled[0] : filled[-1] + 1] for part in (low, shares))
        edges = np.append(low, 2 * low[-1] - low[-2] if len(low) > 1 else low[-1] + 1)
        style = {"color": COLOURS[index % len(COLOURS)], "ls": LINES[index % len(LINES)]}
        ax.stairs(shares, edges, lw=1.2, label=label, **style)
        ax.stairs(shares, edges, fill=True, color=style["color"], alpha=0.08)
    ax.set_ylim(bottom=0)


def _trajectories(rows: Sequence[Row]) -> list[tuple[str, float, list[float], list[float]]]:
    """(weight, R_w, latent, quantized) of the last epoch that has any."""
    last = max((row.epoch for row in rows if row.measure is Measure.RATIO), default=None)
    values = defaultdict(list)
    for row in rows:
        if row.epoch == last:
            values[row.where, row.measure].append(row.value)
    return [
        (where, ratio, values[where, Measure.TRAJECTORY_LATENT], values[where, Measure.TRAJECTORY_QUANTIZED])
        for (where, measure), (ratio, *_) in list(values.items())
        if measure is Measure.RATIO
    ]


def _subplots(rows: int, columns: int, width: float, height: float = 2.7) -> tuple[Figure, Axes | np.ndarray]:
    """`height` of a row. matplotlib is loaded here, so that whoever draws nothing does not need it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, 0.9 + height * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(rows, columns)
    for ax in np.ravel(axes):
        ax.grid(color="0.9", lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


def _legend_below(fig: Figure, ax: Axes) -> None:
    columns = int(fig.get_figwidth() / 2.4)
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3)


def _save(fig: Figure, png: Path, title: str) -> None:
    """Write the figure in a palette of 128 colours, which takes a third of the bytes of true colour."""
    fig.suptitle(title, fontsize=11)
    fig.canvas.draw()
    pixels = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB")
    pixels.quantize(128, dither=Image.Dither.NONE).save(png, optimize=True, dpi=(DPI, DPI))
