"""torch.compile: one graph, the numbers of eager mode, parameters under their own names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._functorch import compile_utils

import timm
from quantization import Quantizer, QuantLinear, Recipe, matmul, set_matmul, take_lost_groups

pytestmark = pytest.mark.compiles


class Mlp(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = QuantLinear(40, 64, recipe=recipe), nn.GELU(), QuantLinear(64, 40, recipe=recipe)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).float().norm() / wanted.float().norm()).item()


@pytest.mark.parametrize(("recipe", "matmul"), [(Recipe(), "fp8"), (Recipe().with_q_ema(), "bf16")])
def test_compiled_layers_draw_the_same_bits(recipe, matmul, randn, device):
    """`aot_eager` runs the very graph that the compiler gets, operation by operation.

    GELU's gradient is one kernel in eager mode and several operations in the graph, so dY may differ in its last bit.
    Where it lies beside a threshold, its rounding flips by the same draw. Other draws move the gradients by 28 %.
    """
    torch.manual_seed(0)
    model = Mlp(recipe).to(device)
    set_matmul(model, matmul)
    x, names, results = randn(33, 40), list(model.state_dict()), []
    for compiled in (False, True):
        torch._dynamo.reset()
        if compiled:
            model.compile(backend="aot_eager", fullgraph=True)
        torch.manual_seed(3)
        outputs = []
        for _ in range(2):  # each pass with keys of its own
            model.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                y = model(x)
            y.float().square().mean().backward()
            outputs += [y, *(p.grad for p in model.parameters())]
        results.append(outputs)
    for eager, graph in zip(*results):
        assert relative_error(graph, eager) < 0.03
    assert torch.equal(results[0][0], results[1][0])
    assert relative_error(results[1][1], results[1][6]) > 0.2  # the second pass has other keys
    assert list(model.state_dict()) == names


def test_a_compiled_backward_pass_counts_underflowed_groups(randn, device):
    """`test_matmul.py` derives the 63 + 32 groups. A compiled backward pass cannot add to a buffer."""
    torch._dynamo.reset()
    layer = QuantLinear(64, 32, device=device, recipe=Recipe(*[Quantizer()] * 6))
    layer.matmul = "fp8"
    layer.compile(backend="aot_eager", fullgraph=True)
    x, dy = randn(64, 64).requires_grad_(), randn(64, 32)
    dy[0] *= 2.0**40
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    take_lost_groups(device)
    y.backward(dy.bfloat16())
    assert take_lost_groups(device).item() == 63 + 32


def test_draws_are_not_merged():
    """PyTorch 2.11 merges calls of operators outside a list; all layers had the same keys in a backward pass."""
    if not hasattr(compile_utils, "rand_ops"):
        pytest.skip("this release has no such list")
    assert torch.ops.mxfp4.draw_keys in compile_utils.rand_ops


def deit_block() -> tuple[nn.Module, torch.Tensor]:
    return timm.create_model("deit_micro_patch4_32", quant=Recipe()).blocks[0], torch.randn(2, 65, 128)


def swin_stage() -> tuple[nn.Module, torch.Tensor]:
    """Patch merging, a block, and a block whose windows are shifted."""
    options = {"img_size": 128, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "quant": Recipe()}
    return timm.create_model("swin_tiny_patch4_window7_224", **options).layers[1], torch.randn(2, 32, 32, 32)


@pytest.mark.parametrize("build", [deit_block, swin_stage])
def test_a_block_is_one_graph(build, device):
    """No graph break in a transformer block, in training and in evaluation."""
    torch._dynamo.reset()
    block, x = build()
    block, x = block.to(device), x.to(device)
    for mode in (True, False):
        explanation = torch._dynamo.explain(block.train(mode))(x)
        assert explanation.graph_count == 1 and explanation.graph_break_count == 0


def test_a_model_is_one_graph(device, monkeypatch):
    """Also the first of a process, and although every block drops another share of its paths."""
    monkeypatch.setattr(matmul, "_COUNTERS", {})
    torch._dynamo.reset()
    model = timm.create_model("deit_micro_patch4_32", quant=Recipe().with_q_ema(), drop_path_rate=0.1).to(device)
    set_matmul(model, "fp8")
    explanation = torch._dynamo.explain(model)(torch.randn(2, 3, 32, 32, device=device))
    assert explanation.graph_count == 1 and explanation.graph_break_count == 0
