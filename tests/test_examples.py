"""The example runs from start to end, in a shortened form."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).resolve().parent.parent / "examples/first_hour.py")


def test_the_first_hour(tmp_path, capsys):
    """Nearest rounding keeps 6 and rounds 1.2 to 1 and 2.6 to 3; the figure is a PNG."""
    figure = tmp_path / "figure.png"
    runpy.run_path(SCRIPT)["main"](["--steps", "4", "--figure", str(figure)])
    printed = capsys.readouterr().out
    assert "nearest    scale 1: [0.0, -0.5, 1.0, 3.0, 6.0]" in printed
    assert "8 of 9 linears quantized" in printed and "in the last 4 steps" in printed
    assert float(re.search(r"R_w = ([\d.]+)", printed)[1]) > 0
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_mistake_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(SCRIPT)["main"](["--steps", "0"])
    assert stopped.value.code == 2 and "--steps must be at least 1, got 0" in capsys.readouterr().err
