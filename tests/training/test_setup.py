"""The parts of a run that setup builds, and the settings that a run shares with its checkpoint."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from torch import nn
from torchvision.transforms import ColorJitter

from datasets import CALIBRATION_ORDER, set_epoch
from main import main
from quantization import RECIPES, Int4Linear, RampingAdamW, quantize_mx
from training.models import build_model
from training.optimizer import build_optimizer
from training.options import GROUPS, SAME_ON_RESUME, names_of, parse_args
from training.run_log import RunLog
from training.setup import implied_identity

CPU = torch.device("cpu")
TINY = ["--model", "deit_micro_patch4_32", "--input-size", "8", "--num-workers", "0", "--device", "cpu"]
MXFP4 = [*TINY, "--quant", "mxfp4"]
NANO = ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "718", "--device", "cpu", "--input-size", "4"]
NANO += ["--model", "deit_nano_patch4_32"]


class TestLearningRate:
    def test_by_the_epoch(self, few_digits_in_an_empty_directory):
        """Two epochs along the line of the warm-up, then on the cosine over all four, whose end would be the fifth."""
        options = [*TINY, "--epochs", "4", "--batch-size", "32", "--lr", "0.16"]
        options += ["--warmup-epochs", "2", "--warmup-lr", "2e-4", "--min-lr", "1e-3", "--output-dir", "out"]
        assert main(options) == 0
        rates = [json.loads(line)["lr"] for line in Path("out/log.txt").read_text().splitlines()]
        peak = 0.16 * 32 / 512
        cosine = [1e-3 + (peak - 1e-3) * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in (2, 3)]
        assert rates == pytest.approx([2e-4, (2e-4 + peak) / 2, *cosine], rel=1e-9)

    def test_swins_cosine_begins_after_the_warm_up(self, few_digits_in_an_empty_directory):
        """As in its official code (WARMUP_PREFIX): two epochs of warm-up, then a cosine over the other three."""
        options = [*TINY, "--epochs", "5", "--batch-size", "32", "--lr", "0.16", "--warmup-prefix"]
        options += ["--warmup-epochs", "2", "--warmup-lr", "2e-4", "--min-lr", "1e-3", "--output-dir", "out"]
        assert main(options) == 0
        rates = [json.loads(line)["lr"] for line in Path("out/log.txt").read_text().splitlines()]
        peak = 0.16 * 32 / 512
        cosine = [1e-3 + (peak - 1e-3) * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
        assert rates == pytest.approx([2e-4, (2e-4 + peak) / 2, *cosine], rel=1e-9)

    @pytest.mark.parametrize(("epochs", "warmup"), [("1", 0), ("2", 1), ("9", 2)])
    def test_the_default_warm_up_is_shorter_than_the_run(self, epochs, warmup):
        assert parse_args([*TINY, "--epochs", epochs]).training.warmup_epochs == warmup

    @pytest.mark.parametrize("ramping", [[], ["--quant", "mxfp4", "--q-ramping"]])
    def test_adam_is_deits(self, ramping):
        options = parse_args([*TINY, "--batch-size", "128", "--lr", "4e-3", *ramping])
        optimizer = build_optimizer(options, nn.Linear(3, 2), CPU, RampingAdamW if ramping else None)
        for group in optimizer.param_groups:
            assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.999), 1e-8)


class TestParts:
    def test_mixup_and_cutmix(self, built):
        options = ["--mixup", "0.3", "--cutmix", "0.7", "--smoothing", "0.2"]
        mixup = built(*TINY, *options).step.mixup
        assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing, mixup.num_classes) == (0.3, 0.7, 0.2, 10)
        assert (mixup.mode, mixup.mix_prob, mixup.switch_prob) == ("batch", 1.0, 0.5)  # DeiT's
        assert built(*TINY, "--mixup", "0", "--cutmix", "0.7").step.mixup.cutmix_alpha == 0.7

    def test_augmentation(self, built):
        options = ["--color-jitter", "0.4", "--reprob", "0.6", "--input-size", "4"]
        transforms = built(*TINY, *options).loaders.train.dataset.dataset.transform.transforms
        (jitter,) = (t for t in transforms if isinstance(t, ColorJitter))
        (erasing,) = (t for t in transforms if isinstance(t, RandomErasing))
        assert jitter.brightness == pytest.approx((0.6, 1.4)) and erasing.probability == 0.6

    def test_stochastic_depth_grows_with_the_block(self, built):
        model = built(*TINY, "--model", "deit_nano_patch4_32", "--drop-path", "0.25").progress.model
        rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
        assert rates == pytest.approx([0.05 * block for block in range(1, 6) for _ in range(2)])

    def test_a_batch_goes_through_the_model_in_its_micro_batches(self, built):
        training = built(*TINY, "--batch-size", "32", "--accumulate-steps", "4")
        sizes: list[int] = []
        training.progress.model.register_forward_pre_hook(lambda model, inputs: sizes.append(len(inputs[0])))
        training.step(next(iter(training.loaders.train)))
        assert sizes == [8] * 4

    def test_distillation(self, built):
        torch.save(build_model("deit_micro_patch4_32", 10, 32, 0.0, RECIPES["none"]).state_dict(), "teacher.pth")
        options = ["--model", "deit_tiny_distilled_patch16_224", "--input-size", "32", "--distillation-type", "soft"]
        options += ["--teacher-model", "deit_micro_patch4_32", "--teacher-path", "teacher.pth", "--device", "cpu"]
        criterion = built(*options, "--distillation-alpha", "0.3").step.criterion
        assert (criterion.alpha, criterion.tau) == (0.3, 1.0) and not isinstance(criterion.teacher, nn.Sequential)
        stored = torch.load("teacher.pth", weights_only=True)
        torch.save({"model": stored, "identity": {"mean": (0.5,) * 3, "std": (0.25,) * 3}}, "teacher.pth")
        teacher, images = built(*options).step.criterion.teacher, torch.rand(2, 3, 32, 32)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        wanted = teacher[1]((images - 0.5) / 0.25)  # a teacher of ours that was trained with other numbers
        assert torch.allclose(teacher((images - mean) / std), wanted, atol=1e-5)

    def test_int4s_step_sizes_are_of_training_images(self, built):
        """LSQ's 2 mean |x| / sqrt(7) of the first layer's input, for the first batch of the calibration's order."""
        training = built(*TINY, "--quant", "int4")
        set_epoch(training.loaders.calibration, training.data, CALIBRATION_ORDER)
        images, _ = next(iter(training.loaders.calibration))
        model = training.progress.model.eval()
        block = model.blocks[0]
        with torch.no_grad():
            x = block.norm1(model._pos_embed(model.patch_embed(images)))
        layer = block.attn.qkv
        assert isinstance(layer, Int4Linear)
        wanted = 2 * layer.transformed(x).double().abs().mean() / math.sqrt(7)
        assert layer.input_step.item() == pytest.approx(wanted.item(), rel=1e-5)

    def test_what_a_run_that_goes_on_must_share_with_the_checkpoint(self, built):
        """Every option that makes another run, each with another value than its default."""
        given = {"--epochs": 3, "--batch-size": 16, "--accumulate-steps": 2, "--keep-last-batch": True, "--seed": 5}
        given |= {"--lr": 0.25, "--min-lr": 0.125, "--warmup-lr": 0.5, "--warmup-epochs": 1, "--weight-decay": 0.75}
        given |= {"--clip-grad": 2.0, "--model-ema-decay": 0.5, "--drop-path": 0.25, "--smoothing": 0.25}
        given |= {"--mixup": 0.5, "--cutmix": 0.75, "--aa": "rand-m9", "--color-jitter": 0.5, "--reprob": 0.75}
        given |= {"--repeats": 2, "--q-ramping-k1": 8.0, "--q-ramping-k2": 3, "--q-ramping-steps": 7}
        options = [
            text for option, value in given.items() for text in (option, *([] if value is True else [str(value)]))
        ]
        identity = built(*MXFP4, "--q-ema", "--q-ema-beta", "0.5", "--q-ramping", *options).progress.identity
        assert {name: identity[name] for name in given} == given
        assert "q_ema_beta=0.5" in identity["recipe"] and identity["optimizer"] == "RampingAdamW"
        assert (identity["model"], identity["input size"]) == ("deit_micro_patch4_32", 8)

    def test_ranks_are_compared_at_every_nth_step_of_the_run_also_after_it_went_on(
        self, built, interrupted_at_step, monkeypatch
    ):
        """Interrupted before the seventh step, the third of its second epoch, with a checkpoint of the sixth."""
        monkeypatch.setenv("WORLD_SIZE", "2")  # --check-ranks asks for it; one process is enough to count steps
        options = [*TINY, "--epochs", "2", "--batch-size", "16", "--save-steps", "3", "--check-ranks", "5"]
        with interrupted_at_step(7):
            assert main([*options, "--output-dir", "parts"]) == 130
        check = built(*options, "--resume", "parts/checkpoint.pth").check
        assert (check.step, check.every) == (6, 5)


class TestRemedies:
    RUN = [*MXFP4, "--epochs", "3", "--batch-size", "16", "--warmup-epochs", "0"]  # 12 steps

    def test_dampens_strength_follows_the_whole_run(self, built):
        dampen = built(*self.RUN, "--dampen", "0.5").remedies["dampen"]
        for step in (2, 3, 4, 8, 12):
            dampen.step = step
            progress = max(0, step / 12 - 1 / 4) / (3 / 4)
            wanted = 0.5 * (1 - math.cos(math.pi * progress)) / 2
            assert dampen.log_numbers()["dampen_weight"] == pytest.approx(wanted, abs=1e-12)

    @pytest.mark.parametrize(("reduction", "share"), [("sum", 1.0), ("kernel_mean", 1 / 128)])
    def test_a_step_adds_dampens_gradient(self, reduction, share, built):
        """2 lambda (W - Q2(W)), for `kernel_mean` over 128 input channels, to what a step without it has."""
        gradients = []
        for options in ([], ["--dampen", "10", "--dampen-reduction", reduction]):
            training = built(*self.RUN, *options)
            if options:
                training.remedies["dampen"].step = 12
            weight = training.progress.model.blocks[0].mlp.fc1.weight
            before = weight.detach().clone()
            torch.manual_seed(7)
            training.step((torch.ones(4, 3, 8, 8), torch.arange(4)))
            gradients.append(weight.grad)
        wanted = 2 * 10 * share * (before - quantize_mx(before, axis=-1).dequantize())
        assert torch.allclose(gradients[1] - gradients[0], wanted, rtol=1e-4, atol=1e-6) and wanted.abs().max() > 1e-3

    def test_freezes_threshold_follows_the_whole_run(self, built):
        freeze = built(*self.RUN, "--freeze", "0.02").remedies["freeze"]
        wanted = {2: math.inf, 3: 0.1, 6: 0.02 + 0.08 * (1 + math.cos(math.pi / 3)) / 2, 12: 0.02}
        assert {step: freeze.threshold_after(step) for step in wanted} == pytest.approx(wanted)

    def test_osci_reset(self, built):
        options = ["--osci-reset", "--osci-reset-start", "0.25", "--osci-reset-interval", "4"]
        reset = built(*self.RUN, *options, "--osci-reset-threshold", "7").remedies["osci_reset"]
        assert (reset.start, reset.interval, reset.window, reset.threshold) == (3, 4, 4, 7)

    def test_the_models_average_is_of_the_weights_that_freeze_puts_back(self, built):
        """A decay of almost 0 leaves the weights themselves, after a step in which the optimizer moved frozen ones."""
        training = built(
            *self.RUN, "--epochs", "1", "--batch-size", "64", "--freeze", "0.02", "--model-ema-decay", "1e-9"
        )
        training.remedies["freeze"].state_dict()["tracks"][0]["frozen"][3] = 0.25
        with RunLog(training.directory, {}) as log:
            training.run(log)
        name = "blocks.0.attn.qkv.weight"
        model, average = training.progress.model.state_dict(), training.progress.model_ema.module.state_dict()
        assert (model[name][3] == 0.25).all() and not (model[name][4] == 0.25).any()
        assert all(torch.allclose(average[name], value, rtol=0, atol=1e-7) for name, value in model.items())


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
    assert main([*NANO, "--output-dir", str(directory)]) == 0
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
        *("mean", "std", "group size", "--heal", "--keep-blocks", "--osci-reset-window", "--warmup-prefix"),
    )
    return path.parent


def test_a_key_that_an_older_checkpoint_lacks_means_the_only_value_then(old_run, capsys):
    assert main([*NANO, "--output-dir", str(old_run), "--resume", "auto"]) == 0
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
    assert main([*NANO, *options, "--output-dir", str(old_run), "--resume", "auto"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert (old_run / "checkpoint.pth").read_bytes() == before


def test_what_never_was_an_option_is_not_implied(finished, tmp_path, capsys):
    """A checkpoint without the name of its model is damaged, not old."""
    path = tmp_path / "checkpoint.pth"
    path.write_bytes((finished / "checkpoint.pth").read_bytes())
    forget(path, "model")
    assert main([*NANO, "--resume", str(path), "--output-dir", str(tmp_path)]) == 2
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
    assert main([*NANO, "--resume", str(tmp_path / "checkpoint.pth"), "--output-dir", str(tmp_path)]) == 2
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
