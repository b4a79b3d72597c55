"""The epochs of a run: training and evaluation modes, the numbers that are logged, and the best checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import timm
from data.in_memory import Digits
from datasets import DataConfig, build_loaders, set_epoch
from main import main
from quantization import Recipe, quant_linears
from training import loop, setup
from training.loop import Training

TRAINING = 12
HELD_OUT = [0] + 3 * [1] + 2 * [2] + 4 * [3]
CLASS_OF = {10.0: 0, 30.0: 1, 20.0: 2, 40.0: 3}
"""A model that predicts this class for every held-out image has this top-1 accuracy in percent."""

RUN = ["--model", "deit_micro_patch4_32", "--input-size", "8", "--device", "cpu", "--warmup-epochs", "0", "--lr", "2"]
AVERAGED = [*RUN, "--quant", "mxfp4", "--epochs", "2", "--batch-size", "4", "--model-ema-decay", "0.9"]
STEPS, EVALUATION, DETECTION = 12 // 4, 3, 2  # batches; those of the ten held-out images have 4, 4 and 2
DECIDED = [*RUN, "--quant", "none", "--epochs", "3", "--batch-size", "12", "--output-dir", "out"]


@pytest.fixture(scope="module", autouse=True)
def few_digits() -> Iterator[None]:
    """DIGITS has 12 random training images, and held-out ones with the labels `HELD_OUT`."""
    images = np.random.default_rng(0).integers(0, 256, (TRAINING + len(HELD_OUT), 8, 8), dtype=np.uint8)

    def few(self: Digits, training: bool) -> tuple[np.ndarray, np.ndarray]:
        return (images[:TRAINING], np.arange(TRAINING) % 10) if training else (images[TRAINING:], np.array(HELD_OUT))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Digits, "arrays", few)
        yield


def log(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.txt").read_text().splitlines()]


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


class Recorded:
    """A run, and all forward passes of its model and of its weight average, in order."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.passes: list[tuple[str, set[bool]]] = []
        """The name of the model, and the modes of all its modules: True is training mode."""
        with pytest.MonkeyPatch.context() as patch:
            build = setup.build_model
            patch.setattr(
                setup, "build_model", lambda *arguments, **options: self._watched(build(*arguments, **options))
            )
            assert main([*AVERAGED, *options, "--output-dir", str(directory)]) == 0
        assert self.passes[:2] == [("model", {True}), ("model", {False})]  # which measure the model's coverage
        del self.passes[:2]

    def _watched(self, model: nn.Module) -> nn.Module:
        def record(module: nn.Module, inputs: tuple) -> None:  # the average copies the model with its hook
            who = "model" if module is model else "average"
            self.passes.append((who, {part.training for part in module.modules()}))

        model.register_forward_pre_hook(record)
        return model


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="module")
def epochs(recorded) -> list[tuple[list, list, list]]:
    """The forward passes of each epoch: training steps, evaluation of the model, evaluation of the average."""
    length = STEPS + 2 * EVALUATION
    assert len(recorded.passes) == 2 * length
    whole = recorded.passes[:length], recorded.passes[length:]
    return [(passes[:STEPS], passes[STEPS:-EVALUATION], passes[-EVALUATION:]) for passes in whole]


class TestModes:
    @pytest.mark.parametrize("epoch", [0, 1])
    def test_training_steps_run_in_training_mode(self, epoch, epochs):
        """The second epoch follows an evaluation, which leaves the model in evaluation mode."""
        assert epochs[epoch][0] == [("model", {True})] * STEPS

    def test_the_model_is_evaluated_in_evaluation_mode(self, epochs):
        assert [tested for _, tested, _ in epochs] == [[("model", {False})] * EVALUATION] * 2

    def test_the_average_is_evaluated_in_evaluation_mode(self, epochs):
        assert [averaged for *_, averaged in epochs] == [[("average", {False})] * EVALUATION] * 2

    def test_a_detection_runs_in_training_mode_and_leaves_it_so(self, tmp_path):
        """The detection lies between the evaluations of the first epoch and the training steps of the second."""
        run = Recorded(tmp_path / "out", "--q-ramping", "--q-ramping-steps", str(DETECTION))
        first = STEPS + 2 * EVALUATION
        assert len(run.passes) == 2 * first + DETECTION
        assert run.passes[first : first + DETECTION + STEPS] == [("model", {True})] * (DETECTION + STEPS)


class TestDetection:
    @pytest.fixture
    def training(self, built) -> Training:
        options = ["--q-ramping", "--q-ramping-steps", "2", "--q-ramping-k2", "1", "--warmup-epochs", "0"]
        return built(*RUN, "--quant", "mxfp4", *options, "--batch-size", "4")

    def test_each_has_an_order_of_its_own(self, training):
        seen: list[torch.Tensor] = []
        handle = training.progress.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
        for epoch in (1, 2):
            training.remedies["q_ramping"].before_epoch(epoch)
        handle.remove()
        for epoch in (1, 2):
            set_epoch(training.loaders.train, training.data, epoch)
            seen += [images for (images, _), _ in zip(training.loaders.train, range(2))]
        assert len(seen) == 8
        for i in range(8):
            assert not any(torch.equal(seen[i], seen[j]) for j in range(i))

    def test_its_numbers_are_those_of_the_periods(self, training):
        """With k1 = 16 and k2 = 1 a weight's period exceeds 1 where it oscillates. Both numbers are over all weights,
        the share is in percent."""
        numbers = training.remedies["q_ramping"].before_epoch(1)
        state = training.step.optimizer.state
        weights = [layer.weight for layer in quant_linears(training.progress.model).values()]
        periods = torch.cat([state[weight]["period"].double().flatten() for weight in weights])
        assert len(weights) == 8 and (periods > 1).any()
        assert numbers["oscillating"] == pytest.approx(100 * (periods > 1).double().mean().item())
        assert numbers["mean_period"] == pytest.approx(periods.mean().item())


def test_model_and_average_are_evaluated_each_by_its_own_weights(recorded, evaluated):
    """The test loads the weights of the checkpoint into new models and evaluates them itself."""
    state, numbers = load(recorded.directory / "checkpoint.pth"), log(recorded.directory)[-1]
    no_augmentation = {"repeats": 1, "aa": "none", "color_jitter": 0.0, "reprob": 0.0}
    config = DataConfig("DIGITS", None, False, 8, batch_size=10, num_workers=0, seed=0, **no_augmentation)
    ((images, labels),) = build_loaders(config).val
    weights = {"test": state["model"], "ema": {k.removeprefix("module."): v for k, v in state["model_ema"].items()}}
    found = {}
    for which in ("test", "ema"):
        model = timm.create_model("deit_micro_patch4_32", img_size=8, num_classes=10, quant=Recipe())
        model.load_state_dict(weights[which])
        found[which] = evaluated(model, images, labels)
        assert {name: numbers[f"{which}_{name}"] for name in found[which]} == pytest.approx(found[which], rel=1e-4)
    assert abs(found["test"]["loss"] - found["ema"]["loss"]) > 0.01


@pytest.fixture
def decide(monkeypatch, tmp_path):
    """decide(accuracies): after epoch i of a run, the head predicts one class for every image, so that accuracies[i] %
    of the held-out images are right. The run is interrupted at the start of epoch `killed`."""
    monkeypatch.chdir(tmp_path)
    train = loop.train_one_epoch

    def plan(accuracies: list[float], killed: int | None = None) -> None:
        def then_decide(step, loader, epoch, *rest):
            if epoch == killed:
                raise KeyboardInterrupt
            trained, head = train(step, loader, epoch, *rest), step.model.head
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            nn.init.ones_(head.bias[CLASS_OF[accuracies[epoch]]])
            return trained

        monkeypatch.setattr(loop, "train_one_epoch", then_decide)

    return plan


@pytest.mark.parametrize(
    ("accuracies", "save_epochs", "best"),
    [
        ([10.0, 30.0, 20.0], 1, 2),
        ([10.0, 30.0, 20.0], 3, 2),
        ([30.0, 10.0, 30.0], 1, 1),
        ([10.0, 20.0, 40.0], 2, 3),
    ],
)
def test_the_best_checkpoint_is_the_first_with_the_highest_top_1(accuracies, save_epochs, best, decide, capsys):
    decide(accuracies)
    assert main([*DECIDED, "--save-epochs", str(save_epochs)]) == 0
    assert [line["test_acc1"] for line in log(Path("out"))] == accuracies
    for name, epoch in (("best_checkpoint.pth", best), ("checkpoint.pth", 3)):
        state = load(Path("out", name))
        assert (state["epoch"], state["best_acc1"]) == (epoch, max(accuracies[:epoch]))
        assert state["model"]["head.bias"].argmax() == CLASS_OF[accuracies[epoch - 1]]
    assert f"best top-1 {max(accuracies):.2f} %" in capsys.readouterr().out


def test_a_resumed_run_knows_the_best_epoch_so_far(decide, capsys):
    accuracies = [20.0, 30.0, 10.0]
    decide(accuracies, killed=2)
    assert main(DECIDED) == 130
    decide(accuracies)
    assert main([*DECIDED, "--resume", "auto"]) == 0
    assert load(Path("out/best_checkpoint.pth"))["epoch"] == 2 and load(Path("out/checkpoint.pth"))["best_acc1"] == 30.0
    assert "best top-1 30.00 %" in capsys.readouterr().out
