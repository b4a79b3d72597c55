"""Line charts as SVG text, for a page that needs no script and no other file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#000000")
"""Colours of Okabe and Ito, which colour-blind people can tell apart; the yellow is darker, for contrast on white."""
DASHES = ("", "7 4", "2 3", "9 3 2 3")
MARKERS = ("circle", "square", "diamond", "triangle")
WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 44


@dataclass(frozen=True)
class Series:
    label: str
    points: list[tuple[float, float | None]]
    """(x, y); a y of None leaves a gap."""
    colour: str
    dash: str = ""
    marker: str = "circle"


def chart(title: str, unit: str, x_label: str, series: list[Series]) -> str:
    """A figure with its title, the unit of its y axis, its legend and the lines. Without a number it says so."""
    values = [(x, y) for line in series for x, y in line.points if y is not None]
    head = f"<figcaption><b>{escape(title)}</b> <span>{escape(unit)}</span></figcaption>"
    if not values:
        return f"<figure>{head}<p>no numbers</p></figure>"
    x_ticks, y_ticks = ticks([x for x, _ in values], whole=True), ticks([y for _, y in values])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for y in y_ticks:
        _, v = place(x_ticks[0], y)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v:.1f}" y2="{v:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        u, _ = place(x, y_ticks[0])
        parts.append(f'<text x="{u:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(x)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    for line in series:
        parts += _drawn(line, place)
    label = escape(f"{title}, {unit}", quote=True)
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure>{head}{legend(series)}{drawing}</figure>"


def legend(series: list[Series]) -> str:
    entries = []
    for line in series:
        stroke = f'stroke="{line.colour}" stroke-dasharray="{line.dash}"'
        sample = f'<svg viewBox="0 0 34 12" class="sample"><line x1="0" x2="34" y1="6" y2="6" {stroke}/>'
        entries.append(f"<li>{sample}{_marker(line, 17, 6)}</svg>{escape(line.label)}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _drawn(line: Series, place) -> list[str]:
    """The line in pieces, between its gaps, and a marker at each point, or at 12 of many."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in line.points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(place(x, y))
    drawn = []
    for piece in pieces:
        path = " ".join(f"{u:.1f},{v:.1f}" for u, v in piece)
        drawn.append(f'<polyline points="{path}" stroke="{line.colour}" stroke-dasharray="{line.dash}"/>')
        every = max(1, math.ceil(len(piece) / 12))
        drawn += [_marker(line, u, v) for u, v in piece[::-1][::every]]
    return drawn


def _marker(line: Series, u: float, v: float) -> str:
    fill = f'fill="{line.colour}"'
    if line.marker == "circle":
        return f'<circle cx="{u:.1f}" cy="{v:.1f}" r="3.2" {fill}/>'
    shapes = {
        "square": [(-3, -3), (3, -3), (3, 3), (-3, 3)],
        "diamond": [(0, -4.2), (4.2, 0), (0, 4.2), (-4.2, 0)],
        "triangle": [(0, -4), (4, 3.2), (-4, 3.2)],
    }
    corners = " ".join(f"{u + du:.1f},{v + dv:.1f}" for du, dv in shapes[line.marker])
    return f'<polygon points="{corners}" {fill}/>'


def ticks(values: list[float], whole: bool = False) -> list[float]:
    """At least two round numbers, evenly spaced, that enclose the values; `whole` for numbers of epochs."""
    low, high = min(values), max(values)
    if low == high:
        pad = 1.0 if whole or low == 0 else abs(low) / 2
        low, high = (low, high + pad) if low == 0 or whole else (low - pad, high + pad)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """Up to four significant digits; thousands have separators, and small numbers a power of ten."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"
