"""Steps that are not finite: nothing of them stays, they are counted, and ten in a row stop the run."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from engine import TrainStep, train_one_epoch
from main import main
from quantization import QEma, QuantLinear, RampingAdamW, Recipe, detect_oscillation, take_lost_groups
from quantization.matmul import underflow_counters
from runtime.errors import NonFiniteSteps
from runtime.nonfinite import MOST_IN_A_ROW, Skips, StepRecord, first_output_that_is_not_finite
from tracking import oscillation_csv
from training import setup
from training.loop import update_average

NAN, INF = float("nan"), float("inf")
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Batch norm, a quantized layer with a moving average, and a head. It draws no random number going forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(40)
        self.hidden = QuantLinear(40, 32, recipe=Recipe().with_q_ema(0.9))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.hidden(self.norm(x))))


class Training:
    """A run on `Net` with everything that has a state."""

    def __init__(self, optimizer: str, device: torch.device, clip_grad: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = Net().to(device).train()
        options = {"lr": 0.01, "weight_decay": 0.1}
        if optimizer == "RampingAdamW":
            self.optimizer = RampingAdamW(self.model.parameters(), **options)
            weight = self.model.hidden.weight
            self.optimizer.set_periods({weight: torch.randint(1, 4, weight.shape, device=device)})
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), **options, fused=device.type == "cuda")
        self.q_ema, self.average = QEma(self.model), ModelEmaV3(self.model, 0.9)
        self.step = TrainStep(self.model, self.criterion, self.optimizer, device, clip_grad=clip_grad)
        self.poison: Callable[[Tensor], Tensor] = lambda loss: loss

    def criterion(self, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.poison(F.cross_entropy(outputs, targets))

    def __call__(self, batch: Batch, seed: int) -> None:
        torch.manual_seed(seed)  # stochastic rounding draws the same in runs with and without the steps before
        self.step(batch)
        self.q_ema.after_step(self.step.skip)
        update_average(self.average, self.model, self.step.skip)

    def state(self) -> list[Tensor]:
        tensors = [*self.model.state_dict().values(), *self.average.state_dict().values()]
        return [t.clone() for t in (*tensors, *(v for s in self.optimizer.state.values() for v in s.values()))]


@pytest.fixture
def batches(randn, device) -> list[Batch]:
    return [(randn(8, 40), torch.arange(8, device=device) % 3) for _ in range(8)]


def nan_image(training: Training, batch: Batch) -> Batch:
    images = batch[0].clone()
    images[3, 5] = NAN
    return images, batch[1]


def infinite_image(training: Training, batch: Batch) -> Batch:
    images = batch[0].clone()
    images[0, 0] = INF
    return images, batch[1]


def loss_without_its_gradient(training: Training, batch: Batch) -> Batch:
    training.poison = lambda loss: loss + NAN
    return batch


def loss_cut_off(training: Training, batch: Batch) -> Batch:
    """A loss that is NaN while all gradients are 0."""
    training.poison = lambda loss: torch.where(torch.ones_like(loss, dtype=torch.bool), NAN, loss)
    return batch


def gradient_of_one_layer(training: Training, batch: Batch) -> Batch:
    handle = training.model.hidden.bias.register_hook(lambda g: handle.remove() or torch.full_like(g, INF))
    return batch


def norm_beyond_fp32(training: Training, batch: Batch) -> Batch:
    training.poison = lambda loss: loss * 1e25
    return batch


POISONS = [
    nan_image,
    infinite_image,
    loss_without_its_gradient,
    loss_cut_off,
    gradient_of_one_layer,
    norm_beyond_fp32,
]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("clip_grad", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", ["AdamW", "RampingAdamW"])
def test_a_skipped_step_never_happened(optimizer, clip_grad, poison, batches, device, assert_same_bits):
    """Step 0 among the skipped ones: no state before it. Against a run that never saw the poisoned batches."""
    skipped = {0, 3, 4}
    run, other = Training(optimizer, device, clip_grad), Training(optimizer, device, clip_grad)
    for i, batch in enumerate(batches):
        if i in skipped:
            before = run.state()
            run(poison(run, batch), seed=i)
            run.poison = lambda loss: loss
            after = run.state()
            if i > 0:  # the optimizer makes its state in the first step
                for a, b in zip(after, before, strict=True):
                    assert_same_bits(a, b, f"step {i}")
        else:
            run(batch, seed=i)
            other(batch, seed=i)
        assert run.step.skip.item() == (i in skipped)
    run.step.settle()
    assert run.step.skips.count == 3 and run.step.skips.in_a_row == 0
    for a, b in zip(run.state(), other.state(), strict=True):
        assert_same_bits(a, b)


def test_without_a_flag_averages_follow_the_formula_and_timm(batches, device, assert_same_bits):
    """Against numpy's fp32, bit for bit, and against timm's average, whose bits depend on the processor."""

    def follow(average: np.ndarray, value: torch.Tensor) -> np.ndarray:
        return average + (value.detach().cpu().numpy() - average) * np.float32(1 - 0.9)

    run = Training("AdamW", device)
    theirs, ema = ModelEmaV3(run.model, 0.9), run.model.hidden.weight_ema.cpu().numpy().copy()
    means = {name: p.detach().cpu().numpy().copy() for name, p in run.model.named_parameters()}
    for i, batch in enumerate(batches):
        run(batch, seed=i)
        theirs.update(run.model)
        means = {name: follow(means[name], p) for name, p in run.model.named_parameters()}
        ema = follow(ema, run.model.hidden.weight)
        ours = run.average.module.state_dict()
        for name, mean in means.items():
            assert_same_bits(ours[name].cpu(), torch.from_numpy(mean), name)
        for a, b in zip(ours.values(), theirs.module.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert_same_bits(run.model.hidden.weight_ema.cpu(), torch.from_numpy(ema))


def test_an_epochs_means_are_those_of_its_other_steps(batches, device):
    run = Training("AdamW", device)
    loader = [nan_image(run, batch) if i == 2 else batch for i, batch in enumerate(batches)]
    numbers = train_one_epoch(run.step, loader, 0, 1, lambda: None)
    other = Training("AdamW", device)
    torch.manual_seed(0)
    losses = [other.step(batch)[0].item() for batch in loader]
    assert numbers["skipped_steps"] == 1
    good = losses[:2] + losses[3:]
    assert numbers["train_loss"] == pytest.approx(sum(good) / 7, rel=0.05) and losses[2] != losses[2]
    assert numbers["train_loss"] == numbers["train_loss"]


def test_a_skipped_step_of_a_detection_is_no_movement(batches, device):
    """The ratios are those over the other steps."""
    ratios = []
    for poisoned in (True, False):
        run = Training("RampingAdamW", device)
        loader = batches[:4]
        if poisoned:
            loader = [loader[0], nan_image(run, loader[1]), *loader[1:]]
        places = iter([0, -1, 1, 2, 3] if poisoned else range(4))

        def step(batch, run=run, places=places):
            torch.manual_seed(next(places) + 10)
            run.step(batch)

        before = [t.clone() for t in run.state()]
        ratios.append(detect_oscillation(run.model, run.optimizer, step, loader, steps=len(loader)))
        run.step.settle()
        assert run.step.skips.count == poisoned
        assert all(torch.equal(a, b) for a, b in zip(run.state(), before, strict=True))
    for a, b in zip(*(r.values() for r in ratios), strict=True):
        assert torch.equal(a, b) and a.any()


STOPS = [
    (nan_image, r"the first output that is not finite is that of norm, and the images are not finite themselves"),
    (loss_without_its_gradient, r"loss nan: every layer's output is finite, the loss is not"),
    (gradient_of_one_layer, r"loss \d\.\d+: every layer's output is finite, the gradient of hidden.bias is not"),
    (norm_beyond_fp32, r"loss \d[\d.e+]+: every layer's output is finite, the gradient of norm.weight is not or its"),
]


@pytest.mark.parametrize(("poison", "cause"), STOPS, ids=[poison.__name__ for poison, _ in STOPS])
def test_ten_in_a_row_stop_the_run_and_name_the_cause(poison, cause, batches, device):
    run = Training("AdamW", device)
    run(batches[0], seed=0)
    run.step.place = "epoch 1, step 2"
    before = run.state()
    for _ in range(MOST_IN_A_ROW):
        run.step(poison(run, batches[1]))
    generator = torch.get_rng_state()
    with pytest.raises(NonFiniteSteps, match=r"at epoch 1, step 2, learning rate 0\.01, loss ") as stopped:
        run.step.settle()
    assert re.search(cause, str(stopped.value)), stopped.value
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(a, b) for a, b in zip(run.state(), before, strict=True))


def test_nine_in_a_row_do_not_and_the_eleventh_step_is_not_taken(batches, device):
    run = Training("AdamW", device)
    run(batches[0], seed=0)
    for _ in range(2):
        for _ in range(MOST_IN_A_ROW - 1):
            run.step(nan_image(run, batches[1]))
        run.step(batches[2])
    run.step.settle()
    assert run.step.skips.count == 2 * (MOST_IN_A_ROW - 1)
    for _ in range(MOST_IN_A_ROW):
        run.step(nan_image(run, batches[1]))
    before = run.state()
    with pytest.raises(NonFiniteSteps):
        run.step(batches[3])
    assert all(torch.equal(a, b) for a, b in zip(run.state(), before, strict=True))


def test_the_row_goes_on_in_another_process(device):
    bad = StepRecord(torch.zeros(1), torch.tensor(NAN, device=device), torch.ones(1, device=device), "here")
    skips, other = Skips(), Skips()
    for _ in range(MOST_IN_A_ROW - 1):
        skips.decide(bad)
        assert skips.settle() is None
    other.load_state_dict(copy.deepcopy(skips.state_dict()))
    other.decide(bad)
    assert other.settle() is bad and bad.in_a_row == MOST_IN_A_ROW and other.settle() is None and other.in_a_row == 0


def test_the_innermost_module_is_named_and_running_statistics_stay(batches, device):
    model = nn.Sequential(nn.Linear(40, 40), Net()).to(device).train()
    model[1].hidden.weight.data[3, 4] = 1e38
    model[1].hidden.bias.data.fill_(INF)
    before = copy.deepcopy(model.state_dict())
    assert first_output_that_is_not_finite(model, batches[0][0]) == "1.hidden"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert first_output_that_is_not_finite(nn.Linear(40, 1).to(device), batches[0][0]) is None


TWO_PROCESSES = """
import torch
from torch import nn
from runtime import processes
from engine import TrainStep
from runtime.errors import NonFiniteSteps

def train(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    bad_now = bad_everywhere = False

    def criterion(images, outputs, targets):  # NaN with gradients of 0 in one process, a finite loss in the other
        loss = nn.functional.cross_entropy(outputs, targets)
        bad_here = bad_everywhere or bad_now and processes.rank() == 1
        return torch.where(torch.tensor(bad_here), float("nan"), loss)

    parallel = nn.parallel.DistributedDataParallel(model)
    step = TrainStep(parallel, criterion, torch.optim.AdamW(model.parameters(), lr=0.1), device)
    torch.manual_seed(processes.rank())
    try:
        for i in range(4 + 11):
            bad_now, bad_everywhere = i in (2, 3) or i >= 5, i == 3
            before = [p.clone() for p in model.parameters()]
            step((torch.randn(4, 6), torch.arange(4) % 3))
            same = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
            assert same == bad_now == step.skip.item(), (i, same, step.skip)  # counters and averages go by 1 - skip
        step.settle()
    except NonFiniteSteps as error:
        for told in processes.gather((step.skips.count, i, str(error), [p.tolist() for p in model.parameters()])):
            if processes.is_main(): print(told)

train(processes.start("cpu"))
processes.stop()
"""


def test_processes_agree(tmp_path, ranks):
    """A NaN in one process alone, which no gradient tells the other; or in both."""
    result = ranks(tmp_path, TWO_PROCESSES)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == second and first.startswith("(12, 14, ")
    assert "learning rate 0.1, loss nan: every layer's output is finite, the loss is not" in first


IMAGES, HELD_OUT = 133, 36  # of DIGITS: 14 steps of 9 images, 44 of 3 or 4 of 33
RUN = ["--quant", "mxfp4", "--batch-size", "9", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu"]
RUN += ["--lr", "0.3", "--output-dir", "out"]


@pytest.fixture
def small_runs(monkeypatch, tmp_path, digits_cut_to):
    monkeypatch.chdir(tmp_path)
    with digits_cut_to(IMAGES, HELD_OUT):
        yield


@pytest.fixture
def poisoned(monkeypatch, small_runs):
    """poisoned(steps): in these steps, counted from 0, the first block's fc1 puts out infinite numbers."""
    build = setup.build_model

    def poison(steps: Collection[int]) -> None:
        def build_poisoned(*arguments, **options):
            model, calls = build(*arguments, **options), iter(range(10**6))

            def hook(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
                if (
                    "forward" in vars(layer) or not layer.training
                ):  # while the model's coverage is measured, or evaluated
                    return None
                return output * INF if next(calls) in steps else None

            model.blocks[0].mlp.fc1.register_forward_hook(hook)
            return model

        monkeypatch.setattr(setup, "build_model", build_poisoned)

    return poison


@pytest.mark.parametrize(
    "answer",
    [["--q-ema"], ["--freeze", "0.01"], ["--osci-reset"], ["--dampen", "0.1"], ["--heal", "1", "--keep-blocks", "0"]],
)
def test_a_run_counts_what_it_skips(answer, poisoned, capsys):
    poisoned(range(3, 5))
    assert main([*RUN, *answer, "--model-ema-decay", "0.9"]) == 0
    log = json.loads(Path("out/log.txt").read_text())
    assert log["skipped_steps"] == 2 and log["train_loss"] < 5 and log["ema_acc1"] > 0
    assert "2 steps were not finite and skipped" in capsys.readouterr().out
    state = torch.load("out/checkpoint.pth", weights_only=True)
    done = 14 - 2  # of the 14 steps
    assert {s["step"].item() for s in state["optimizer"]["state"].values()} == {done}
    if answer == ["--q-ema"]:
        assert {int(v) for name, v in state["model"].items() if name.endswith("ema_updates")} == {done}
    else:
        steps = {remedy["step"] for remedy in state["more"]["remedies"].values() if "step" in remedy}
        assert steps == (set() if "--heal" in answer else {done})
    assert all(v.isfinite().all() for part in ("model", "model_ema") for v in state[part].values())


def test_a_diverged_run_leaves_a_checkpoint_to_go_on_from(poisoned, capsys):
    poisoned(range(2, 100))
    assert main(RUN) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(
        r"main.py: diverged: loss or gradients were not finite in 10 steps in a row, the last at epoch 1, step 12, "
        r"learning rate [\d.e-]+, loss nan: the first output that is not finite is that of blocks\.0\.mlp\.fc1; "
        r"lower --lr, lengthen --warmup-epochs, or look at the data",
        error,
    )
    state = torch.load("out/checkpoint.pth", weights_only=True)
    assert {s["step"].item() for s in state["optimizer"]["state"].values()} == {2}
    assert all(v.isfinite().all() for v in state["model"].values()) and state["more"]["skips"] == {"in_a_row": 0}
    assert (state["sums"][0]["steps"], state["sums"][0]["images"]) == (2, 2 * 9)
    poisoned(range(0))
    assert main([*RUN, "--resume", "auto"]) == 0
    assert json.loads(Path("out/log.txt").read_text().splitlines()[-1])["skipped_steps"] == 0


def test_what_it_counts_and_measures_leaves_the_repeated_steps_out(poisoned, monkeypatch):
    step, lost = TrainStep.__call__, underflow_counters(torch.device("cpu")).forward

    def losing_a_group(self, batch):
        lost.add_(1)
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", losing_a_group)
    command = [*RUN, "--batch-size", "3", "--track-oscillation"]  # 44 steps
    take_lost_groups(torch.device("cpu"))
    poisoned(range(20, 100))
    assert main(command) == 1
    assert torch.load("out/checkpoint.pth", weights_only=True)["sums"][0]["lost_groups"] == 20
    take_lost_groups(torch.device("cpu"))  # another process begins with none
    poisoned(range(0))
    assert main([*command, "--resume", "auto"]) == 0
    assert json.loads(Path("out/log.txt").read_text())["lost_groups"] == 44
    assert {row.window for row in oscillation_csv.read(Path("out/oscillation.csv"))} == {24}


def test_skipped_steps_are_counted_by_the_epoch(poisoned):
    poisoned(range(1, 3))
    assert main([*RUN, "--batch-size", "33", "--epochs", "3"]) == 0
    assert [json.loads(line)["skipped_steps"] for line in Path("out/log.txt").open()] == [2, 0, 0]


def test_skipped_steps_are_those_of_the_whole_epoch_also_in_a_run_that_goes_on(
    poisoned, interrupted_at_step, digits_cut_to
):
    """Two are skipped before it is interrupted, one after that, before ten more end it, and one after that."""
    command = [*RUN, "--quant", "none", "--batch-size", "2", "--save-steps", "1", "--resume", "auto"]
    with digits_cut_to(88, 88):  # 44 steps
        poisoned({1, 2})
        with interrupted_at_step(6):
            assert main(command) == 130
        poisoned({0, *range(10, 100)})
        assert main(command) == 1
        (sums,) = torch.load("out/checkpoint.pth", weights_only=True)["sums"]
        assert (sums["steps"], sums["skipped_steps"]) == (5 + 10, 2 + 1)
        poisoned({3})
        assert main(command) == 0
    assert json.loads(Path("out/log.txt").read_text())["skipped_steps"] == 2 + 1 + 1


@pytest.mark.parametrize(("first", "row"), [(4, 4), (3, 5)], ids=["all of the last epoch", "more than that"])
def test_a_run_that_ends_with_an_epoch_of_skipped_steps_has_diverged(first, row, poisoned, capsys):
    """Two epochs of four steps: ten in a row would never come."""
    command = [*RUN, "--batch-size", "33", "--epochs", "2"]
    poisoned(range(first, 100))
    assert main(command) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"not finite in {row} steps in a row, the last at epoch 2, step 4, learning rate" in error
    assert "the first output that is not finite is that of blocks.0.mlp.fc1" in error
    state = torch.load("out/checkpoint.pth", weights_only=True)
    assert state["epoch"] == 1 and state["sums"][0]["steps"] == state["sums"][0]["skipped_steps"] == 0
    assert {s["step"].item() for s in state["optimizer"]["state"].values()} == {first}
    poisoned(range(0))
    assert main([*command, "--resume", "auto"]) == 0
    log = [json.loads(line) for line in Path("out/log.txt").read_text().splitlines()]
    assert [line["skipped_steps"] for line in log] == [4 - first, 0]


def test_a_run_whose_weights_end_beyond_fp32_has_diverged_too(small_runs, capsys):
    """The step that ruins them is finite, and fewer than ten are left for skipping."""
    for more in ((), ("--resume", "auto")):  # it has not become a run that is done
        assert main([*RUN, "--batch-size", "33", "--lr", "1e30", *more]) == 1
        assert "diverged: the held-out loss after the last epoch is nan; lower --lr" in capsys.readouterr().err
        assert not list(Path("out").glob("*.pth"))


def test_a_run_that_ends_with_fewer_has_not(poisoned):
    poisoned(range(5, 100))
    assert main([*RUN, "--batch-size", "33", "--epochs", "2"]) == 0
    log = [json.loads(line) for line in Path("out/log.txt").read_text().splitlines()]
    assert [line["skipped_steps"] for line in log] == [0, 3]
