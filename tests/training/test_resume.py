"""A run that is killed, at any step and in any way, and goes on as if it had not been."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

import engine
from data.fingerprint import fingerprint_arrays, fingerprint_files
from main import main
from tracking import tracker
from training import checkpoint

EPOCHS, BATCH, IMAGES, DETECTION = 3, 10, 60, 2
STEPS = IMAGES // BATCH  # of an epoch
DATA = ["--data-set", "FASHION", "--input-size", "8", "--batch-size", str(BATCH), "--device", "cpu", "--lr", "0.01"]
DATA += ["--mixup", "0.8", "--cutmix", "1", "--model-ema-decay", "0.9", "--drop-path", "0.2", "--warmup-epochs", "0"]
DATA += ["--aa", "rand-m9-mstd0.5", "--reprob", "0.5", "--color-jitter", "0.3", "--repeats", "2", "--num-workers", "0"]
RUN = [*DATA, "--epochs", str(EPOCHS), "--quant", "mxfp4", "--q-ema", "--q-ramping", "--q-ramping-k1", "0.5"]
RUN += ["--q-ramping-steps", str(DETECTION)]
CALLS = EPOCHS * STEPS + (EPOCHS - 1) * DETECTION  # training steps of a run, those of detections included
ON_A_GPU = ["--model", "deit_tiny_patch16_224", "--input-size", "224", "--device", "cuda", "--deterministic"]
TRIALS, AT_ONCE = 20, 10  # of them; starting a process takes longest


class Killed(BaseException):
    """An exception that nothing catches."""


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Random images in Fashion-MNIST's files."""
    directory = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for stem, count in (("train", IMAGES), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (directory / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (directory / f"{stem}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return str(directory)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Steps of a few milliseconds are faster so; the processes started here have as many, for the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    assert main([*RUN, "--data-path", data, "--output-dir", str(directory)]) == 0
    return directory


@pytest.fixture
def command(data) -> list[str]:
    return [*RUN, "--data-path", data, "--output-dir", "parts", "--resume", "auto"]


def digest(directory: Path) -> str:
    """SHA-256 of everything in the last checkpoint: names, values, the bits of tensors."""
    found = hashlib.sha256()

    def add(part) -> None:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode() + part.contiguous().numpy().tobytes())
        elif isinstance(part, dict):
            for name in sorted(part, key=repr):
                found.update(repr(name).encode())
                add(part[name])
        elif isinstance(part, (list, tuple)):
            found.update(f"{len(part)} of".encode())
            for item in part:
                add(item)
        else:
            found.update(repr(part).encode())

    add(torch.load(directory / "checkpoint.pth", map_location="cpu", weights_only=True))
    return found.hexdigest()


def numbers(directory: Path) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "log.txt").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("img_per_s", "waited_for_data")} for line in lines
    ]


def assert_same_run(whole: Path, parts: Path = Path("parts")) -> None:
    assert digest(parts) == digest(whole)
    assert numbers(parts) == numbers(whole)
    assert not list(parts.glob(".*"))


def before_step(call: int, act, patch: pytest.MonkeyPatch) -> None:
    """`act()` before training step number `call` from now on; a detection's steps count."""
    step, calls = engine.TrainStep.__call__, iter(range(1, 10**6))

    def counted(self, batch):
        if next(calls) == call:
            act()
        return step(self, batch)

    patch.setattr(engine.TrainStep, "__call__", counted)


def kill(call: int, command: list[str]) -> None:
    """Run until training step number `call`, which does not happen."""

    def die():
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        before_step(call, die, patch)
        with pytest.raises(Killed):
            main(command)


def steps_saved(path: Path = Path("parts/checkpoint.pth")) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    return state["epoch"] * STEPS + state["sums"][0]["steps"]


@pytest.mark.parametrize(
    ("save_steps", "workers"),
    [(1, "0"), (4, "2"), *(pytest.param(n, "0", marks=pytest.mark.long) for n in (2, 5, 7))],
)
def test_killed_four_times_at_random(save_steps, workers, command, whole):
    """20 points in all, detections among them. Loaders' processes change nothing either."""
    command += ["--save-steps", str(save_steps), "--num-workers", workers]
    points = random.Random(save_steps)
    for _ in range(4):
        done = steps_saved()
        to_come = EPOCHS * STEPS - done + DETECTION * sum(done <= epoch * STEPS for epoch in range(1, EPOCHS))
        kill(points.randint(1, min(to_come, save_steps + 5)), command)
        assert steps_saved() >= done
    assert steps_saved() > 0
    assert main(command) == 0
    assert_same_run(whole)


def test_killed_between_any_two_renames(command, whole, monkeypatch):
    """The numbers of log.txt, of the best checkpoint, of the last one and of the one before it."""
    replace = os.replace
    for survived in (0, 1, 2, 3, 4):
        calls = iter(range(100))

        def killed(source, target, calls=calls, survived=survived):
            if next(calls) == survived:
                raise Killed
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(Killed):
                main([*command, "--save-steps", "4"])
    assert main(command) == 0
    assert digest(Path("parts")) == digest(whole) and numbers(Path("parts")) == numbers(whole)


# Arguments: the training step before which the process signals itself, 0 for never; the signal; a command.
DRIVER = """
import os, sys, torch
torch.set_num_threads(1)
import engine, main
step, calls, at, number = engine.TrainStep.__call__, iter(range(1, 10**6)), int(sys.argv[1]), int(sys.argv[2])
def counted(self, batch):
    if next(calls) == at:
        os.kill(os.getpid(), number)
    return step(self, batch)
engine.TrainStep.__call__ = counted
sys.exit(main.main(sys.argv[3:]))
"""


def test_kill_9_of_real_processes(command, whole, start):
    command += ["--save-steps", "2"]
    for call in (4, 6, 5):  # in the first epoch, in a detection, in the second epoch
        killed = start(Path(), DRIVER, str(call), str(int(signal.SIGKILL)), *command).result()
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main(command) == 0
    assert_same_run(whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the same on a CPU has tests of its own")
def test_kill_9_of_deit_tiny_on_a_gpu(data, environment):
    """At 20 of its 22 steps, drawn at random, detections' among them: the run that goes on ends with the same bits."""
    options, env = [*RUN, *ON_A_GPU, "--data-path", data], environment | {"OMP_NUM_THREADS": "1"}

    def process(call: int, number: signal.Signals, arguments: list[str]) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", DRIVER, str(call), str(int(number)), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    result = process(0, signal.SIGKILL, [*options, "--output-dir", "whole"])
    assert result.returncode == 0, result.stderr
    wanted = digest(Path("whole"))
    print(f"\nuninterrupted, {CALLS} steps: sha256 {wanted}", flush=True)
    points = random.Random(0)
    trials = [(call, points.randint(2, STEPS)) for call in points.sample(range(1, CALLS + 1), TRIALS)]

    def trial(number: int) -> None:
        (call, save_steps), parts = trials[number], Path(f"parts-{number}")
        command = [*options, "--output-dir", str(parts), "--resume", "auto", "--save-steps", str(save_steps)]
        killed = process(call, signal.SIGKILL, command)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        resumed = process(0, signal.SIGKILL, command)
        assert resumed.returncode == 0, resumed.stderr
        found = digest(parts)
        print(f"killed before step {call}, saved every {save_steps}: sha256 {found}", flush=True)
        assert found == wanted and numbers(parts) == numbers(Path("whole")) and not list(parts.glob(".*"))
        shutil.rmtree(parts)  # 200 MB a checkpoint

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(trial, range(TRIALS)))


# An uninterrupted run, one of which a process gets SIGTERM, and the rest of that: in one process group, for it takes
# longest to start.
TWO_PROCESSES = """
import os, shutil, signal, sys
from pathlib import Path
import engine, main; from runtime import processes

device = processes.start("cpu")
processes.start, processes.stop, stop = lambda kind: device, lambda: None, processes.stop
step, rank, codes = engine.TrainStep.__call__, processes.rank(), []
for directory, at in (("whole", 0), ("parts", 3), ("parts", 0)):
    calls = iter(range(1, 10**6))

    def counted(self, batch):
        if rank == 1 and next(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    engine.TrainStep.__call__ = counted
    codes.append(main.main([*sys.argv[1:], "--output-dir", directory]))
    if at and rank == 0:
        shutil.copytree("parts", "stopped")
    processes.wait_for_all()
Path(f"codes-{rank}").write_text(str(codes))
stop()
"""


class TestSignals:
    def test_a_checkpoint_at_the_next_step_and_exit_code_75(self, command, whole, capsys):
        """In a training step, in an epoch's last one, in a detection, which is repeated."""
        for call, epoch, steps in ((4, 0, 4), (2, 0, 6), (2, 1, 0)):
            before = signal.getsignal(signal.SIGUSR1)
            with pytest.MonkeyPatch.context() as patch:
                before_step(call, lambda: signal.raise_signal(signal.SIGUSR1), patch)
                assert main(command) == 75
            assert signal.getsignal(signal.SIGUSR1) is before
            error = capsys.readouterr().err.strip().splitlines()[-1]
            wanted = f"main.py: stopped by SIGUSR1 after {epoch} epochs and {steps} steps; --resume auto"
            assert error.endswith(f"{wanted} --output-dir parts goes on from there")
            assert steps_saved() == epoch * STEPS + steps
        assert main(command) == 0
        assert_same_run(whole)

    def test_ctrl_c_writes_a_checkpoint_too_and_its_exit_code_stays_130(self, command, whole, capsys):
        with pytest.MonkeyPatch.context() as patch:
            before_step(4, lambda: signal.raise_signal(signal.SIGINT), patch)
            assert main(command) == 130
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.endswith(
            "interrupted; after 0 epochs and 4 steps; --resume auto --output-dir parts goes on from the last checkpoint"
        )
        assert steps_saved() == 4 and main(command) == 0
        assert_same_run(whole)

    def test_in_a_real_process_with_a_loaders_processes(self, command, whole, start):
        command += ["--num-workers", "1"]
        result = start(Path(), DRIVER, "3", str(int(signal.SIGTERM)), *command).result()
        assert result.returncode == 75, result.stderr
        assert steps_saved() == 3 and main(command) == 0
        assert_same_run(whole)

    def test_two_processes_of_which_one_gets_it(self, data, ranks):
        """Both stop after the step at which they ask each other, the 10th of 15, and go on as if they had not."""
        options = [*RUN, "--batch-size", "2", "--epochs", "2", "--data-path", data, "--resume", "auto"]
        result = ranks(Path(), TWO_PROCESSES, *options)
        assert result.returncode == 0, result.stderr
        assert [Path(f"codes-{rank}").read_text() for rank in range(2)] == ["[0, 75, 0]"] * 2
        saved = torch.load("stopped/checkpoint.pth", weights_only=True)
        assert (saved["epoch"], [sums["steps"] for sums in saved["sums"]]) == (0, [10, 10])
        assert_same_run(Path("whole"))


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory) -> Path:
    """A run that was killed in its second epoch, with three checkpoints."""
    directory = tmp_path_factory.mktemp("stopped")
    options = ["--output-dir", str(directory), "--save-steps", "2", "--keep-checkpoints", "3"]
    kill(STEPS + DETECTION + 6, [*RUN, "--data-path", data, *options])
    return directory


def test_the_run_has_all_that_could_go_wrong(stopped, whole):
    """Otherwise these tests would prove nothing."""
    state = torch.load(stopped / "checkpoint.pth", weights_only=True)
    ramping = [slot for slot in state["optimizer"]["state"].values() if "period" in slot]
    assert any((slot["grad_count"] > 1).any() for slot in ramping)  # half a period is accumulated
    assert state["sums"][0]["extra"]["oscillating"] > 0 and state["sums"][0]["images"] == 4 * BATCH
    assert state["model_ema"] is not None and any(name.endswith("weight_ema") for name in state["model"])
    log = numbers(whole)
    assert len(log) == EPOCHS and len({line["train_loss"] for line in log}) == EPOCHS


class TestCheckpoints:
    @pytest.fixture(autouse=True)
    def copy(self, stopped, in_an_empty_directory):
        shutil.copytree(stopped, "parts")

    def test_the_last_k_stay_beside_the_best(self):
        names = {path.name for path in Path("parts").glob("*.pth")}
        earlier = {"earlier_checkpoint_1.pth", "earlier_checkpoint_2.pth"}
        assert names == {"checkpoint.pth", "best_checkpoint.pth"} | earlier
        found = checkpoint.find_all(Path("parts"))
        assert [steps_saved(path) for path in found] == [10, 8, 6]
        checkpoint.write({}, found[0], keep=10**12)
        assert [path.name for path in checkpoint.find_all(Path("parts"))][1:] == [
            f"earlier_checkpoint_{number}.pth" for number in (1, 2, 3)
        ]
        assert [steps_saved(path) for path in checkpoint.find_all(Path("parts"))[1:]] == [10, 8, 6]
        checkpoint.write({}, found[0], keep=1)
        assert {path.name for path in Path("parts").glob("*.pth")} == names - earlier

    @pytest.mark.parametrize("damage", ["cut short", "empty", "one bit", "foreign", "code", "missing"])
    def test_a_damaged_one_is_passed_over(self, damage, capsys):
        last, before = checkpoint.find_all(Path("parts"))[:2]
        content = bytearray(last.read_bytes())
        state = torch.load(last, weights_only=True)
        if damage == "one bit":
            content[len(content) // 2] ^= 1
            last.write_bytes(content)
        elif damage in ("cut short", "empty"):
            last.write_bytes(content[: len(content) // 2 if damage == "cut short" else 0])
        elif damage == "foreign":
            torch.save({"state_dict": {}}, last)
        elif damage == "code":
            torch.save(state | {"epoch": Path("a class, which is not to be made")}, last)
        else:  # killed between two renames
            last.unlink()
        found, _ = checkpoint.load_newest(checkpoint.find_all(Path("parts")), state["identity"])
        note = f"note    {last} is damaged or not ours; going on from the one before, {before}\n"
        assert found == before and capsys.readouterr().out == ("" if damage == "missing" else note)

    def test_a_run_goes_on_from_the_one_before(self, command, whole, capsys):
        last = Path("parts/checkpoint.pth")
        last.write_bytes(last.read_bytes()[:5000])
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert "note    parts/checkpoint.pth is damaged" in printed
        assert "resume  parts/earlier_checkpoint_1.pth, 1 of 3 epochs and 2 of 6 steps done" in printed
        assert_same_run(whole)
        assert len(checkpoint.find_all(Path("parts"))) == 2

    def test_one_that_was_cut_short_takes_no_place(self):
        last, before = checkpoint.find_all(Path("parts"))[:2]
        last.write_bytes(last.read_bytes()[:-100])
        checkpoint.write({"epoch": 7}, last, keep=2)
        assert torch.load(last, weights_only=True) == {"epoch": 7} and steps_saved(before) == 8

    def test_nothing_intact_is_a_mistake(self, command, capsys):
        for path in Path("parts").glob("*.pth"):
            path.write_bytes(b"")
        assert main(command) == 2
        assert "is not a readable checkpoint: damaged, or of another program" in capsys.readouterr().err

    def test_other_data_are_refused(self, data, capsys):
        shutil.copytree(data, "changed")
        path = Path("changed/t10k-labels-idx1-ubyte")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # one label
        path.write_bytes(content)
        before = {path: path.stat().st_mtime_ns for path in Path("parts").rglob("*")}
        assert main([*RUN, "--data-path", "changed", "--output-dir", "parts", "--resume", "auto"]) == 2
        error = capsys.readouterr().err.strip()
        assert "--resume needs a checkpoint of the same data: this run has 60 images, sha256 " in error
        assert "\n" not in error
        assert before == {path: path.stat().st_mtime_ns for path in Path("parts").rglob("*")}

    def test_a_full_disk_leaves_what_was_there(self):
        state = torch.load("parts/checkpoint.pth", weights_only=True)
        before = {path: path.read_bytes() for path in Path("parts").glob("*.pth")}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(OSError, match="checkpoint.pth could not be written: .*; is the disk full?"):
                checkpoint.write(state, Path("parts/checkpoint.pth"), keep=3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert before == {path: path.read_bytes() for path in Path("parts").glob("*.pth")}
        assert not list(Path("parts").glob(".*"))


def test_a_tracked_window_in_progress_goes_on(data, monkeypatch):
    """Killed before, at the start of and within a window of 3 of 6 steps: the same oscillation.csv."""
    monkeypatch.setattr(tracker, "TRACKED_STEPS", 3)
    options = [*RUN, "--epochs", "2", "--data-path", data, "--track-oscillation"]
    assert main([*options, "--output-dir", "whole"]) == 0
    command = [*options, "--output-dir", "parts", "--resume", "auto", "--save-steps", "1"]
    for call in (3, 2, 2):  # after 2, 3 and 4 steps
        kill(call, command)
    assert main(command) == 0
    assert Path("parts/oscillation.csv").read_text() == Path("whole/oscillation.csv").read_text()
    assert_same_run(Path("whole"))


REMEDIES = {
    "dampen": ["--dampen", "0.1"],
    "osci-reset back to back": ["--osci-reset", "--osci-reset-start", "2", "--osci-reset-window", "3"],
    "heal": ["--heal", "2", "--q-ema", "--model-ema-decay", "0.9"],
    "keep-blocks": ["--keep-blocks", "0", "--freeze", "0.002"],
}


@pytest.mark.parametrize("name", REMEDIES)
def test_the_other_remedies(name, data):
    options = [*DATA, "--quant", "mxfp4", "--epochs", "2", "--data-path", data, *REMEDIES[name]]
    assert main([*options, "--output-dir", "whole"]) == 0
    command = [*options, "--output-dir", "parts", "--resume", "auto", "--save-steps", "1"]
    for call in (6, 4):  # OsciReset has a window open, both times
        kill(call, command)
    assert main(command) == 0
    assert_same_run(Path("whole"))


def test_a_checkpoint_every_second_epoch(command, whole):
    """The last epoch has one whatever the interval, and so has the best."""
    command += ["--save-epochs", "2"]
    kill(STEPS + DETECTION + 3, command)
    assert Path("parts/best_checkpoint.pth").is_file() and not Path("parts/checkpoint.pth").exists()
    assert len(numbers(Path("parts"))) == 1
    assert main(command) == 0
    assert_same_run(whole)


def test_steps_between_checkpoints_are_counted_over_the_whole_run(data):
    """Every 4 of 12 steps, where an epoch has 6, and the last epoch's end."""
    options = [*DATA, "--data-path", data, "--output-dir", "out", "--epochs", "2"]
    assert main([*options, "--save-steps", "4", "--save-epochs", "2", "--keep-checkpoints", "9"]) == 0
    assert [steps_saved(path) for path in checkpoint.find_all(Path("out"))] == [12, 8, 4]


def test_the_tenth_checkpoint_follows_the_ninth():
    path = Path("many/checkpoint.pth")
    path.parent.mkdir()
    for epoch in range(14):
        checkpoint.write({"epoch": epoch}, path, keep=12)
    found = checkpoint.find_all(path.parent)
    assert [torch.load(p, weights_only=True)["epoch"] for p in found] == list(range(13, 1, -1))


class TestFingerprint:
    @staticmethod
    def of_folder(root: str, content: dict[str, bytes]) -> str:
        for name, pixels in content.items():
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pixels)
        files = ImageFolder(root)
        return fingerprint_files(files.root, files.samples)

    def test_of_folders_follows_names_classes_and_sizes(self):
        content = {"a/1.png": b"xx", "a/2.png": b"yyy", "b/1.png": b"z"}
        first = self.of_folder("one", content)
        assert first.startswith("3 images, sha256 ") and self.of_folder("elsewhere/two", content) == first
        changed = [content | {"a/2.png": b"y"}, content | {"b/2.png": b""}]
        for other in ("a/3", "b/2"):
            changed.append({name.replace("a/2", other): pixels for name, pixels in content.items()})
        found = {self.of_folder(f"changed-{i}", c) for i, c in enumerate(changed)}
        assert len(found) == 4 and first not in found

    def test_of_many_files_a_few_sizes_evenly_spaced(self, monkeypatch):
        """At most 4 of 10: the first, fourth, seventh and last."""
        monkeypatch.setattr("data.fingerprint.MOST_SIZES", 4)
        content = {f"a/{i}.png": b"x" for i in range(10)}
        first = self.of_folder("all", content)
        other = [self.of_folder("all", content | {name: b"xx"}) != first for name in content]
        assert [i for i, differs in enumerate(other) if differs] == [0, 3, 6, 9]

    def test_of_arrays_follows_every_byte(self):
        pixels, labels = np.zeros((4, 3, 3), np.uint8), [0, 1, 2, 3]
        other = pixels.copy()
        other[3, 2, 2] = 1
        found = [fingerprint_arrays(*pair) for pair in ((pixels, labels), (other, labels), (pixels, labels[::-1]))]
        found.append(fingerprint_arrays(pixels.reshape(4, 1, 9), labels))
        assert len(set(found)) == 4 and found[0] == fingerprint_arrays(pixels.copy(), list(labels))

    def test_its_text_stays_as_checkpoints_hold_it(self, tmp_path):
        """The hashed bytes are written out here; a broken symbolic link has the size None."""
        pixels, labels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4), [7, 1]
        content = b"uint8 (2, 3, 4)\0" + bytes(range(24)) + b"int64 (2,)\0" + struct.pack("<2q", 7, 1)
        wanted = f"2 images, sha256 {hashlib.sha256(content).hexdigest()[:16]}"
        assert fingerprint_arrays(pixels, labels) == wanted
        assert fingerprint_arrays(pixels.transpose(0, 2, 1).copy().transpose(0, 2, 1), np.array(labels)) == wanted
        (tmp_path / "x.png").write_bytes(b"12345")
        samples = [(f"{tmp_path}/x.png", 0), (f"{tmp_path}/missing.png", 3)]
        content = b"x.png\x000\0missing.png\x003\x005\0None\0"
        wanted = f"2 images, sha256 {hashlib.sha256(content).hexdigest()[:16]}"
        assert fingerprint_files(str(tmp_path), samples) == fingerprint_files(f"{tmp_path}/", samples) == wanted
