"""Numbers in the reports, against runs whose logs are written here by the functions that write them in training."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from quantization.reference import NUMERICS
from reproduction.claims import CLAIMS
from reproduction.protocols import PROTOCOLS
from reproduction.report import claims, gaps, spread, write_reports
from reproduction.runs import OSCILLATION, RECORD, Run, columns, existing, read_log, remaining, run_of, write_record
from reproduction.targets import TARGETS
from runtime.errors import UserError
from tracking import oscillation_csv
from tracking.oscillation_csv import Measure

SMOKE = PROTOCOLS["smoke"]
DAMPEN = "+ Dampen (Nagel et al. 2022)"
ENVIRONMENT = {"device": "1 x abacus", "torch": "2.8"}


def run_for(table: str, label: str, seed: int = 0) -> Run:
    target = TARGETS[table]
    row = next(row for row in target.rows if row.label == label)
    return run_of(target, row, columns(target, SMOKE)["DeiT-T"], SMOKE, seed)


def finish(out: Path, run: Run, acc1: float, epochs: int = 2, environment: dict | None = None) -> Path:
    """A run's directory: `acc1` in its last epoch, a better one before."""
    directory = out / run.name
    directory.mkdir()
    write_record(run, directory, run.command(), {}, environment or ENVIRONMENT)
    epochs_ = [{"epoch": epoch, "test_acc1": acc1 + (epochs - 1 - epoch), "test_acc5": 99.0} for epoch in range(epochs)]
    (directory / "log.txt").write_text("".join(json.dumps(numbers) + "\n" for numbers in epochs_))
    return directory


def test_runs_of_an_earlier_configuration_count_until_there_are_newer_ones(tmp_path):
    before = replace(SMOKE, options="--num-workers 1")
    now = replace(SMOKE, options="--augment-on gpu", earlier=("--num-workers 1",))
    plain = run_for("table2", "TetraJet")
    old, new = ([replace(plain, protocol=protocol, seed=seed) for seed in range(3)] for protocol in (before, now))
    directories = [finish(tmp_path, run, 60.0) for run in old[:2]]
    assert existing(tmp_path).started(new[0]) and existing(tmp_path).directories(new[0]) == dict(enumerate(directories))
    directories += [finish(tmp_path, run, 60.0) for run in new[1:]]
    found = existing(tmp_path)
    assert found.directories(new[0]) == {0: directories[0], 1: directories[2], 2: directories[3]}
    assert found.directories(old[0]) == {0: directories[0], 1: directories[1]}
    assert not remaining(new, tmp_path) and remaining(old, tmp_path) == [old[2]]


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_spread():
    assert spread([60.0], ".2f") == "60.00 (n = 1)"
    # Mean 2, deviations -1, 0 and 1: the sample variance is 2 / 2.
    assert spread([1.0, 2.0, 3.0], "+.2f") == "+2.00 +- 1.00 (n = 3)"


def test_mean_last_epoch_and_differences_of_the_same_seeds(tmp_path):
    for seed, (plain, mx) in enumerate(((60.0, 61.0), (62.0, 65.0), (64.0, None))):
        finish(tmp_path, run_for("table2", "TetraJet", seed), plain)
        if mx is not None:
            finish(tmp_path, run_for("table2", "Microscaling", seed), mx)
    finish(tmp_path, run_for("table2", "full precision"), 70.0, epochs=1)
    written = write_reports(["table2"], "smoke", SMOKE, tmp_path)
    assert written == [tmp_path / "table2.md", tmp_path / "results.md"]
    lines = lines_of(tmp_path / "table2.md")
    assert "### deit_micro_patch4_32 (the paper: DeiT-T)" in lines and "Reference: TetraJet." in lines
    assert "| TetraJet | 59.75 |  | 62.00 +- 2.00 (n = 3) |  |" in lines
    # Seeds 0 and 1 have both: 1 and 3, whose mean is 2 and sample deviation the root of 2.
    assert "| Microscaling | 58.56 | -1.19 | 63.00 +- 2.83 (n = 2) | +2.00 +- 1.41 (n = 2) |" in lines
    assert "| full precision | 63.73 | +3.98 | not finished |  |" in lines
    assert "| TetraJet + Q-EMA | 60.00 | +0.25 | not run |  |" in lines
    assert "- 5 runs: device 1 x abacus, torch 2.8" in lines
    assert f"- TetraJet: `{' '.join(run_for('table2', 'TetraJet').command())}`" in lines
    results = (tmp_path / "results.md").read_text()
    assert all(f"## {target.title}" in results for target in TARGETS.values())
    # Table 5's first and last rows are these runs too.
    assert "| nearest, direct, floor | 58.56 | -1.19 | 63.00 +- 2.83 (n = 2) |" in results


def test_seeds_are_paired_by_seed_where_one_of_the_first_row_is_missing(tmp_path):
    """TetraJet has the seeds 0 and 2, Microscaling 0, 1 and 2. By position, 64 would be compared with 70."""
    for seed, mx in enumerate((61.0, 70.0, 66.0)):
        finish(tmp_path, run_for("table2", "Microscaling", seed), mx)
    for seed, plain in ((0, 60.0), (2, 64.0)):
        finish(tmp_path, run_for("table2", "TetraJet", seed), plain)
    write_reports(["table2"], "smoke", SMOKE, tmp_path)
    # 61 - 60 and 66 - 64: mean 1.5, sample deviation the root of 1/2.
    microscaling = "| Microscaling | 58.56 | -1.19 | 65.67 +- 4.51 (n = 3) | +1.50 +- 0.71 (n = 2) |"
    assert microscaling in lines_of(tmp_path / "table2.md")
    claim = "| TetraJet is ahead of Microscaling | Table 2, DeiT-T | top-1 % | +1.19 | "
    lines = lines_of(tmp_path / "results.md")
    assert claim + "-1.50 +- 0.71 (n = 2) | 0.50 | cannot be told, n < 3 |" in lines


def test_figure_gap_and_claims_stand_before_the_tables(tmp_path):
    for seed in range(3):
        finish(tmp_path, run_for("table2", "full precision", seed), 70.0 + seed)
        finish(tmp_path, run_for("table2", "Microscaling", seed), 60.0 + 0.5 * seed)
        finish(tmp_path, run_for("table2", "TetraJet", seed), 61.0 + 1.1 * seed)
    write_reports(["table2"], "smoke", SMOKE, tmp_path)
    lines = lines_of(tmp_path / "results.md")
    heads = [line for line in lines if line.startswith(("![", "## "))]
    assert heads[:4] == [
        "![Top-1 accuracy of every method, seed by seed](methods.png)",
        "## Can this protocol tell methods apart?",
        "## The paper's claims",
        "## Table 1: one quantizer at a time",
    ]
    assert (tmp_path / "methods.png").is_file()
    # 71 and 60.5: standard errors of 1 and 0.5, each over the root of 3.
    assert (
        "- deit_micro_patch4_32 (the paper: DeiT-T): 71.00 +- 1.00 (n = 3) against 60.50 +- 0.50 (n = 3), "
        "+10.50 points: 16.3 standard errors, enough"
    ) in lines
    # 1.0, 1.6 and 2.2: t of 0.35 x 4.303 = 1.49 from 1.6.
    start = "| TetraJet is ahead of Microscaling | Table 2, DeiT-T | top-1 % | +1.19 | "
    assert start + "+1.60 +- 0.60 (n = 3) | 0.35 | holds |" in lines
    assert "| Q-EMA gains on TetraJet | Table 2, DeiT-T | top-1 % | +0.25 |  |  | not run |" in lines
    assert f"holds: 3, not run: {len(CLAIMS) - 3}." in lines
    assert "## The paper's claims" not in (tmp_path / "table2.md").read_text()


def test_the_methods_drawn_have_their_top_1_by_seed(tmp_path, monkeypatch):
    """Rows of Tables 2 and 4, of which those with the same options stand once, under Table 2's label."""
    drawn = []
    monkeypatch.setattr("reproduction.figures.methods_figure", lambda accuracies, png: drawn.append(accuracies))
    for seed in range(2):
        finish(tmp_path, run_for("table2", "TetraJet", seed), 60.0 + seed)
        finish(tmp_path, run_for("table4", DAMPEN, seed), 50.0 + seed)
    write_reports([], "smoke", SMOKE, tmp_path)
    wanted = {"TetraJet": [60.0, 61.0], f"TetraJet {DAMPEN}": [50.0, 51.0]}
    assert drawn == [{"deit_micro_patch4_32 (the paper: DeiT-T)": wanted}]


def test_claims_about_what_only_tracked_runs_have(tmp_path):
    measures = (Measure.RATE_WEIGHT, Measure.RATE_QUANTIZED, Measure.RATE_OUTPUT, Measure.OSCILLATING)
    measures += (Measure.CONFIDENCE,)
    for seed in range(3):
        for label, value in (("TetraJet", 0.04), ("TetraJet + Q-EMA", 0.01)):
            csv = finish(tmp_path, run_for("fig6", label, seed), 50.0) / OSCILLATION
            rows = [
                oscillation_csv.Row(1, 5, 5, m, "all", None, value + m.value.count("_") * seed / 1000) for m in measures
            ]
            oscillation_csv.start(csv, 0)
            oscillation_csv.append(csv, rows)
    found = existing(tmp_path)
    lines = claims(SMOKE, found).splitlines()
    start = "| Fewer weights oscillate with Q-EMA | Figure 6, DeiT-T | oscillating % | - | "
    assert start + "+3.00 +- 0.00 (n = 3) | 0.00 | holds |" in lines
    start = "| Quantized weights keep changing where weights come to rest | Figure 2, DeiT-T | r(Q2(W)) | - | "
    assert start + "+0.0000 +- 0.0000 (n = 3) | 0.0000 | cannot be told |" in lines
    # Gzipped, the measures are the same and the run is finished still.
    for csv in tmp_path.glob(f"*/{OSCILLATION}"):
        csv.with_name(f"{csv.name}.gz").write_bytes(gzip.compress(csv.read_bytes()))
        csv.unlink()
    assert claims(SMOKE, existing(tmp_path)).splitlines() == lines
    assert "cannot be told, n < 2" in gaps(SMOKE, found)


def test_two_metrics_side_by_side(tmp_path):
    finish(tmp_path, run_for("table5", "stochastic, double, truncation-free"), 50.0)
    finish(tmp_path, run_for("table5", "nearest, direct, floor"), 48.5)
    write_reports(["table5"], "smoke", SMOKE, tmp_path)
    assert (
        "| nearest, direct, floor | 58.56 | -1.19 | 48.50 (n = 1) | -1.50 (n = 1) "
        "| 81.92 | -0.75 | 99.00 (n = 1) | +0.00 (n = 1) |"
    ) in lines_of(tmp_path / "table5.md")


def test_rates_are_the_last_epochs_and_a_tracked_run_serves_accuracy_too(tmp_path):
    tracked = run_for("table3", "TetraJet + Dampen")
    assert tracked.tracked and tracked.configuration == run_for("table4", DAMPEN).configuration
    plain = finish(tmp_path, run_for("table4", DAMPEN), 50.0)
    directory = finish(tmp_path, tracked, 60.0)
    assert tracked.name != plain.name and not tracked.finished(directory)  # its csv is missing
    csv = directory / OSCILLATION
    oscillation_csv.start(csv, 0)
    for epoch, rate in ((0, 0.5), (1, 0.00321)):
        rows = [
            (Measure.RATE_QUANTIZED, "all", rate),
            (Measure.RATE_QUANTIZED, "blocks.0.attn.qkv", 9.0),
            (Measure.RATE_OUTPUT, "blocks.1", 10 * rate),
            (Measure.RATE_WEIGHT, "all", 7.0),
        ]
        oscillation_csv.append(csv, [oscillation_csv.Row(epoch, 5, 5, m, where, None, v) for m, where, v in rows])
    assert tracked.finished(directory)
    found = existing(tmp_path)
    assert found.directories(tracked) == found.directories(run_for("table4", DAMPEN)) == {0: directory}
    write_reports(["table3", "table4"], "smoke", SMOKE, tmp_path)
    assert (
        "| TetraJet + Dampen | 0.0044 | -0.0001 | 0.0032 (n = 1) |  | 0.0394 | -0.0007 | 0.0321 (n = 1) |  |"
        in lines_of(tmp_path / "table3.md")
    )
    assert f"| {DAMPEN} | 59.75 | +0.00 | 60.00 (n = 1) |  |" in lines_of(tmp_path / "table4.md")


def test_an_untracked_run_gives_no_rates(tmp_path):
    finish(tmp_path, run_for("table2", "TetraJet"), 50.0)
    write_reports(["table3", "fig6"], "smoke", SMOKE, tmp_path)
    assert "| TetraJet | 0.0045 |  | not run |  | 0.0401 |  | not run |  |" in lines_of(tmp_path / "table3.md")
    assert "Not run: TetraJet, TetraJet + Dampen, TetraJet + Q-Ramping, TetraJet + Q-EMA." in lines_of(
        tmp_path / "fig6.md"
    )
    assert not list(tmp_path.glob("*.png"))


def test_runs_of_another_protocol_are_not_ours(tmp_path):
    run = run_for("table2", "TetraJet")
    finish(tmp_path, replace(run, protocol=replace(SMOKE, epochs=3)), 50.0, epochs=3)
    write_reports(["table2"], "smoke", SMOKE, tmp_path)
    assert "| TetraJet | 59.75 |  | not run |  |" in lines_of(tmp_path / "table2.md")


def test_both_environments_of_a_run_that_went_on_elsewhere(tmp_path):
    run = run_for("table2", "TetraJet")
    directory = finish(tmp_path, run, 50.0)
    write_record(run, directory, run.command(), {}, {"device": "1 x slide rule"})
    write_record(run, directory, run.command(), {}, ENVIRONMENT)
    write_reports(["table2"], "smoke", SMOKE, tmp_path)
    lines = lines_of(tmp_path / "table2.md")
    assert "- 1 runs: device 1 x abacus, torch 2.8" in lines and "- 1 runs: device 1 x slide rule" in lines


def test_a_line_cut_short_is_no_epoch(tmp_path):
    run = run_for("table2", "TetraJet")
    directory = finish(tmp_path, run, 50.0)
    log = directory / "log.txt"
    log.write_text(log.read_text()[:-5])
    assert len(read_log(directory)) == 1 and not run.finished(directory)


def test_a_damaged_record_is_named(tmp_path):
    directory = finish(tmp_path, run_for("table2", "TetraJet"), 50.0)
    for text in ("", "[]", "{}"):
        (directory / RECORD).write_text(text)
        with pytest.raises(UserError, match=rf"{directory.name} must hold a run of this program.* move the directory"):
            existing(tmp_path)


def test_runs_of_other_numerics_are_not_pooled(tmp_path):
    runs = [run_for("table2", "TetraJet", seed) for seed in range(2)]
    records = [finish(tmp_path, run, 50.0) / RECORD for run in runs]
    older = [json.loads(record.read_text()) for record in records]
    assert [record.pop("numerics") for record in older] == [NUMERICS] * 2  # committed runs are older than the key
    records[0].write_text(json.dumps(older[0]))
    with pytest.raises(UserError, match=r"must have the same numerics, \S+ has 1 and \S+ has 2; move"):
        existing(tmp_path)
    records[1].write_text(json.dumps(older[1]))
    assert existing(tmp_path).numerics == 1 and remaining(runs, tmp_path) == []
    with pytest.raises(
        UserError, match=r"holds runs of numerics 1 and this program makes runs of 2; give another --out"
    ):
        remaining([*runs, run_for("table2", "TetraJet", 2)], tmp_path)
