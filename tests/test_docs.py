"""The files and tests that the documents name exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NAMED = re.findall(r"`(tests/[\w/]+\.py[\w:]*)`", (REPOSITORY / "docs/reliability.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMED)
def test_every_test_that_a_promise_names_exists(name):
    path, *inner = name.split("::")
    assert (REPOSITORY / path).is_file(), path
    node = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    for part in inner:
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        assert node is not None, name
    if inner:
        assert inner[-1].startswith("test_")


def test_every_promise_names_a_test():
    lines = (REPOSITORY / "docs/reliability.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]
    assert len(rows) > 20 and all("`tests/" in row.rsplit("|", 2)[1] for row in rows)
