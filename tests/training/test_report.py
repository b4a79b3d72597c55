"""report.html: what it shows of a run whose files are written by hand, and one line for each mistake."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tracking.oscillation_csv import HEADER
from training.charts import COLOURS, HEIGHT, WIDTH, Series, chart, number, ticks
from training.report import check_target, main, page, read_run


class Checked(HTMLParser):
    """Collects text and attributes; every element that is opened must be closed in order."""

    ALONE = ("meta", "line", "polyline", "polygon", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.texts, self.attributes = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.ALONE:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


LINE = {"train_loss": 2.0, "test_loss": 1.0, "test_acc1": 50.0, "lr": 1e-3, "img_per_s": 100.0, "skipped_steps": 2}


def make_run(directory: Path, accuracies: list[float | None], **parameters: object) -> Path:
    """A run of two starts: the first logged an epoch after 10 seconds, the second the others within 65."""
    directory.mkdir()
    lines = [LINE | {"epoch": i, "test_acc1": value} for i, value in enumerate(accuracies)]
    (directory / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"quant": "mxfp4", "epochs": 3, "command": "python main.py --note '<b>'", "torch": "2.14"}
    start = {"step": "PARAMETER", "data": facts | {"environment": {"device": "a GPU", "commit": "abc"}} | parameters}
    entries = [(100.0, start), (110.0, {"step": [0], "data": lines[0]}), (500.0, start)]
    entries += [(565.0, {"step": [i], "data": line}) for i, line in enumerate(lines) if i]
    text = "".join(f"DLLL {json.dumps({'timestamp': str(time)} | entry)}\n" for time, entry in entries)
    (directory / "dllogger.json").write_text(text + 'DLLL {"timest')  # a killed run left a part of a line
    return directory


def rows(text: str) -> dict[str, list[str]]:
    """The cells of the tables' rows by their heads."""
    found = re.findall(r"<tr[^>]*><th>([^<]*)</th>((?:<td>[^<]*</td>)*)</tr>", text)
    return {head: re.findall(r"<td>([^<]*)</td>", cells) for head, cells in found}


def test_a_run_is_summed_up(tmp_path):
    text = page([read_run(make_run(tmp_path / "one", [50.0, 75.5, 70.0]))])
    table = rows(text)
    assert (
        table["epochs done"] == ["3 of 3"] and table["best top-1"] == ["75.50 %"] and table["last top-1"] == ["70.00 %"]
    )
    assert table["wall time"] == ["0 h 01 min 15 s, in 2 starts"] and table["skipped steps"] == ["6"]
    assert table["device"] == ["a GPU"] and table["commit"] == ["abc"] and table["quant"] == ["mxfp4"]
    seen = Checked(text)
    assert "python main.py --note '<b>'" in seen.texts
    links = [value for name, value in seen.attributes if name in ("src", "href", "xlink:href")]
    assert not links and "http" not in text and "<script" not in text and "@import" not in text
    titles = ["Loss", "Top-1 accuracy", "Learning rate", "Speed", "Skipped steps"]
    assert re.findall(r"<figcaption><b>([^<]*)", text) == titles


def test_runs_are_compared_by_name_colour_and_marker(tmp_path):
    runs = [make_run(tmp_path / name, [50.0, None, 60.0 + i], lr=i) for i, name in enumerate(("a&b", "c", "d"))]
    assert main([*map(str, runs), "--out", str(tmp_path / "all.html")]) == 0
    text = (tmp_path / "all.html").read_text()
    assert Checked(text) and "Comparison of 3 runs" in text and "a&amp;b, held out" in text
    assert rows(text)["best top-1"] == ["60.00 %", "61.00 %", "62.00 %"]
    assert "<tr class=differs><th>lr</th><td>0</td><td>1</td><td>2</td></tr>" in text
    assert text.index("<th>lr</th>") < text.index("<th>quant</th>") and "class=differs><th>quant" not in text
    (accuracy,) = re.findall(r"<figure><figcaption><b>Top-1.*?</figure>", text)
    lines = re.findall(r'<polyline points="([^"]*)" stroke="([^"]*)"', accuracy)
    assert [colour for _, colour in lines] == [c for c in COLOURS[:3] for _ in range(2)]  # two pieces around a gap


def test_measures_of_oscillation_are_those_of_all_layers(tmp_path):
    directory = make_run(tmp_path / "one", [50.0, 60.0])
    values = ["0,44,30,rate_w,all,,0.25", "0,44,30,rate_w,blocks.0.attn.qkv,,0.75", "1,88,30,rate_w,all,,0.5"]
    values += ["0,44,30,rate_y,blocks.0,,0.1", "0,44,30,rate_y,blocks.1,,0.3", "0,44,30,latent_histogram,all,0,0.5"]
    (directory / "oscillation.csv").write_text(HEADER + "\n".join(values) + "\n")
    run = read_run(directory)
    by_name = {measure.value: points for measure, points in run.oscillation.items()}
    assert by_name == {"rate_w": [(1, 0.25), (2, 0.5)], "rate_y": [(1, pytest.approx(0.2))]}
    assert "Rate of change" in page([run])


def test_points_lie_where_the_grid_says():
    """A value that is a tick lies on the tick's line, and everything lies inside the drawing."""
    text = chart("Speed", "images a second", "epoch", [Series("x", [(1, 10.0), (2, 30.0), (3, 20.0)], COLOURS[0])])
    places = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', text)[1].split()]
    grid = [float(y) for y in re.findall(r'y1="([\d.]+)" y2="[\d.]+" class="grid"', text)]
    labels = [float(y) for y in re.findall(r'text-anchor="end">([^<]*)', text)]
    line_of = dict(zip(labels, grid))
    assert [v for _, v in places] == [line_of[10], line_of[30], line_of[20]]
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.2)
    assert all(0 <= u <= WIDTH and 0 <= v <= HEIGHT for u, v in places)
    assert "no numbers" in chart("Speed", "", "epoch", [Series("x", [(1, None)], COLOURS[0])])


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0], [-2.0, -2.0], [1e-6, 3e-6], [0.4, 0.4001], [1e7, 3e7], [-1, 5]])
def test_ticks_are_few_even_and_enclose_the_values(values):
    found = ticks(values)
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in zip(found, found[1:])}
    assert found[0] <= min(values) and max(values) <= found[-1] and steps == {1.0} and 2 <= len(found) <= 8
    assert all(tick == int(tick) for tick in ticks([1, 3, 8], whole=True))


def test_numbers_are_short():
    shown = {0: "0", 0.5: "0.5", 97.78: "97.78", 1234567.0: "1,234,567", 0.0005: "5e-4", 2.5e-5: "2.5e-5"}
    assert {value: number(value) for value in shown} == shown


def test_mistakes_are_told_in_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run", [50.0])
    (tmp_path / "notes.html").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.txt").write_text('{"loss": 1}\n')
    cases = {
        (str(run), "--out", str(tmp_path / "notes.html")): "notes.html is something else; move it away",
        (str(tmp_path), "--out", str(tmp_path / "new.html")): "RUN must be a run's directory, with a log.txt",
        (str(tmp_path / "other"), "--out", str(tmp_path / "new.html")): "must hold a run's files",
        (str(run), str(run), "--out", str(tmp_path / "new.html")): "RUN must be given once for each run",
        (str(run),): "the following arguments are required: --out",
    }
    for arguments, message in cases.items():
        assert main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("training.report: error: ") and error.count("\n") == 1
    assert (tmp_path / "notes.html").read_text() == "mine" and not (tmp_path / "new.html").exists()
    for _ in range(2):  # an earlier report may be replaced
        assert main([str(run), "--out", str(tmp_path / "report.html")]) == 0
    check_target(tmp_path / "report.html")
