"""The switches that `--deterministic` sets, and that it leaves none behind."""

from __future__ import annotations

import os

import pytest
import torch

from determinism import WORKSPACE, deterministic
from errors import UserError


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


def test_an_operation_without_such_an_algorithm_is_named():
    message = "put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms'. You"
    with pytest.raises(UserError, match="does not go with this run: put_ does not have .*; drop it"):
        with deterministic(torch.device("cuda")):
            raise RuntimeError(message)
