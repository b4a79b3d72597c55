"""Healing: a healed model computes as one that was never quantized, and nothing stale is used after the switch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import engine
from quantization import Heal, Recipe, RunLength, quant_linears, swap_linears
from quantization.remedies.heal import HealOptions
from training.losses import OutputLoss


def make(device: torch.device, recipe: Recipe | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 45), nn.GELU(), nn.Linear(45, 5)).to(device)
    return model if recipe is None else swap_linears(model, recipe, ("0", "2"))


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("recipe", [Recipe(), Recipe().with_q_ema(0.9)], ids=["tetrajet", "q-ema"])
def test_a_healed_model_computes_as_one_of_ordinary_linears(recipe, randn, device):
    model, plain, x = make(device, recipe), make(device, None), randn(33, 70)
    torch.manual_seed(1)
    before = results(model, x)
    heal = Heal(3)
    heal.attach(model)
    for epoch, healed in enumerate((False, False, True, True)):
        heal.before_epoch(epoch)
        torch.manual_seed(1)
        wanted = results(plain, x) if healed else before
        assert all(torch.equal(a, b) for a, b in zip(results(model, x), wanted, strict=True)), epoch
        assert bool(heal.views()) == healed == heal.state_dict()["healed"]
    with heal.views()["quantized"]:
        assert torch.equal(model(x), before[0])
    assert torch.equal(model(x), plain(x))


def test_a_restored_run_is_healed_if_the_checkpoint_was(device):
    for healed in (False, True):
        model, heal = make(device, Recipe()), Heal(2)
        heal.attach(model)
        heal.load_state_dict({"healed": healed})
        assert {layer.high_precision for layer in quant_linears(model).values()} == {healed}


def test_an_epoch_outside_the_run_is_refused():
    with pytest.raises(ValueError, match="--heal must be an epoch of the run, from 1 to 4, got 5"):
        Heal.from_options(HealOptions(heal=5), RunLength(4, 10))
    assert Heal.from_options(HealOptions(heal=4), RunLength(4, 10)).epoch == 4


@pytest.mark.compiles
def test_a_compiled_model_is_compiled_anew(randn, device):
    """Bits of the eager model before, after and before again: the graph is guarded by the precision and the recipe."""
    torch._dynamo.reset()
    model, x = make(device, Recipe()), randn(33, 70)
    heal = Heal(1)
    heal.attach(model)
    floor = Recipe().with_quantizers(("q1", "q2"), scaling="floor")
    eager, compiled = [], []
    for found, compiles in ((eager, False), (compiled, True)):
        if compiles:
            model.compile(backend="aot_eager")
        for recipe, healed in ((Recipe(), False), (Recipe(), True), (floor, False), (Recipe(), False)):
            for layer in quant_linears(model).values():
                layer.recipe = recipe
            heal.load_state_dict({"healed": healed})
            torch.manual_seed(1)
            found.append(results(model, x))
    for a, b in zip(eager, compiled, strict=True):
        assert all(torch.allclose(s, t, rtol=1e-6, atol=1e-6) for s, t in zip(a, b, strict=True))
    assert len({found[0].sum().item() for found in compiled}) == 3


def test_the_key_of_a_cuda_graph_has_the_precision_and_the_recipe(device, monkeypatch):
    states = []
    monkeypatch.setattr(engine, "CudaGraph", lambda work, parameters, state: states.append(state))
    model = make(device, Recipe().with_q_ema(0.9))
    optimizer = torch.optim.SGD(model.parameters())
    engine.TrainStep(model, OutputLoss(nn.CrossEntropyLoss()), optimizer, device, cuda_graph=True)
    (state,), keys = states, []
    for name, value in (("high_precision", True), ("use_q_ema", False), ("recipe", Recipe())):
        keys.append(state())
        assert keys[-1] == state()
        setattr(model[2], name, value)
    keys += [state(), (model.eval(), state())[1]]
    assert len(set(keys)) == 5
