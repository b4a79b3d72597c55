"""Fixtures for all tests. Without a GPU, Triton kernels run in Triton's interpreter on the CPU."""

from __future__ import annotations

import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, one a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before the kernels are imported


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", default=default, help=f"device of the tests (default here: {default})")
    parser.addoption(
        "--inexact-sqrt", action="store_true", help="run all tests with square roots like an AMD processor's"
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


class InexactSqrt(TorchDispatchMode):
    """Square roots are one unit in the last place too large in a fifth of all values.

    PyTorch's fp32 square root on AMD processors is wrong like this: always for the same values, on the CPU alone.
    """

    ROOTS = (torch.ops.aten.sqrt, torch.ops.aten.sqrt_, torch.ops.aten._foreach_sqrt, torch.ops.aten._foreach_sqrt_)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in self.ROOTS:
            roots = args[0] if result is None else result
            for root in roots if isinstance(roots, (list, tuple)) else [roots]:
                if root.is_floating_point() and root.element_size() in (4, 8):
                    bits = root.view(torch.int32 if root.element_size() == 4 else torch.int64)
                    bits += ((bits.long() * 0x9E3779B1 >> 16) % 5 == 0) & (root > 0) & root.isfinite()
        return result


@pytest.fixture(params=["exact sqrt", "inexact sqrt"])
def any_processor(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs twice: with this processor's square roots, and with inexact ones."""
    with InexactSqrt() if request.param == "inexact sqrt" else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _inexact_sqrt(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --inexact-sqrt, all tests but those marked `compiles`: Dynamo traces nothing under a dispatch mode."""
    wanted = request.config.getoption("--inexact-sqrt") and request.node.get_closest_marker("compiles") is None
    with InexactSqrt() if wanted else nullcontext():
        yield


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a process that imports the repository's modules, whatever its directory."""
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture(scope="session")
def torchrun(environment):
    """torchrun(directory, script, *arguments, processes=2): that Python script under torchrun, one thread each."""

    def launch(directory: Path, script: str, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
        (directory / "script.py").write_text(script)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        env = environment | {"OMP_NUM_THREADS": "1"}
        options = {"cwd": directory, "env": env, "capture_output": True, "text": True, "timeout": 600}
        return subprocess.run([*command, "script.py", *arguments], **options)

    return launch


@pytest.fixture(scope="session")
def digits_cut_to():
    """`with digits_cut_to(train, held_out):` DIGITS has so many images: the same steps, each in a tenth of its time."""

    @contextmanager
    def cut(train: int, held_out: int) -> Iterator[None]:
        from data.in_memory import Digits

        arrays = Digits.arrays

        def first_ones(self: Digits, training: bool) -> tuple:
            return tuple(array[: train if training else held_out] for array in arrays(self, training))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Digits, "arrays", first_ones)
            yield

    return cut


@pytest.fixture(scope="session")
def interrupted_in_epoch():
    """`with interrupted_in_epoch(n):` runs get ctrl-C when they begin that epoch, counted from 0."""
    from training import loop

    @contextmanager
    def interrupted(number: int) -> Iterator[None]:
        train = loop.train_one_epoch

        def interrupt(step, loader, epoch, *rest):
            if epoch == number:
                raise KeyboardInterrupt
            return train(step, loader, epoch, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "train_one_epoch", interrupt)
            yield

    return interrupted


@pytest.fixture(scope="session")
def interrupted_at_step():
    """`with interrupted_at_step(n):` the process gets ctrl-C when it begins its n-th training step, counted from 1."""
    from engine import TrainStep

    @contextmanager
    def interrupted(number: int) -> Iterator[None]:
        step, calls = TrainStep.__call__, count(1)

        def interrupt(self: TrainStep, batch):
            if next(calls) == number:
                raise KeyboardInterrupt
            return step(self, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainStep, "__call__", interrupt)
            yield

    return interrupted


class Started:
    """A Python script in a process of its own."""

    def __init__(self, pid: int, wait: Callable[[], int], output: list[Path]) -> None:
        self.pid, self._wait, self._output = pid, wait, output

    def result(self) -> subprocess.CompletedProcess:
        """Wait for its end."""
        code = self._wait()
        return subprocess.CompletedProcess([], code, *(path.read_text() for path in self._output))


def wait_or_kill(process: subprocess.Popen) -> int:
    """The exit code. A process that hangs is killed after five minutes."""
    try:
        return process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@contextmanager
def fork_server(env: dict[str, str]) -> Iterator[Callable[..., int] | None]:
    """Yields ask(**request), which returns the server's answer, or None where such a process must not fork.

    It must not where there is a GPU, and where importing the program starts threads, which a forked process would lack
    (seen with PyTorch 2.11 on a machine with a GPU).
    """
    if torch.cuda.is_available():
        yield None
        return
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen(command, **pipes) as server:

        def ask(**request) -> int:
            print(json.dumps(request), file=server.stdin, flush=True)
            return int(server.stdout.readline())

        threads = int(server.stdout.readline())
        yield ask if threads == 1 else None


@pytest.fixture(scope="session")
def start(environment, tmp_path_factory):
    """start(directory, script, *arguments, **environment): a `Started` process, in milliseconds where it can fork.

    For scripts that import the program. Where the start of Python itself is tested, take `subprocess`.
    """
    env = environment | {"OMP_NUM_THREADS": "1"}
    output = tmp_path_factory.mktemp("output")
    with fork_server(env) as ask:

        def launch(directory: Path, script: str, *arguments: str, **more: str) -> Started:
            number = len(list(output.iterdir()))
            files = [output / f"{number}-{kind}" for kind in ("stdout", "stderr")]
            for file in files:
                file.touch()
            if ask is None:
                command = [sys.executable, "-c", script, *arguments]
                with open(files[0], "w") as stdout, open(files[1], "w") as stderr:
                    process = subprocess.Popen(command, cwd=directory, env=env | more, stdout=stdout, stderr=stderr)
                return Started(process.pid, partial(wait_or_kill, process), files)
            stdout, stderr = map(str, files)
            request = {"script": script, "arguments": arguments, "directory": str(directory.resolve())}
            pid = ask(**request, environment=env | more, stdout=stdout, stderr=stderr, timeout=300)
            return Started(pid, partial(ask, wait=pid), files)

        yield launch


@pytest.fixture(scope="session")
def ranks(start):
    """ranks(directory, script, *arguments, processes=2): that script by several processes, as by torchrun.

    Returns the first failure's exit code, or 0, and the output of all of them. In contrast to torchrun's, a process
    that fails does not end the others.
    """

    def launch(directory: Path, script: str, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(processes)}
        there |= {"LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        numbers = [str(rank) for rank in range(processes)]
        started = [start(directory, script, *arguments, **there, RANK=n, LOCAL_RANK=n) for n in numbers]
        results = [process.result() for process in started]
        code = next((result.returncode for result in results if result.returncode), 0)
        output = ("".join(getattr(result, name) for result in results) for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([], code, *output)

    return launch


@pytest.fixture(scope="session")
def busy(environment):
    """`with busy(directory):` another process works in that directory."""
    script = "import sys; from runtime import files; from pathlib import Path\n"
    script += "with files.exclusive(Path(sys.argv[1]), ''): print('here', flush=True); sys.stdin.read()"

    @contextmanager
    def held(directory: Path) -> Iterator[None]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", script, directory], env=environment, **pipes) as process:
            assert process.stdout.readline() == b"here\n"
            yield  # at whose end `with` closes the pipe that it reads

    return held


@pytest.fixture(scope="session")
def evaluated():
    """evaluated(model, images, labels): loss, top-1 and top-5 in percent, from the ranks of the labels in float64."""

    @torch.no_grad()
    def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
        logits = model.eval()(images).double()
        of_label = logits.gather(1, labels[:, None])
        rank = 1 + (logits > of_label).sum(dim=1)
        loss = (logits.exp().sum(dim=1).log() - of_label.flatten()).mean()
        acc1, acc5 = (100 * (rank <= most).double().mean() for most in (1, 5))
        return {"loss": loss.item(), "acc1": acc1.item(), "acc5": acc5.item()}

    return evaluate


@pytest.fixture
def randn(device: torch.device):
    """randn(*shape): normal fp32 on the test device, the same for every run of a test."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


@pytest.fixture
def host_must_not_wait():
    """`with host_must_not_wait():` makes any wait for the GPU an error. Skips where there is none to wait for."""
    if not torch.cuda.is_available():
        pytest.skip("only a GPU can make its host wait")

    @contextmanager
    def guard() -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return guard


@pytest.fixture(scope="session")
def assert_same_bits():
    """assert_same_bits(actual, expected): equal shape, dtype and bits; any NaN equals any NaN."""

    def check(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
        assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
        if actual.is_floating_point():
            both_nan = actual.isnan() & expected.isnan()
            as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
            different = (actual.contiguous().view(as_bits) != expected.contiguous().view(as_bits)) & ~both_nan
        else:
            different = actual != expected
        count = int(different.sum())
        if count:
            first = tuple(different.nonzero()[0].tolist())
            pytest.fail(
                f"{what}: {count} of {different.numel()} differ, first at {first}: "
                f"{actual[first].item()} for {expected[first].item()}"
            )

    return check
