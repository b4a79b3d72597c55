"""Time and memory of one training step at 224 px on a GPU, all variants side by side in one run.

    python benchmarks/train_step.py

A step is forward, backward and the optimizer's update on random images, fresh ones each time, under bf16 autocast,
without torch.compile. Milliseconds are medians with 20th and 80th percentiles; memory is the peak of the allocator.
Before timing, a step of every variant is run in which any wait for the host is an error.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
from quantization import QEma, RampingAdamW, Recipe, quant_linears  # noqa: E402

MODELS = {"deit_tiny_patch16_224": 256, "deit_small_patch16_224": 256, "deit_base_patch16_224": 128}
VARIANTS = {
    "bf16": (None, False),
    "TetraJet": (Recipe(), False),
    "+ Q-EMA": (Recipe().with_q_ema(), False),
    "+ Q-Ramping": (Recipe(), True),
}
WARM_UP, TIMED = 8, 40


def training_step(model: nn.Module, batch_size: int, ramping: bool) -> Callable[[], None]:
    """One step on the next of four batches. Q-Ramping gets periods of 1 to 3, as after a detection."""
    options = {"lr": 1e-4, "weight_decay": 0.05}
    if ramping:
        optimizer = RampingAdamW(model.parameters(), **options)
        weights = [layer.weight for layer in quant_linears(model).values()]
        optimizer.set_periods({w: torch.randint(1, 4, w.shape, device=w.device) for w in weights})
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **options, fused=True)
    uses_average = any(layer.use_q_ema for layer in quant_linears(model).values())
    q_ema = QEma(model) if uses_average else None
    images = torch.randn(4, batch_size, 3, 224, 224, device="cuda")
    labels = torch.randint(0, 1000, (4, batch_size), device="cuda")
    count = 0

    def step() -> None:
        nonlocal count
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images[count % 4]), labels[count % 4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if q_ema is not None:
            q_ema.update()
        count += 1

    return step


def measure(step: Callable[[], None]) -> tuple[list[float], float]:
    """Milliseconds of every timed step, and the peak of allocated memory in GiB."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times, torch.cuda.max_memory_allocated() / 2**30


def main() -> int:
    if not torch.cuda.is_available():
        print("train_step.py: error: timing needs a GPU, PyTorch finds none", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", message="Synchronization debug mode")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}, ", end="")
    print(f"timm {timm.__version__}, commit {commit.stdout.strip() or 'unknown'}\n")
    print("| model, batch | variant | ms (20 %, 80 %) | img/s | peak GiB | time / bf16 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, batch_size in MODELS.items():
        baseline = None
        for variant, (recipe, ramping) in VARIANTS.items():
            torch.manual_seed(0)
            model = timm.create_model(name, quant=recipe, drop_path_rate=0.1).cuda()
            times, peak = measure(training_step(model, batch_size, ramping))
            median = statistics.median(times)
            low, *_, high = statistics.quantiles(times, n=5)
            baseline = baseline or median
            cells = [f"{name.removesuffix('_patch16_224')}, {batch_size}", variant]
            cells += [f"{median:.1f} ({low:.1f}, {high:.1f})", f"{1000 * batch_size / median:,.0f}"]
            cells += [f"{peak:.1f}", f"{median / baseline:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
