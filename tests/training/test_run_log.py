"""What a run writes: TensorBoard's file, read back record by record, and the table on the terminal."""

from __future__ import annotations

import ast
import inspect
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from engine import METRICS
from tracking.oscillation_csv import Measure, Row
from training.run_log import TABLE_HEAD, RunLog, table_row

REPOSITORY = Path(__file__).resolve().parents[2]


def events(directory: Path) -> list[Event]:
    """A record is its length (8 bytes), a checksum (4), the event, and another checksum (4)."""
    found = []
    (path,) = (directory / "tensorboard").glob("events.*")
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack_from("<Q", content)
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def test_curves_are_by_the_epoch_and_a_run_that_goes_on_purges_what_it_repeats(tmp_path):
    with RunLog(tmp_path, {}, epoch=3) as log:
        log.epoch({"epoch": 3, "train_loss": 0.5, "test_acc1": 75.0})
    told = [event for event in events(tmp_path) if event.HasField("session_log") or event.HasField("summary")]
    assert (told[0].step, told[0].session_log.status) == (3, SessionLog.START)
    points = [(event.step, value.tag, value.simple_value) for event in told[1:] for value in event.summary.value]
    assert points == [(3, "train_loss", 0.5), (3, "test_acc1", 75.0)]


def dict_keys(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    keys = {key for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys}
    return {key.value for key in keys if isinstance(key, ast.Constant)}


def test_the_table_reads_numbers_that_something_writes():
    """Names that `table_row` looks up, in the source, against the keys of the dicts that fill a line of the log."""
    tree = ast.parse(inspect.getsource(table_row))
    subscripts = [node for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    read = {node.slice.value for node in subscripts if getattr(node.value, "id", None) == "numbers"}
    compared = [node.left for node in ast.walk(tree) if isinstance(node, ast.Compare)]  # "name" in numbers
    read |= {node.value for node in compared if isinstance(node, ast.Constant)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    read |= {node.args[0].value for node in calls if getattr(node.func, "attr", None) == "get"}
    assert {"train_loss", "oscillating", "quantized_acc1", "waited_for_data"} <= read
    files = ["engine.py", "training/loop.py", *REPOSITORY.glob("quantization/remedies/*.py")]
    written = set().union(*(dict_keys(REPOSITORY / file) for file in files))
    written |= {f"{prefix}_{name}" for prefix in ("test", "ema", "quantized") for name in METRICS}
    assert read <= written, read - written


def test_a_histogram_has_its_bins_upper_edges(tmp_path):
    """Bins of a quarter from -0.5 on. TensorBoard wants each bucket's upper limit, and sums over all values."""
    shares = [0.25, 0.0, 0.5, 0.25]
    rows = [Row(3, 176, 30, Measure.LATENT_HISTOGRAM, "all", -0.5 + i / 4, share) for i, share in enumerate(shares)]
    rows += [Row(3, 176, 30, Measure.RATE_WEIGHT, "blocks.0.mlp.fc1", None, 0.125)]
    rows += [Row(3, 176, 30, Measure.RATIO, "blocks.0.mlp.fc1[0][1]", None, 20.0)]
    (tmp_path / "oscillation.csv").write_text("epoch,step,window,measure,where,x,value\n")
    with RunLog(tmp_path, {}) as log:
        log.oscillation(rows)
    values = [(event.step, value) for event in events(tmp_path) for value in event.summary.value]
    assert [(step, value.tag) for step, value in values] == [(3, "rate_w/blocks.0.mlp.fc1"), (3, "latent_histogram")]
    histogram = values[1][1].histo
    assert (histogram.min, histogram.max, histogram.num) == (-0.5, 0.5, 1)
    assert list(histogram.bucket_limit) == [-0.25, 0.0, 0.25, 0.5] and list(histogram.bucket) == shares
    middles = [-0.375, -0.125, 0.125, 0.375]
    assert histogram.sum == pytest.approx(sum(s * x for s, x in zip(shares, middles)))
    assert histogram.sum_squares == pytest.approx(sum(s * x * x for s, x in zip(shares, middles)))


def test_the_table_says_so_where_a_gpu_waited_for_data():
    names = ("epoch", "train_loss", "test_loss", "test_acc1", "test_acc5", "img_per_s", "lr")
    row = dict.fromkeys((*names, "lost_groups", "bad_images", "skipped_steps"), 0)
    told = "   waited 35 % of the time for data: more --num-workers may help"
    assert table_row(row | {"waited_for_data": 34.6}, 12) == table_row(row, 12) + told
    assert table_row(row | {"waited_for_data": 9.9}, 12) == table_row(row, 12)


def test_the_table_has_each_number_in_its_place():
    row = {"epoch": 4, "train_loss": 1.25, "test_loss": 0.5, "test_acc1": 61.5, "test_acc5": 93.25, "img_per_s": 1234.4}
    row |= {"lr": 2.5e-4, "lost_groups": 0, "bad_images": 3, "skipped_steps": 2, "ema_acc1": 60.5, "ema_acc5": 92.0}
    row |= {"oscillating": 1.5, "mean_period": 2.25}
    words = table_row(row, 12).split()
    assert words[:7] == ["5/12", "1.2500", "0.5000", "61.50", "93.25", "1234", "2.5e-04"]
    told = "average: 60.50 % 1.50 % oscillate, mean period 2.25 3 images were not readable "
    assert " ".join(words[7:]) == told + "2 steps were not finite and skipped"
    head = TABLE_HEAD.replace(" loss", "-loss").replace(" %", "-%").split()
    assert head == ["epoch", "train-loss", "test-loss", "top-1-%", "top-5-%", "img/s", "lr"]
