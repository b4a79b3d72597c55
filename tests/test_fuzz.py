"""Nonsense from outside: command lines, checkpoints, idx files. Always one line and exit code 2, or success.

Seeds are fixed, so a failure can be repeated; its input is in the assertion's message.
"""

from __future__ import annotations

import copy
import gzip
import io
import os
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from data.in_memory import read_idx
from main import main
from runtime.errors import UserError
from training import setup
from training.options import build_parser, parse_args

VALUES = ["", "-1", "0", "1", "2", "3", "7", "32", "0.5", "1e-3", "nan", "inf", "-inf", "1e400", "99999999999999999999"]
VALUES += [
    "auto",
    "none",
    "x",
    "x" * 5000,
    "..",
    ".",
    "/dev/null",
    "a b\nc",
    "q1,q2",
    "q2,q2",
    ",",
    "０",
    "1_0",
    "0x10",
]
VALUES += ["0x10", "\udcff", "--", "-", "é", "mxfp4", "stochastic", "{}", "%s%n", "1,000", "None", "True"]
MODELS = ["deit_micro_patch4_32", "deit_nano_patch4_32", "deit_micro_patch4_32.x", "resnet10t", "xception", ""]


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def small_runs(digits_cut_to):
    with digits_cut_to(150, 36):
        yield


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory, small_runs) -> bytes:
    directory = tmp_path_factory.mktemp("run")
    assert main([*RUN, "--output-dir", str(directory)]) == 0
    return (directory / "checkpoint.pth").read_bytes()


RUN = ["--quant", "mxfp4", "--epochs", "1", "--batch-size", "72", "--device", "cpu", "--warmup-epochs", "0"]


def outcome(arguments: list[str], capsys) -> int:
    """Exit code, after everything that must hold of it."""
    before = {p: p.stat().st_mtime_ns for p in Path().rglob("*")}
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code in (0, 2), arguments
    assert (code == 0) == (error == ""), (arguments, error)
    assert code == 0 or (error.startswith("main.py: error: ") and error.count("\n") == 1), (arguments, error)
    assert before == {p: p.stat().st_mtime_ns for p in Path().rglob("*")}, arguments
    return code


def random_command(generator: random.Random) -> list[str]:
    """Some options with values that they have, values of others, and nonsense; at times a flag without its value."""
    actions = [action for action in build_parser()._actions if action.dest != "help"]
    command = []
    for action in generator.sample(actions, generator.randint(1, 4)):
        command.append(generator.choice(action.option_strings))
        if action.nargs == 0:
            continue
        choices = [str(choice) for choice in action.choices or ()]
        if generator.random() < 0.5 and (choices or action.dest == "model"):
            command.append(generator.choice(choices or MODELS))
        elif generator.random() < 0.95:
            command.append(generator.choice(VALUES))
    if generator.random() < 0.2:
        generator.shuffle(command)
    return command


def test_random_command_lines_parse_or_are_refused(capsys):
    generator, refused = random.Random(0), 0
    for _ in range(1500):
        command = random_command(generator)
        try:
            training = parse_args(command).training
            assert training.batch_size % training.accumulate_steps == 0
        except UserError as error:
            refused += 1
            assert str(error).isprintable() or "\n" in "".join(command) or "\udcff" in "".join(command), command
        except SystemExit as stopped:
            refused += 1
            assert stopped.code == 2, command
            assert capsys.readouterr().err.count("main.py: error: ") == 1, command
    assert 500 < refused < 1450  # both happen


def test_random_command_lines_that_build_everything(capsys, monkeypatch):
    """Up to where training would begin: recipe, data, model, weights."""
    begun = []
    monkeypatch.setattr(setup, "train", lambda *arguments: begun.append(arguments))
    generator, done = random.Random(6), 0
    Path("a-file").write_bytes(b"no weights")
    while done < 120:
        command = random_command(generator)
        if {"--download", "--compile"} & set(command) or "FRACTAL" in command:
            continue  # the network, a global switch, and ten seconds of drawing
        outcome(["--device", "cpu", *command], capsys)
        done += 1
    assert 0 < len(begun) < 110  # both happen, whatever options there are to draw from


def test_mutations_of_a_command_that_works(capsys, monkeypatch):
    monkeypatch.setattr(setup, "train", lambda *arguments: None)
    works = [*RUN, "--q-ema", "--q-ema-beta", "0.9", "--clip-grad", "1", "--aa", "none", "--accumulate-steps", "2"]
    generator = random.Random(2)
    assert outcome(works, capsys) == 0
    codes = set()
    for _ in range(80):
        command = list(works)
        for _ in range(generator.randint(1, 3)):
            place = generator.randrange(len(command))
            kind = generator.choice(("drop", "repeat", "replace", "cut"))
            if kind == "drop":
                del command[place]
            elif kind == "repeat":
                command.insert(place, generator.choice(command))
            elif kind == "replace":
                command[place] = generator.choice(VALUES)
            else:
                command[place] = command[place][: generator.randint(0, len(command[place]))]
        codes.add(outcome(command, capsys))
    assert codes == {0, 2}


def damaged(content: bytes, generator: random.Random) -> bytes:
    kind = generator.choice(("cut", "bits", "zeros", "doubled", "noise"))
    place = generator.randrange(len(content))
    if kind == "cut":
        return content[:place]
    if kind == "doubled":
        return content[:place] + content[generator.randrange(len(content)) :]
    changed = bytearray(content)
    for _ in range(generator.randint(1, 20)):
        # Half of the hits at the end, where a zip file has its table, the others anywhere.
        i = generator.randrange(len(content) - 4096, len(content)) if generator.random() < 0.5 else place
        if kind == "bits":
            changed[i] ^= 1 << generator.randrange(8)
        elif kind == "zeros":
            changed[i : i + 64] = bytes(len(changed[i : i + 64]))
        else:
            changed[i : i + 64] = generator.randbytes(len(changed[i : i + 64]))
        place = generator.randrange(len(content))
    return bytes(changed)


@pytest.mark.parametrize("option", ["--resume", "--finetune"])
def test_damaged_checkpoints(option, checkpoint_bytes, capsys, monkeypatch):
    """A damaged file that is still readable may be evaluated; every other one is refused."""
    monkeypatch.setattr(setup, "evaluate", lambda *arguments: {"loss": 1.0, "acc1": 0.0})
    generator, codes = random.Random(3), []
    for _ in range(60):
        Path("damaged.pth").write_bytes(damaged(checkpoint_bytes, generator))
        codes.append(outcome([*RUN, "--eval", option, "damaged.pth"], capsys))
    assert codes.count(2) > 20
    Path("damaged.pth").write_bytes(checkpoint_bytes)
    assert outcome([*RUN, "--eval", option, "damaged.pth"], capsys) == 0


JUNK = [None, 0, -1, 2**70, 1.5, "x", [], {}, (), torch.zeros(0), torch.zeros(3, 1), [torch.ones(2)], {"a": {}}, {1: 2}]


def test_checkpoints_of_another_structure(checkpoint_bytes, capsys, monkeypatch):
    """Each part of a finished run's checkpoint replaced by something else: refused, or not needed any more."""
    monkeypatch.setattr(setup, "evaluate", lambda *arguments: {"loss": 1.0, "acc1": 0.0})
    content = torch.load(io.BytesIO(checkpoint_bytes), weights_only=True)
    generator = random.Random(4)
    for part in sorted(content.keys() - {"epoch", "best_acc1", "scheduler"}):
        for junk in generator.sample(JUNK, 3):
            torch.save(content | {part: junk}, "other.pth")
            outcome([*RUN, "--resume", "other.pth"], capsys)
        if isinstance(content[part], dict) and content[part]:
            for junk in generator.sample(JUNK, 3):
                other = copy.copy(content[part])
                other[generator.choice(list(other))] = junk
                torch.save(content | {part: other}, "other.pth")
                outcome([*RUN, "--resume", "other.pth"], capsys)
                outcome([*RUN, "--eval", "--finetune", "other.pth"], capsys)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def foreign_files() -> dict[str, bytes]:
    npz = io.BytesIO()
    np.savez(npz, a=np.ones(3))
    module = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), module)
    return {
        "empty": b"",
        "text": b"hello\n" * 100,
        "noise": random.Random(5).randbytes(5000),
        "pickle": pickle.dumps({"model": {"a": 1}}),
        "pickle that runs code": pickle.dumps({"model": Evil()}),
        "old protocol": pickle.dumps([1, 2], protocol=0),
        "npz": npz.getvalue(),
        "a whole module": module.getvalue(),
        "gzip": gzip.compress(b"x" * 1000),
        "safetensors": struct.pack("<Q", 2) + b"{}",
    }


@pytest.mark.parametrize("name", foreign_files())
def test_foreign_files(name, capsys):
    Path("foreign.pth").write_bytes(foreign_files()[name])
    for arguments in (
        ["--resume", "foreign.pth"],
        ["--finetune", "foreign.pth"],
        ["--eval", "--resume", "foreign.pth"],
    ):
        assert outcome([*RUN, *arguments], capsys) == 2
    assert not Path("it-ran").exists()


def test_directories_and_devices_are_no_checkpoints(capsys):
    Path("directory").mkdir()
    for path in ("directory", "/dev/null", "", "x" * 300, "a-file/below"):
        Path("a-file").touch()
        assert outcome([*RUN, "--finetune", path], capsys) == 2
        if path:
            assert outcome([*RUN, "--resume", path], capsys) == 2


def test_damaged_idx_files(tmp_path):
    """Read as what they were, as other bytes of a shape that fits, or refused; no other error."""
    array = np.arange(30 * 4 * 4, dtype=np.uint8).reshape(30, 4, 4)
    plain = struct.pack(">HBB3I", 0, 8, 3, *array.shape) + array.tobytes()
    generator, refused = random.Random(6), 0
    for i in range(400):
        content, end = (gzip.compress(plain, mtime=0), ".gz") if i % 2 else (plain, "")
        changed = bytearray(content)
        kind = generator.choice(("bit", "cut", "grown", "header"))
        if kind == "cut":
            del changed[generator.randrange(len(changed)) :]
        elif kind == "grown":
            changed += generator.randbytes(generator.randint(1, 9))
        else:
            place = generator.randrange(16 if kind == "header" else len(changed))
            changed[place] ^= 1 << generator.randrange(8)
        path = tmp_path / f"images{end}"
        path.write_bytes(changed)
        try:
            read = read_idx(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "fetch it again" in str(error) and "\n" not in str(error)
        else:
            assert read.size == array.size and read.dtype == np.uint8, (i, kind)
    assert refused > 200


@pytest.mark.parametrize("seed", range(12))
def test_damaged_fashion(seed, tmp_path, capsys):
    """The whole program on idx files of which one is damaged."""
    generator = random.Random(seed)
    images = np.zeros((40, 28, 28), np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    for stem in ("train", "t10k"):
        for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
            (tmp_path / name).write_bytes(
                struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + bytes(array)
            )
    victim = generator.choice(sorted(tmp_path.glob("*ubyte")))
    content = victim.read_bytes()
    victim.write_bytes(content[: generator.randrange(len(content))])
    options = ["--data-set", "FASHION", "--data-path", str(tmp_path), "--batch-size", "8", "--device", "cpu"]
    assert outcome(options, capsys) == 2
