"""Every figure is drawn from what real, tiny runs have measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from main import main
from reproduction import figures
from reproduction.figures import FIGURES, methods_figure
from tracking.oscillation_csv import Measure, Row, append, read, start

TRAJECTORY = (Measure.TRAJECTORY_LATENT, Measure.TRAJECTORY_QUANTIZED)
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


class TestWhatIsDrawn:
    """Against files of a few rows, whose numbers are chosen here."""

    @pytest.fixture
    def drawn(self, monkeypatch, tmp_path):
        """drawn(name, label=[rows of a seed, ...], ...): the axes of the figure. A row is (epoch, measure, ...)."""
        found = []
        monkeypatch.setattr(figures, "_save", lambda fig, png, title: found.append(fig.axes))

        def draw(name: str, **runs: list[list[tuple]]) -> list:
            files = {}
            for label, seeds in runs.items():
                files[label] = [tmp_path / f"{label}-{seed}.csv" for seed in range(len(seeds))]
                for path, rows in zip(files[label], seeds):
                    start(path, 0)
                    append(path, [Row(epoch, 5 * epoch + 5, 3, *rest) for epoch, *rest in rows])
            FIGURES[name](files, tmp_path / f"{name}.png")
            return found[-1]

        return draw

    @staticmethod
    def lines(ax) -> dict[str, list]:
        return {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}

    def test_means_of_the_seeds_in_percent_from_the_least_to_the_greatest(self, drawn):
        def rows(*shares: float) -> list[tuple]:
            of_all = [(epoch, Measure.OSCILLATING, "all", None, share) for epoch, share in enumerate(shares)]
            return [*of_all, (0, Measure.OSCILLATING, "blocks.0.attn.qkv", None, 0.9)]

        (ax,) = drawn("fig6", two=[rows(0.125, 0.25), rows(0.25, 0.5)], one=[rows(0.75)])
        assert self.lines(ax) == {"two": [[1, 18.75], [2, 37.5]], "one": [[1, 75]]}
        (band,) = ax.collections
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
        assert corners == {(1, 12.5), (1, 25), (2, 25), (2, 50)}

    def test_a_panel_for_each_rate(self, drawn):
        measures = (Measure.RATE_WEIGHT, "all"), (Measure.RATE_QUANTIZED, "all"), (Measure.RATE_OUTPUT, "blocks.1")
        rows = [(0, *measure, None, 2.0**-i) for i, measure in enumerate(measures)]
        rows += [(0, measure, "blocks.0.mlp.fc1", None, 9.0) for measure, _ in measures[:2]]
        panels = drawn("fig2", a=[rows])
        assert [self.lines(ax)["a"] for ax in panels] == [[[1, 1]], [[1, 0.5]], [[1, 0.25]]]
        assert [ax.get_title() for ax in panels] == ["weights W", "quantized weights Q2(W)", "output Y of blocks.1"]

    def test_distributions_after_a_third_of_the_epochs_and_after_the_last(self, drawn):
        def rows(*shares: float) -> list[tuple]:
            both = (Measure.LATENT_HISTOGRAM, Measure.CONFIDENCE_HISTOGRAM)
            bins = [(epoch, m, "all", x / 2, s / (epoch + 1)) for epoch in range(6) for m in both
                    for x, s in enumerate(shares)]  # fmt: skip
            return [*bins, *((epoch, Measure.CONFIDENCE, "all", None, shares[1]) for epoch in range(6))]

        seeds = [[*rows(0.25, 0.75), (5, Measure.CONFIDENCE, "blocks.0.mlp.fc1", None, 9.0)], rows(0.75, 0.25)]
        panels = drawn("fig4", a=seeds)
        assert [ax.get_title() for ax in panels] == ["epoch 2", "epoch 2", "epoch 6", "epoch 6"]
        for ax, epoch in zip(panels, (2, 2, 6, 6)):
            outline = ax.patches[0].get_data()
            assert outline.values == pytest.approx([50 / epoch] * 2) and outline.edges.tolist() == [0, 0.5, 1]
        (ax,) = drawn("fig5", a=seeds)
        assert ax.patches[0].get_label() == "a, mean 0.500"
        assert ax.patches[0].get_data().values == pytest.approx([50 / 6] * 2)

    def test_trajectories_of_the_last_epoch(self, drawn):
        def rows(epoch: int, ratio: float, where: str, latent: list[float], quantized: list[float]) -> list[tuple]:
            found = [(epoch, Measure.RATIO, where, None, ratio)]
            for x, pair in enumerate(zip(latent, quantized)):
                found += [(epoch, m, where, x, v) for m, v in zip(TRAJECTORY, pair)]
            return found

        last = rows(1, 40.0, "b[0][1]", [0.25, 0.75, 0.5], [0.5, 1, 0.5])
        (ax,) = drawn("fig3", a=[rows(0, 90.0, "a[0][0]", [5], [6]) + last])
        assert ax.get_title() == "b[0][1]\n$R_w$ = 40"
        latent, quantized = (self.lines(ax)[label] for label in ("latent, w/S", "quantized, Q2(w)/S"))
        assert latent == [[0, 0.25], [1, 0.75], [2, 0.5]] and quantized == [[0, 0.5], [1, 1], [2, 0.5]]

    def test_methods_have_their_seeds_and_mean(self, monkeypatch, tmp_path):
        found = []
        monkeypatch.setattr(figures, "_save", lambda fig, png, title: found.append(fig.axes))
        methods_figure({"T": {"A": [70.0, 72.0], "B": [66.5]}}, tmp_path / "a.png")
        ((ax,),) = found
        assert self.lines(ax) == {"one seed": [[70, 0], [72, 0], [66.5, 1]], "mean": [[71, 0], [66.5, 1]]}
        assert [text.get_text() for text in ax.texts] == ["71.00, n = 2", "66.50, n = 1"]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["A", "B"]
