"""The switches that `--deterministic` sets, and that it leaves none behind."""

from __future__ import annotations

import os

import pytest
import torch

from main import main
from runtime.determinism import WORKSPACE, deterministic
from runtime.errors import UserError


def switches() -> tuple:
    cudnn = torch.backends.cudnn
    enabled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    return *enabled, cudnn.deterministic, cudnn.benchmark, os.environ.get(WORKSPACE)


@pytest.mark.parametrize("mine", [None, ":16:8", ":0:0"])
def test_switches_are_set_and_put_back(mine, monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    if mine is not None:
        monkeypatch.setenv(WORKSPACE, mine)
    before = switches()
    with pytest.raises(KeyError), deterministic(torch.device("cuda")):
        assert switches() == (True, False, True, False, ":16:8" if mine == ":16:8" else ":4096:8")
        raise KeyError
    assert switches() == before
    with deterministic(torch.device("cpu")):
        assert switches() == before


def test_a_callers_wish_to_be_warned_alone_is_put_back():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(torch.device("cuda")):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_operation_without_such_an_algorithm_is_named():
    message = "put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms'. You"
    with pytest.raises(UserError, match="does not go with this run: put_ does not have .*; drop it"):
        with deterministic(torch.device("cuda")):
            raise RuntimeError(message)


def test_on_a_cpu_a_run_has_its_bits_without_it(tmp_path):
    weights = []
    for option in ([], ["--deterministic"]):
        directory = tmp_path / f"{len(option)}"
        tiny = ["--epochs", "1", "--batch-size", "479", "--input-size", "4", "--device", "cpu"]
        assert main([*tiny, *option, "--output-dir", str(directory)]) == 0
        weights.append(torch.load(directory / "checkpoint.pth", weights_only=True)["model"])
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in weights), strict=True))
    assert not torch.are_deterministic_algorithms_enabled()
