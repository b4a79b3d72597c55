"""Replayed training steps against ordinary ones, on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import timm
from engine import TrainStep
from quantization import Heal, QEma, RampingAdamW, Recipe, detect_oscillation, quant_linears, take_lost_groups
from runtime.cuda_graph import WARM_UP_CALLS, CudaGraph
from training.losses import OutputLoss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
BATCH, STEPS = 32, WARM_UP_CALLS + 5


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def build(recipe: Recipe) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_micro_patch4_32", num_classes=10, drop_path_rate=0.2, quant=recipe).cuda()


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, 3, 32, 32)
    return [(torch.randn(shape, generator=generator), torch.randint(0, 10, (BATCH,))) for _ in range(count)]


def train(
    model: torch.nn.Module, recorded: bool, ramping: bool = False, micro_batches: int = 1
) -> tuple[list[torch.Tensor], TrainStep]:
    optimizer = (RampingAdamW if ramping else torch.optim.AdamW)(model.parameters(), lr=1e-3)
    options = {"cuda_graph": recorded, "accumulate_steps": micro_batches}
    step = TrainStep(model, OutputLoss(F.cross_entropy), optimizer, torch.device("cuda"), **options)
    q_ema = QEma(model) if any(layer.use_q_ema for layer in quant_linears(model).values()) else None
    torch.manual_seed(2)
    losses = []
    for i, batch in enumerate(batches(STEPS)):
        optimizer.param_groups[0]["lr"] = 1e-3 / (i + 1)
        losses.append(step(batch)[0])
        if q_ema:
            q_ema.after_step()
    return losses, step


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe().with_q_ema(0.9)], ids=["tetrajet", "q-ema"])
def test_same_bits_as_without(recipe, micro_batches):
    ordinary, replayed = build(recipe), build(recipe)
    take_lost_groups(torch.device("cuda"))
    expected, _ = train(ordinary, recorded=False, micro_batches=micro_batches)
    lost = take_lost_groups(torch.device("cuda"))
    got, _ = train(replayed, recorded=True, micro_batches=micro_batches)
    assert torch.equal(take_lost_groups(torch.device("cuda")), lost)
    assert torch.equal(torch.stack(got), torch.stack(expected)) and len(set(map(float, got))) == STEPS
    for (name, a), b in zip(ordinary.state_dict().items(), replayed.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_healed_model_is_recorded_anew():
    """Quantized until the passes are replayed, then healed, then quantized again: the losses of ordinary steps."""
    losses = []
    for recorded in (False, True):
        model = build(Recipe())
        optimizer, heal = torch.optim.AdamW(model.parameters(), lr=1e-3), Heal(1)
        heal.attach(model)
        step = TrainStep(model, OutputLoss(F.cross_entropy), optimizer, torch.device("cuda"), cuda_graph=recorded)
        torch.manual_seed(2)
        losses.append([])
        for healed in (False, True, False):
            heal.load_state_dict({"healed": healed})
            losses[-1] += [step(batch)[0] for batch in batches(STEPS)]
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))


def test_detection_is_recorded_apart_and_leaves_no_trace():
    ordinary, replayed = build(Recipe().with_q_ema(0.9)), build(Recipe().with_q_ema(0.9))
    ratios = []
    for model, recorded in ((ordinary, False), (replayed, True)):
        _, step = train(model, recorded, ramping=True)
        before = copy.deepcopy(model.state_dict())
        found = detect_oscillation(model, step.optimizer, step, batches(6), steps=6)
        ratios.append(list(found.values()))
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        step(batches(1)[0])
    assert all(torch.equal(a, b) for a, b in zip(*ratios))
    assert all(torch.equal(a, b) for a, b in zip(ordinary.state_dict().values(), replayed.state_dict().values()))


def test_a_last_batch_of_another_size_is_recorded_apart():
    """Epochs of two batches, the second a smaller one, until both are replayed."""
    losses = []
    for recorded in (False, True):
        optimizer = torch.optim.AdamW((model := build(Recipe())).parameters(), lr=1e-3)
        step = TrainStep(model, OutputLoss(F.cross_entropy), optimizer, torch.device("cuda"), cuda_graph=recorded)
        torch.manual_seed(2)
        (images, labels), *_ = batches(1)
        losses.append([step((images[:n], labels[:n]))[0] for _ in range(STEPS) for n in (BATCH, 5)])
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))


def test_a_new_state_is_recorded_anew():
    weight = torch.nn.Parameter(torch.ones(4, device="cuda"))

    def work(x: torch.Tensor) -> tuple[torch.Tensor]:
        weight.grad = None
        loss = (weight * x).sum()
        loss.backward()
        return (loss.detach(),)

    graph = CudaGraph(work, [weight], lambda: weight.data_ptr())
    for factor in (1.0, 3.0):
        weight.data = torch.full((4,), factor, device="cuda")
        for i in range(WARM_UP_CALLS + 3):
            (loss,) = graph(torch.full((4,), float(i), device="cuda"))
            assert loss == 4 * factor * i and torch.equal(weight.grad, torch.full_like(weight, i))
