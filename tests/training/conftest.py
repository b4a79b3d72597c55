"""What main.py makes of a command, for the tests of training/."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from main import main
from training.loop import Training


@pytest.fixture
def few_digits_in_an_empty_directory(tmp_path, monkeypatch, digits_cut_to):
    """64 training images and 20 held-out ones, and an empty directory for what the run writes."""
    monkeypatch.chdir(tmp_path)
    with digits_cut_to(64, 20):
        yield


@pytest.fixture
def built(few_digits_in_an_empty_directory, monkeypatch) -> Callable[..., Training]:
    """built(*options): what main.py makes of a command, up to where training would begin."""
    found: list[Training] = []

    def build(*options: str) -> Training:
        with monkeypatch.context() as patch:
            patch.setattr(Training, "run", lambda self, log: found.append(self))
            assert main([*options, "--output-dir", f"built-{len(found)}"]) == 0
        return found[-1]

    return build
