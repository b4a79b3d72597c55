"""The commit that a table's rows name."""

from __future__ import annotations

import subprocess
from pathlib import Path

from runtime import environment


def git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    """A file that git does not know is no change; a folder within a checkout of something else has no commit."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.environment(on_gpu=False)["commit"] == "unknown"
    git(tmp_path, "init", "-q")
    (tmp_path / "main.py").write_text("one")
    git(tmp_path, "add", "main.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    short = git(tmp_path, "log", "-1", "--format=%h")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log.txt").write_text("")
    assert environment.environment(on_gpu=False)["commit"] == short
    (tmp_path / "main.py").write_text("two")
    assert environment.environment(on_gpu=False)["commit"] == f"{short}, with changes"
    monkeypatch.setattr(environment, "ROOT", tmp_path / "runs")
    assert environment.environment(on_gpu=False)["commit"] == "unknown"
