"""The settings that a run shares with its checkpoint, and those that an older checkpoint lacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from main import main
from training.options import GROUPS, SAME_ON_RESUME, names_of
from training.setup import implied_identity

TINY = ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "718", "--device", "cpu", "--input-size", "4"]
TINY += ["--model", "deit_nano_patch4_32"]


def forget(path: Path, *keys: str) -> None:
    """Make the checkpoint one from before these options existed."""
    state = torch.load(path, weights_only=True)
    for key in keys:
        del state["identity"][key]
    torch.save(state, path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The directory of a run with default options."""
    directory = tmp_path_factory.mktemp("finished") / "out"
    assert main([*TINY, "--output-dir", str(directory)]) == 0
    return directory


@pytest.fixture
def old_run(finished, tmp_path) -> Path:
    """A copy of its checkpoint that lacks what was added last."""
    path = tmp_path / "out" / "checkpoint.pth"
    path.parent.mkdir()
    path.write_bytes((finished / "checkpoint.pth").read_bytes())
    forget(
        path,
        "--accumulate-steps",
        "--keep-last-batch",
        "--clip-grad",
        "--osci-reset",
        "--dampen-reduction",
        "optimizer",
    )
    return path.parent


def test_a_key_that_an_older_checkpoint_lacks_means_the_only_value_then(old_run, capsys):
    assert main([*TINY, "--output-dir", str(old_run), "--resume", "auto"]) == 0
    assert "has all its 2 epochs done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accumulate-steps", "2"], "the same --accumulate-steps: this run has 2, .* has 1;"),
        (["--clip-grad", "1"], "the same --clip-grad: this run has 1.0, .* has 0.0;"),
        (["--keep-last-batch"], "the same --keep-last-batch: this run has True, .* has False;"),
    ],
)
def test_another_value_than_that_is_refused(options, message, old_run, capsys):
    before = (old_run / "checkpoint.pth").read_bytes()
    assert main([*TINY, *options, "--output-dir", str(old_run), "--resume", "auto"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert (old_run / "checkpoint.pth").read_bytes() == before


def test_what_never_was_an_option_is_not_implied(finished, tmp_path, capsys):
    """A checkpoint without the name of its model is damaged, not old."""
    path = tmp_path / "checkpoint.pth"
    path.write_bytes((finished / "checkpoint.pth").read_bytes())
    forget(path, "model")
    assert main([*TINY, "--resume", str(path), "--output-dir", str(tmp_path)]) == 2
    assert "the same model: this run has deit_nano_patch4_32" in capsys.readouterr().err


def test_a_run_whose_tokens_decayed_is_refused_by_its_reason(finished, tmp_path, capsys):
    """A position embedding and a class token moved from the group without weight decay to the one with it."""
    state = torch.load(finished / "checkpoint.pth", weights_only=True)
    plain, decaying = state["optimizer"]["param_groups"]
    assert (plain["weight_decay"], decaying["weight_decay"]) == (0.0, 0.05)
    sizes = [len(plain["params"]), len(decaying["params"])]
    moved = [plain["params"].pop() for _ in range(2)]
    decaying["params"] += moved
    torch.save(state, tmp_path / "checkpoint.pth")
    assert main([*TINY, "--resume", str(tmp_path / "checkpoint.pth"), "--output-dir", str(tmp_path)]) == 2
    wanted = (
        f"the same groups of parameters, {sizes}, the checkpoint has [{sizes[0] - 2}, {sizes[1] + 2}]: in older runs"
    )
    assert wanted in capsys.readouterr().err


def test_an_option_must_stay_the_same_unless_its_group_says_otherwise():
    for group in GROUPS.values():
        assert set(group.free_on_resume) <= set(names_of(group))
    assert "lr" in SAME_ON_RESUME and "teacher_model" in SAME_ON_RESUME and "output_dir" not in SAME_ON_RESUME


def test_every_option_that_must_stay_the_same_has_an_implied_value():
    implied = implied_identity()
    assert {f"--{name.replace('_', '-')}" for name in SAME_ON_RESUME} <= implied.keys()
    assert implied["--accumulate-steps"] == 1 and implied["--clip-grad"] == 0.0 and implied["--q-ramping-k2"] == 5
    assert implied["--dampen"] is None and implied["--dampen-reduction"] is None and implied["optimizer"] == "AdamW"
