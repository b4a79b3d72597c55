"""Time and memory of one training step at 224 px, all variants side by side in one run.

    python benchmarks/train_step.py [--models NAME ...] [--variants NAME ...] [--csv docs/train_step.csv]

A step is forward, backward and the optimizer's update on random images, fresh ones each time, under bf16 autocast on a
GPU. Milliseconds are medians with 20th and 80th percentiles; memory is the peak of the allocator. Before timing, the
kernels are compared with the reference bit for bit and FP8 products with bf16's, and one step of every eager variant
runs with any wait for the host an error.

Compiling takes most of the time. With `--lock FILE`, several of these processes compile at once and time their steps
one after the other.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from common import append_rows, csv_file, median_and_percentiles, model_name, positive, timed
from torch import nn

from engine import TrainStep
from quantization import (
    RECIPES,
    QEma,
    Quantizer,
    RampingAdamW,
    Recipe,
    create_model,
    has_fp8,
    linear,
    quant_linears,
    reference,
    set_matmul,
)
from quantization.formats import Fp8
from quantization.matmul import multiply
from quantization.mx import backend_for
from quantization.reference import Operand
from runtime.environment import environment
from training.losses import OutputLoss

MODELS = {
    "deit_tiny_patch16_224": 256,
    "deit_small_patch16_224": 256,
    "deit_base_patch16_224": 128,
    "vit_large_patch16_224": 64,
}


@dataclass(frozen=True)
class Variant:
    recipe: Recipe | None = None
    ramping: bool = False
    compiled: bool = False
    graph: bool = False
    """Forward and backward pass replayed as a CUDA graph; as usual on a CPU."""
    matmul: str = "auto"
    reference: bool = False
    """The specification itself, in place of the kernels."""


VARIANTS = {
    "bf16": Variant(),
    "bf16, compiled": Variant(compiled=True),
    "bf16, compiled, graph": Variant(compiled=True, graph=True),
    "TetraJet, reference": Variant(Recipe(), matmul="bf16", reference=True),
    "TetraJet, bf16 matmuls": Variant(Recipe(), matmul="bf16"),
    "TetraJet": Variant(Recipe()),
    "TetraJet, graph": Variant(Recipe(), graph=True),
    "TetraJet + Q-EMA, compiled, graph": Variant(Recipe().with_q_ema(), compiled=True, graph=True),
    "TetraJet + Q-Ramping, compiled, graph": Variant(Recipe(), ramping=True, compiled=True, graph=True),
    "TetraJet, compiled": Variant(Recipe(), compiled=True),
    "TetraJet, compiled, graph": Variant(Recipe(), compiled=True, graph=True),
}
BASELINE = "bf16, compiled"


def check(device: torch.device) -> None:
    """Raises AssertionError unless kernels and FP8 products give what they must on fresh random numbers."""
    x, w = torch.randn(197, 384, device=device), torch.randn(96, 384, device=device)
    q, backend = Quantizer(), backend_for(x)
    for got, expected in zip(backend.quantize(x, q)[1:3], reference.quantize(x, q)[1:3]):
        assert torch.equal(got, expected), "the kernels do not return the reference's bits"
    products = []
    for a_fp8, b_fp8 in ((Fp8.E5M2, Fp8.E4M3), (None, None)):
        operands = []
        for tensor, fp8 in ((x, a_fp8), (w, b_fp8)):
            options = {"values_dtype": torch.bfloat16}
            if fp8 is not None:
                lost = torch.zeros(1, dtype=torch.int64, device=device)
                options = {"fp8": fp8, "largest": backend.largest_magnitude(tensor), "lost": lost}
            values, _, _, scale = backend.quantize(tensor, q, pack=False, **options)
            operands.append(Operand(values, scale))
        products.append(multiply(*operands, torch.float32).double())
    error = ((products[0] - products[1]).norm() / products[1].norm()).item()
    assert error < (1e-5 if device.type == "cuda" else 1e-2), f"FP8 and bf16 products differ by {error:.1e}"


@contextmanager
def by_reference(active: bool):
    kernels = linear.backend_for
    if active:
        linear.backend_for = lambda *args: reference
    try:
        yield
    finally:
        linear.backend_for = kernels


@contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """No other process that holds `lock` is within."""
    if lock is None:
        yield
        return
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def training_step(model: nn.Module, batch_size: int, variant: Variant, device: torch.device) -> Callable[[], None]:
    """One step on the next of four batches. Q-Ramping gets periods of 1 to 3, as after a detection."""
    options = {"lr": 1e-4, "weight_decay": 0.05}
    if variant.ramping:
        optimizer = RampingAdamW(model.parameters(), **options)
        weights = [layer.weight for layer in quant_linears(model).values()]
        optimizer.set_periods({w: torch.randint(1, 4, w.shape, device=w.device) for w in weights})
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **options, fused=device.type == "cuda")
    uses_average = any(layer.use_q_ema for layer in quant_linears(model).values())
    q_ema = QEma(model) if uses_average else None
    size = model.patch_embed.img_size
    images = torch.randn(4, batch_size, 3, *size, device=device)
    labels = torch.randint(0, model.num_classes, (4, batch_size), device=device)
    batches = cycle(zip(images, labels))
    graph = variant.graph and device.type == "cuda"
    train = TrainStep(model, OutputLoss(F.cross_entropy), optimizer, device, cuda_graph=graph)

    def step() -> None:
        train(next(batches))
        if q_ema is not None:
            q_ema.after_step(train.skip)

    return step


def step_of(name: str, batch_size: int, variant: Variant, device: torch.device) -> Callable[[], None]:
    """`training_step` of a new model of this name, in place of whatever the compiler holds of earlier ones."""
    torch._dynamo.reset()
    gc.collect()  # models refer to themselves in circles
    torch.manual_seed(0)
    model = create_model(name, variant.recipe or RECIPES["none"], drop_path_rate=0.1).to(device)
    set_matmul(model, variant.matmul)
    if variant.compiled:
        model.compile()
    return training_step(model, batch_size, variant, device)


def measure(
    name: str, batch_size: int, variant: Variant, device: torch.device, steps: int, lock: Path | None
) -> tuple[list, float]:
    """Milliseconds of the timed steps, and the peak of allocated memory in GiB."""
    step = step_of(name, batch_size, variant, device)
    with by_reference(variant.reference):
        step()
        if device.type == "cuda":  # from here on: recording a graph takes memory once, replaying it none
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with turn(lock):
            for _ in range(min(steps, 8)):
                step()
            if device.type != "cuda":
                return timed(step, device, 0, steps), float("nan")
            torch.cuda.synchronize()
            if not variant.compiled:
                torch.cuda.set_sync_debug_mode("error")
                step()
                torch.cuda.set_sync_debug_mode("default")
            return timed(step, device, 0, steps), torch.cuda.max_memory_allocated() / 2**30


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=model_name, default=list(MODELS), metavar="NAME")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--steps", type=positive, default=40, help="timed steps (default: 40)")
    parser.add_argument("--batch-size", type=positive, help="instead of each model's own")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="time steps only while no other process has the lock")
    parser.add_argument("--csv", type=csv_file, help="append one row a measurement to this file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("train_step.py: error: timing needs a GPU, PyTorch finds none", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    warnings.filterwarnings("ignore", message="Synchronization debug mode")
    check(device)
    where = environment(device.type == "cuda")
    print(", ".join(f"{key} {value}" for key, value in where.items()), end="")
    print(f", FP8 matmuls {'on' if has_fp8(device) else 'off'}\n")
    print(f"| model, batch | variant | ms (20 %, 80 %) | img/s | peak GiB | time / {BASELINE} |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        batch_size, baseline = args.batch_size or MODELS.get(name, 128), None
        for title in sorted(args.variants, key=lambda title: title != BASELINE):
            times, peak = measure(name, batch_size, VARIANTS[title], device, args.steps, args.lock)
            median, low, high = median_and_percentiles(times)
            baseline = median if title == BASELINE else baseline
            ratio = f"{median / baseline:.2f}" if baseline else ""
            speed = 1000 * batch_size / median
            print(
                f"| {name.split('_patch')[0]}, {batch_size} | {title} | {median:.1f} ({low:.1f}, {high:.1f}) "
                f"| {speed:,.0f} | {peak:.1f} | {ratio} |",
                flush=True,
            )
            if args.csv:
                numbers = {"model": name, "batch": batch_size, "variant": title, "ms": round(median, 2)}
                numbers |= {"ms_20": round(low, 2), "ms_80": round(high, 2), "img_per_s": round(speed)}
                append_rows(args.csv, [where | numbers | {"peak_gib": round(peak, 2)}])
    return 0


if __name__ == "__main__":
    sys.exit(main())
