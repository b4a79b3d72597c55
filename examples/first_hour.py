"""A first hour with TetraJet, in one minute: the grid, a quantized model, a short training, a weight that oscillates.

    python examples/first_hour.py --figure first_hour.png

Each part prints what it shows. Read the code beside the output, change something, and run it again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.in_memory import Digits
from quantization import OscillationWindow, Recipe, coverage, create_model, quant_linears, quantize_mx
from quantization.measures.oscillation import Trajectory

WINDOW = 30  # steps over which the paper measures oscillation (section 6)


def show_the_grid() -> None:
    print("1. Groups of 32 values share a scale, a power of two; over it, each becomes one of 0 0.5 1 1.5 2 3 4 6:")
    x = torch.tensor([[0.1, -0.4, 1.2, 2.6, 6.0]])
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(0)
        quantized = quantize_mx(x, axis=-1, rounding=rounding)
        print(f"   {rounding:10} scale {quantized.scales.float().item():g}: {quantized.dequantize().tolist()[0]}")


def build_a_model() -> nn.Module:
    print("2. A small DeiT of timm whose block linears train in MXFP4, forward and backward:")
    torch.manual_seed(0)
    model = create_model("deit_micro_patch4_32", Recipe(), img_size=8, num_classes=10)
    print("  ", coverage(model, torch.randn(2, 3, 8, 8)).summary())
    return model


def digits(training: bool) -> tuple[Tensor, Tensor]:
    """Images fp32 [N, 3, 8, 8] around zero, and labels int64 [N]."""
    images, labels = Digits().arrays(training)
    return torch.from_numpy(images).float().div(127.5).sub(1).unsqueeze(1).repeat(1, 3, 1, 1), torch.from_numpy(labels)


def train(model: nn.Module, steps: int) -> OscillationWindow:
    """Train with AdamW at a constant learning rate; returns what the last steps' weights did."""
    print(f"3. Training on scikit-learn's digits, {steps} steps of 64 images:")
    images, labels = digits(training=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    window = None
    for step in trange(steps, leave=False):
        if step == max(0, steps - WINDOW):
            window = OscillationWindow(quant_linears(model))
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        if window is not None:
            window.record()
    images, labels = digits(training=False)
    with torch.no_grad():
        share = (model.eval()(images).argmax(dim=1) == labels).double().mean().item()
    print(f"   {100 * share:.1f} % of the {len(images)} held-out images are right")
    return window


def show_an_oscillating_weight(window: OscillationWindow, figure: Path) -> None:
    print(f"4. The weight that oscillated most in the last {window.steps} steps. Its ratio R_w is the path of Q2(w)")
    print("   over the path of w: the weight hardly moves, but each time it crosses a threshold, Q2(w) jumps.")
    (weight,) = window.trajectories(1)
    print(f"   {weight.layer}[{weight.row}][{weight.column}]: R_w = {weight.ratio:.1f}")
    draw(weight, figure)
    print(f"   drawn in {figure}")


def draw(weight: Trajectory, figure: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    ax.step(range(len(weight.quantized)), weight.quantized, where="post", label="Q2(w) over its group's scale")
    ax.plot(weight.latent, marker=".", label="w over its group's scale")
    ax.set_xlabel("training step")
    ax.set_title(f"{weight.layer}[{weight.row}][{weight.column}], $R_w$ = {weight.ratio:.1f}", fontsize=10)
    ax.legend(fontsize=8)
    plt.savefig(figure, dpi=100)
    plt.close()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="length of the training (default: 400)")
    parser.add_argument("--figure", type=Path, default=Path("first_hour.png"), help="default: first_hour.png")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    show_the_grid()
    window = train(build_a_model(), options.steps)
    show_an_oscillating_weight(window, options.figure)


if __name__ == "__main__":
    main()
