"""The tracker's windows and its fixed input; the whole of a tracked run is in test_main.py."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import timm
from quantization import Recipe, quantize_mx
from runtime.errors import UserError
from tracking import tracker
from tracking.oscillation_csv import Measure
from tracking.tracker import OscillationTracker


def make(device: torch.device, depth: int = 2, images: int = 100) -> tuple[torch.nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_micro_patch4_32", img_size=8, embed_dim=32, num_heads=2, depth=depth, quant=Recipe(), drop_path_rate=0.5
    )
    return model.to(device).train(), TensorDataset(torch.randn(images, 3, 8, 8), torch.zeros(images))


def move(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)


def generators() -> tuple:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
    return [state.tolist() for state in states], str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize("depth, block", [(1, 0), (2, 1), (4, 2), (12, 8), (24, 17)])
def test_the_measured_block_is_the_ninth_of_twelve(depth, block):
    model, dataset = make(torch.device("cpu"), depth)
    assert OscillationTracker(model, dataset, torch.device("cpu")).block == f"blocks.{block}"


def test_output_is_that_of_evaluation_and_leaves_no_trace(device):
    model, dataset = make(device)
    model.blocks[0].eval()  # whatever mode a module is in, it stays in
    test = OscillationTracker(model, dataset, device)
    before, modes = generators(), [m.training for m in model.modules()]
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    output = test._block_output()
    assert before == generators()
    assert modes == [m.training for m in model.modules()] and not model.blocks[1]._forward_hooks
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())

    model.eval()
    images = dataset.tensors[0][[i * 100 // 64 for i in range(64)]].to(device)
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))
        for block in model.blocks:
            x = block(x)
    assert torch.equal(output, x)


class Perceptron(torch.nn.Module):
    """The least that has a block."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(4, 8), "fc2": torch.nn.Linear(8, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp["fc2"](self.mlp["fc1"](x).relu())


def test_a_compiled_model_shows_its_output_too():
    model = torch.nn.Sequential(Perceptron(), Perceptron(), torch.nn.Flatten())
    model.compile(backend="eager")
    images = torch.randn(5, 4)
    model(images)
    test = OscillationTracker(model, TensorDataset(images, torch.zeros(5)), torch.device("cpu"))
    assert test.block == "1" and torch.equal(test._block_output(), model[1](model[0](images)))


@pytest.mark.parametrize("steps, window", [(9, 4), (5, 4), (4, 4), (3, 3), (1, 1)])
def test_windows_are_the_last_steps_of_an_epoch(steps, window, device, monkeypatch):
    assert tracker.TRACKED_STEPS == 30
    monkeypatch.setattr(tracker, "TRACKED_STEPS", 4)
    model, dataset = make(device, depth=1, images=3)
    test = OscillationTracker(model, dataset, device)
    for epoch in range(2):
        test.before_epoch(steps)
        weights, outputs = [], []
        for step in range(steps + 1):
            if step > 0:
                move(model)
                test.after_step()
            if step >= steps - window:
                weights.append(model.blocks[0].mlp.fc1.weight.detach().clone())
                outputs.append(test._block_output())
        rows = test.after_epoch(epoch, (epoch + 1) * steps)
        assert {row[:3] for row in rows} == {(epoch, (epoch + 1) * steps, window)}
        values = {(row.measure, row.where): row.value for row in rows}
        for measured, history in (
            (values[Measure.RATE_WEIGHT, "blocks.0.mlp.fc1"], weights),
            (values[Measure.RATE_OUTPUT, "blocks.0"], outputs),
        ):
            rates = [float((b - a).norm() / a.norm()) for a, b in zip(history, history[1:])]
            assert measured == pytest.approx(sum(rates) / window, rel=1e-5)


def test_means_over_the_layers_and_over_the_weights(device):
    model, dataset = make(device, images=3)
    test = OscillationTracker(model, dataset, device)
    test.before_epoch(4)
    for _ in range(4):
        move(model)
        test.after_step()
    rows = test.after_epoch(0, 4)
    sizes = {name: layer.weight.numel() for name, layer in test.layers.items()}
    for measure in (Measure.RATE_WEIGHT, Measure.RATE_QUANTIZED, Measure.OSCILLATING, Measure.CONFIDENCE):
        values = {row.where: row.value for row in rows if row.measure is measure}
        mean = values.pop("all")
        assert values.keys() == sizes.keys()
        weight = dict.fromkeys(sizes, 1) if measure in (Measure.RATE_WEIGHT, Measure.RATE_QUANTIZED) else sizes
        expected = sum(values[name] * weight[name] for name in sizes) / sum(weight.values())
        assert mean == pytest.approx(expected)
    latent = [row for row in rows if row.measure is Measure.LATENT_HISTOGRAM]
    assert [row.x for row in latent] == [-8 + i / 8 for i in range(128)]
    assert sum(row.value for row in latent if not -6 <= row.x <= 6) == 0


GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # E2M1's magnitudes; rounding decides in the middle between two


def sureness(latent: np.ndarray, grid: np.ndarray = GRID) -> np.ndarray:
    """Distance to the nearest middle, over the largest that there is among the numbers rounded alike."""
    middles = (grid[1:] + grid[:-1]) / 2
    distances = np.abs(np.abs(latent)[..., None] - middles)
    largest = [middles[0], *((high - low) / 2 for low, high in zip(middles, middles[1:])), grid[-1] - middles[-1]]
    return distances.min(axis=-1) / np.array(largest)[np.searchsorted(middles, np.abs(latent))]


def test_each_layer_is_measured_by_its_own_q2(device):
    """fc2 in E3M0, with scales from its largest weights, beside other layers in E2M1."""
    model, dataset = make(device, depth=1, images=3)
    powers = np.array([0, 0.25, 0.5, 1, 2, 4, 8, 16])
    fc2 = model.blocks[0].mlp.fc2
    fc2.recipe = Recipe().with_quantizers(("q2",), element="e3m0")
    test = OscillationTracker(model, dataset, device)
    test.before_epoch(1)
    move(model)
    test.after_step()
    rows = test.after_epoch(0, 1)
    found = {row.where: row.value for row in rows if row.measure is Measure.CONFIDENCE}
    latents = []
    for name, layer in test.layers.items():
        grid = powers if layer is fc2 else GRID
        weight = layer.weight.detach().double().cpu().numpy()
        groups = weight.reshape(len(weight), -1, 32)  # widths of 32 and 128
        scales = 2 ** np.ceil(np.log2(np.abs(groups).max(axis=-1, keepdims=True) / grid[-1]))
        latents.append((groups / scales).ravel())
        assert found[name] == pytest.approx(sureness(latents[-1], grid).mean(), rel=1e-5), name
    latent = [(row.x, row.value) for row in rows if row.measure is Measure.LATENT_HISTOGRAM]
    counts, edges = np.histogram(np.concatenate(latents), bins=1024, range=(-32, 32))
    assert [x for x, _ in latent] == edges[:-1].tolist()
    assert [share for _, share in latent] == pytest.approx(counts / counts.sum(), abs=1e-3)


def test_what_is_measured_of_quantized_weights(device):
    """Weights that go to and fro by little, followed beside the tracker: rates, ratios, confidence, trajectories."""
    model, dataset = make(device, images=3)
    test = OscillationTracker(model, dataset, device)
    history: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {name: [] for name in test.layers}

    def follow() -> None:
        for name, layer in test.layers.items():
            t = quantize_mx(layer.weight.detach(), axis=-1)
            scales = t.scales.float().repeat_interleave(32, dim=-1)[:, : layer.in_features]
            path = layer.weight.detach(), t.dequantize(), scales
            history[name].append(tuple(x.double().cpu().numpy() for x in path))

    test.before_epoch(4)
    follow()
    there = [4e-4 * torch.randn_like(p) for p in model.parameters()]
    for step in range(4):
        with torch.no_grad():
            for p, move in zip(model.parameters(), there):
                p += move if step % 2 == 0 else -move
        test.after_step()
        follow()
    rows = test.after_epoch(0, 4)
    values = {(row.measure, row.where): row.value for row in rows if row.x is None}

    def length(path: list[np.ndarray]) -> np.ndarray:
        return sum(np.abs(b - a) for a, b in zip(path, path[1:]))

    all_sure = []
    for name, steps in history.items():
        weights, quantized, scales = zip(*steps)
        rates = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(quantized, quantized[1:])]
        assert values[Measure.RATE_QUANTIZED, name] == pytest.approx(np.mean(rates), rel=1e-4)
        assert values[Measure.RATE_QUANTIZED, name] != pytest.approx(values[Measure.RATE_WEIGHT, name], rel=0.1)
        oscillates = length(quantized) / length(weights) > 16
        assert values[Measure.OSCILLATING, name] == pytest.approx(oscillates.mean(), abs=1e-9) and oscillates.any()
        all_sure.append(sureness(weights[-1] / scales[-1]).ravel())
        assert values[Measure.CONFIDENCE, name] == pytest.approx(all_sure[-1].mean(), rel=1e-5)
    counts, edges = np.histogram(np.concatenate(all_sure), bins=32, range=(0, 1))
    histogram = [(row.x, row.value) for row in rows if row.measure is Measure.CONFIDENCE_HISTOGRAM]
    assert [x for x, _ in histogram] == pytest.approx(edges[:-1])
    assert [share for _, share in histogram] == pytest.approx(counts / counts.sum(), abs=1e-3)

    followed = [(row.where, row.value) for row in rows if row.measure is Measure.RATIO]
    assert len(followed) == 4
    for where, ratio in followed:
        name, row, column = re.fullmatch(r"(.+)\[(\d+)\]\[(\d+)\]", where).groups()
        weights, quantized, scales = ([x[int(row), int(column)] for x in path] for path in zip(*history[name]))
        assert ratio == pytest.approx(length(quantized) / length(weights), rel=1e-3) and ratio > 16
        for measure, path in ((Measure.TRAJECTORY_LATENT, weights), (Measure.TRAJECTORY_QUANTIZED, quantized)):
            told = {r.x: r.value for r in rows if (r.measure, r.where) == (measure, where)}
            assert told == pytest.approx({x: value / scale for x, (value, scale) in enumerate(zip(path, scales))})


def test_nothing_is_measured_outside_a_window(device, monkeypatch):
    model, dataset = make(device, depth=1, images=3)
    test = OscillationTracker(model, dataset, device)
    test.before_epoch(100)
    with monkeypatch.context() as context:
        context.setattr(torch.Tensor, "__torch_function__", lambda *_: pytest.fail("a tensor was touched"))
        context.setattr(test, "_block_output", lambda: pytest.fail("the model ran"))
        for _ in range(69):
            test.after_step()


def test_a_model_without_blocks():
    with pytest.raises(UserError, match="linears attn.qkv, attn.proj, mlp.fc1, mlp.fc2, Linear has none; choose"):
        OscillationTracker(torch.nn.Linear(2, 2), TensorDataset(torch.ones(1, 2), torch.ones(1)), torch.device("cpu"))
