"""The reports in docs/results follow from the runs that are kept there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reproduction.protocols import PROTOCOLS
from reproduction.report import write_reports

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
KEPT = sorted(name for name in PROTOCOLS if (DOCS / "results" / name / "results.md").exists())


@pytest.mark.parametrize("name", KEPT)
def test_the_report_is_made_of_the_runs(name, tmp_path):
    shutil.copytree(DOCS / "results" / name / "runs", tmp_path, dirs_exist_ok=True)
    write_reports([], name, PROTOCOLS[name], tmp_path)
    assert (tmp_path / "results.md").read_text() == (DOCS / "results" / name / "results.md").read_text()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in (DOCS / "results" / name).glob("*.png")}


def test_verdicts_are_the_reports():
    reported = {line for name in KEPT for line in (DOCS / "results" / name / "results.md").read_text().splitlines()}
    claimed = [line for line in (DOCS / "results.md").read_text().splitlines() if ", DeiT-" in line]
    assert claimed and set(claimed) <= reported
