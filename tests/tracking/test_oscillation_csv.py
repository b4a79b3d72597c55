"""oscillation.csv: what is written is read, whatever a killed run has left."""

from __future__ import annotations

import csv
import gzip
import math

import pytest

from runtime.errors import UserError
from tracking.oscillation_csv import Measure, Row, append, read, start

ROWS = [
    Row(0, 44, 30, Measure.RATE_WEIGHT, "all", None, 0.0154417633),
    Row(0, 44, 30, Measure.LATENT_HISTOGRAM, "all", -7.875, 0.0),
    Row(1, 88, 30, Measure.RATIO, "blocks.0.attn.qkv[3][17]", None, math.inf),
    Row(1, 88, 30, Measure.TRAJECTORY_LATENT, "blocks.0.attn.qkv[3][17]", 0.0, -1.5),
]


def test_a_round_trip(tmp_path):
    path = tmp_path / "oscillation.csv"
    start(path, 0)
    assert read(path) == []
    append(path, ROWS[:2])
    append(path, ROWS[2:])
    assert read(path) == ROWS
    assert path.read_text().splitlines()[:2] == [
        "epoch,step,window,measure,where,x,value",
        "0,44,30,rate_w,all,,0.0154417633",
    ]
    with open(path, newline="") as file:  # as any other program reads it
        assert [line["where"] for line in csv.DictReader(file)] == [row.where for row in ROWS]


def test_gzipped_it_reads_the_same(tmp_path):
    path = tmp_path / "oscillation.csv"
    start(path, 0)
    append(path, ROWS)
    packed = tmp_path / "oscillation.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed) == ROWS


def test_going_on_replaces_the_epochs_that_are_run_again(tmp_path):
    path = tmp_path / "oscillation.csv"
    start(path, 0)
    append(path, ROWS)
    with open(path, "a") as file:
        file.write("1,88,30,confid")  # a run killed in the middle of a line
    assert read(path) == ROWS
    start(path, 1)
    assert read(path) == ROWS[:2] and path.read_text().endswith("\n")
    append(path, ROWS[2:])
    assert read(path) == ROWS
    start(path, 0)
    assert read(path) == [] and [p.name for p in tmp_path.iterdir()] == ["oscillation.csv"]


HEADER = "epoch,step,window,measure,where,x,value\n"


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "must start with epoch,step"),
        ("epoch,loss\n0,1\n", "must start with epoch,step,.* got 'epoch,loss'"),
        (HEADER + "0,1,2,speed,all,,1\n", "line 2 of .* is not a row of oscillation.csv: '0,1,2,speed"),
        (HEADER + "0,1,2,rate_w,all,,1\n0,1\n", "line 3 of .* is not a row of oscillation.csv: '0,1'"),
    ],
)
def test_another_file_is_refused_and_left_alone(text, problem, tmp_path):
    path = tmp_path / "oscillation.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        read(path)
    with pytest.raises(UserError, match="--track-oscillation cannot go on with its file: .*; move it away"):
        start(path, 1)
    assert path.read_text() == text
