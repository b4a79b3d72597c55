"""Checkpoints of main.py on a few small images, and what `main.py --eval` computes from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from main import main
from quantization import quant_linears
from quantization.export.__main__ import main as export
from training import setup


@pytest.fixture(scope="session")
def trained(digits_cut_to, tmp_path_factory) -> Callable[..., Path]:
    """trained(*options): the checkpoint of a run of one epoch; a second call with the same options returns the first.

    With Q-EMA, the averages are moved by hand, so that they decide many roundings otherwise than the weights.
    """

    @cache
    def train(*options: str) -> Path:
        directory = tmp_path_factory.mktemp("run")
        usual = ["--epochs", "1", "--batch-size", "24", "--device", "cpu", "--warmup-epochs", "0", "--lr", "0.2"]
        usual += ["--model-ema-decay", "0.5", "--output-dir", str(directory), "--input-size", "8"]
        with digits_cut_to(48, 12):
            assert main([*usual, "--num-workers", "0", *options]) == 0
        path = directory / "checkpoint.pth"
        state = torch.load(path, weights_only=True)
        generator = torch.Generator().manual_seed(4)
        for tensors in (state["model"], state["model_ema"]):
            for name, value in tensors.items():
                if name.endswith("weight_ema"):
                    value += 0.3 * value.std() * torch.randn(value.shape, generator=generator)
                if name.endswith("ema_updates"):
                    value.fill_(10)
        torch.save(state, path)
        return path

    return train


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def evaluated(digits_cut_to, images) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """evaluated(checkpoint, *options): what `main.py --eval` makes of `images`, and its quantized weights."""

    @cache
    def evaluate(checkpoint: Path, *options: str) -> tuple[Tensor, dict[str, Tensor]]:
        seen = []

        def instead(model, loader, device):
            with torch.no_grad():
                weights = {name: layer.quantized_weight() for name, layer in quant_linears(model).items()}
                seen.append((model.eval()(images), weights))
            return {"loss": 0.0, "acc1": 0.0, "acc5": 0.0}

        with pytest.MonkeyPatch.context() as patch, digits_cut_to(48, 12):
            patch.setattr(setup, "evaluate", instead)
            assert main(["--eval", "--resume", str(checkpoint), "--device", "cpu", "--num-workers", "0", *options]) == 0
        return seen[0]

    return evaluate


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory) -> Callable[..., Path]:
    """exported(format, *options, weights="model"): the directory that the command has written for such a run."""

    @cache
    def write(to_format: str, *options: str, weights: str = "model") -> Path:
        directory = tmp_path_factory.mktemp("export") / "out"
        command = [str(trained(*options)), "--to", str(directory), "--to-format", to_format]
        assert export([*command, "--weights", weights]) == 0
        return directory

    return write
