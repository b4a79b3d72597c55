"""Every figure is drawn from what real, tiny runs have measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from main import main
from oscillation_log import Measure, append, read, start
from reproduction.figures import FIGURES, methods_figure

TINY = ["--model", "deit_micro_patch4_32", "--input-size", "8", "--epochs", "2", "--batch-size", "718"]
TINY += ["--device", "cpu", "--warmup-epochs", "0", "--num-workers", "0", "--track-oscillation"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[Path]]:
    """Two labels, of which one has a second seed: the first with other numbers."""
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for label, quant in (("full precision", "none"), ("TetraJet", "mxfp4")):
        assert main([*TINY, "--quant", quant, "--output-dir", str(root / quant)]) == 0
        found[label] = [root / quant / "oscillation.csv"]
    second = root / "second.csv"
    start(second, 0)
    append(second, [row._replace(value=1.1 * row.value) for row in read(found["TetraJet"][0])])
    found["TetraJet"].append(second)
    return found


@pytest.mark.parametrize("name", FIGURES)
def test_is_drawn_from_real_runs(name, runs, tmp_path):
    png = tmp_path / f"{name}.png"
    FIGURES[name](runs, png)
    assert png.stat().st_size < 200_000
    with Image.open(png) as image:
        assert image.format == "PNG" and round(image.info["dpi"][0]) == 150
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == 255).all(axis=1).mean() < 0.99  # not an empty page
    blue_or_orange = (pixels.max(axis=1).astype(int) - pixels.min(axis=1)) > 60
    assert blue_or_orange.sum() > 200  # there are coloured lines on it


@pytest.mark.parametrize("name", FIGURES)
def test_shows_what_is_in_the_file(name, runs, tmp_path):
    """Another last epoch, another picture; the same file, the same picture."""
    for file in ("once", "again"):
        FIGURES[name](runs, tmp_path / f"{file}.png")
    changed = {label: [] for label in runs}
    for label, paths in runs.items():
        for seed, path in enumerate(paths):
            copy = tmp_path / f"{label}-{seed}.csv"
            start(copy, 0)
            append(copy, [r._replace(value=r.value * (0.5 + (r.x or 0) ** 2)) for r in read(path)])
            changed[label].append(copy)
    FIGURES[name](changed, tmp_path / "other.png")
    once, again, other = ((tmp_path / f"{n}.png").read_bytes() for n in ("once", "again", "other"))
    assert once == again != other


@pytest.mark.parametrize(
    "name, missing", [("fig2", "rate_q2"), ("fig3", "trajectory_latent"), ("fig4", "latent_histogram"),
                      ("fig5", "confidence_histogram"), ("fig6", "oscillating")]
)  # fmt: skip
def test_says_what_is_missing(name, missing, runs, tmp_path):
    only = {"full precision": runs["full precision"]}
    with pytest.raises(ValueError, match=f"needs rows of '{missing}', found none for full precision; .* has Q2"):
        FIGURES[name](only, tmp_path / "a.png")
    with pytest.raises(ValueError, match="'TetraJet' has none"):
        FIGURES[name]({"TetraJet": []}, tmp_path / "a.png")
    empty = tmp_path / "oscillation.csv"
    start(empty, 0)
    with pytest.raises(ValueError, match="needs rows of .*, found none for TetraJet; run main.py with --track-osc"):
        FIGURES[name]({"TetraJet": [empty]}, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_run_without_trajectories_leaves_its_line_out(runs, tmp_path):
    short = tmp_path / "short.csv"
    start(short, 0)
    kept = (Measure.RATE_WEIGHT, Measure.RATE_OUTPUT)
    append(short, [row for row in read(runs["TetraJet"][0]) if row.measure in kept])
    FIGURES["fig3"]({"short": [short], "TetraJet": runs["TetraJet"]}, tmp_path / "with.png")
    FIGURES["fig3"]({"TetraJet": runs["TetraJet"]}, tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()


def test_methods_one_panel_a_model(tmp_path):
    one = {"full precision": [70.0, 71.0, 69.5], "Microscaling": [66.0]}
    for name, panels in (("a", {"T": one}), ("b", {"T": one, "S": one}), ("c", {"T": one | {"Microscaling": [67.0]}})):
        methods_figure(panels, tmp_path / f"{name}.png")
    sizes = [Image.open(tmp_path / f"{name}.png").size for name in "abc"]
    assert sizes[0] == sizes[2] and sizes[1][1] > sizes[0][1]
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()
