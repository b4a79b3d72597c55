"""A profile of a training step tells where its time goes: the GPU time of its kernels by kind.

    python benchmarks/profile_step.py [--model NAME] [--variants NAME ...] [--csv FILE]

The steps are those of `train_step.py`, run under PyTorch's profiler. A row gives the milliseconds per step of all
kernels of one kind, for each variant; kernels run one after the other, so the total is the time that the GPU works.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter

import torch
from common import append_rows, csv_file, model_name, positive
from torch.profiler import ProfilerActivity, profile
from train_step import MODELS, VARIANTS, Variant, by_reference, step_of

from runtime.environment import environment

# The first pattern that a kernel's name contains gives its kind.
KINDS = {
    "Q3 + Q5": r"_quantize_dense_kernel|_add_up_kernel",
    "Q4, Q6": r"_quantize_packed_kernel",
    "Q1, Q2": r"_quantize_kernel|_dequantize_kernel",
    "amax": r"_largest_kernel",
    "attention": r"flash|fmha|sdpa|attention",
    "optimizer": r"adam|multi_tensor|lerp",
    "matmuls": r"gemm|nvjet|cutlass|cublas|xmma|splitK",
    "elementwise, compiled": r"^triton_",
    "copies": r"^Mem(cpy|set)",
    "other": "",
}


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


def milliseconds(name: str, batch_size: int, variant: Variant, device: torch.device, steps: int) -> Counter[str]:
    """Milliseconds per step of each kind of kernels. Without a GPU, those of PyTorch's operators, which are `other`."""
    step = step_of(name, batch_size, variant, device)
    on_gpu = device.type == "cuda"
    with by_reference(variant.reference):
        for _ in range(5 if on_gpu else 1):
            step()
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as run:
            for _ in range(steps):
                step()
            if on_gpu:
                torch.cuda.synchronize()
    times = Counter()
    for event in run.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[kind_of(event.key) if on_gpu else "other"] += microseconds / 1000 / steps
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_name, default="deit_base_patch16_224", metavar="NAME")
    default = ["bf16, compiled, graph", "TetraJet, compiled, graph"]
    parser.add_argument("--variants", nargs="+", default=default, choices=VARIANTS, metavar="NAME")
    parser.add_argument("--steps", type=positive, default=10, help="profiled steps (default: 10)")
    parser.add_argument("--batch-size", type=positive, help="instead of the model's own in train_step.py")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("--csv", type=csv_file, help="append one row a kind and variant to this file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("profile_step.py: error: profiling kernels needs a GPU, PyTorch finds none", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    where = environment(device.type == "cuda")
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    batch_size = args.batch_size or MODELS.get(args.model, 128)
    tables = {v: milliseconds(args.model, batch_size, VARIANTS[v], device, args.steps) for v in args.variants}
    print(
        f"\n| {args.model}, batch {batch_size}: ms per step | {' | '.join(tables)} |\n| --- |{' --- |' * len(tables)}"
    )
    for kind in KINDS:
        print(f"| {kind} | {' | '.join(f'{table[kind]:.2f}' for table in tables.values())} |")
    print(f"| all kernels | {' | '.join(f'{table.total():.2f}' for table in tables.values())} |")
    if args.csv:
        what = {"model": args.model, "batch": batch_size}
        rows = [(v, kind, table[kind]) for v, table in tables.items() for kind in KINDS]
        append_rows(args.csv, [where | what | {"variant": v, "kind": kind, "ms": round(ms, 3)} for v, kind, ms in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
