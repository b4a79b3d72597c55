"""Bandwidth of every quantizer against a copy, and speed of FP8 matmuls against bf16's, all in one run.

    python benchmarks/kernels.py [--csv docs/kernels.csv]

The quantizers read a gradient-sized bf16 matrix, the next of three each time so that no cache holds it; bytes are what
must be read and written once. The matmuls are the three of every linear of DeiT-B on 128 images: Y, dX, dW.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import count

import torch
from common import append_rows, csv_file, median_and_percentiles, positive, timed

from quantization import Quantizer, has_fp8
from quantization.formats import Fp8
from quantization.matmul import multiply
from quantization.mx import backend_for
from quantization.reference import Operand, Packed
from runtime.environment import environment

NEAREST, STOCHASTIC = Quantizer(), Quantizer(rounding="stochastic")


def quantizers(rows: int, columns: int, device: torch.device) -> dict:
    """For every kernel, the function to call and the bytes per element that it must move."""
    inputs = [torch.randn(rows, columns, device=device).bfloat16() for _ in range(3)]
    turn, output = count(), torch.empty_like(inputs[0])
    backend, keys = backend_for(output), torch.randint(0, 2**62, (2,), device=device).split(1)
    lost = torch.zeros(1, dtype=torch.int64, device=device)
    largest = backend.largest_magnitude(inputs[0])
    how = (NEAREST.element, NEAREST.scaling)
    _, codes, scales, _ = backend.quantize(inputs[0], *how, NEAREST.rounding)
    packed = Packed(codes, scales, columns, NEAREST)

    def x() -> torch.Tensor:
        return inputs[next(turn) % 3]

    def both(source, q_rows, q_columns, fp8, **options):
        return backend.quantize_both(
            source, q_rows, q_columns, keys=keys, fp8=fp8, largest=largest, lost=lost, **options
        )

    bits = 4.25 / 8
    fp8 = {"fp8": Fp8.E5M2, "largest": largest, "lost": lost}
    return {
        "copy": (lambda: output.copy_(x()), 4),
        "largest magnitude": (lambda: backend.largest_magnitude(x()), 2),
        "nearest, rows: codes": (lambda: backend.quantize(x(), *how, NEAREST.rounding), 2 + bits),
        "nearest, rows: FP8": (lambda: both(x(), NEAREST, None, Fp8.E5M2), 3),
        "nearest, rows: codes and FP8 (Q1)": (lambda: backend.quantize(x(), *how, NEAREST.rounding, **fp8), 3 + bits),
        "stochastic, rows: FP8 (Q3)": (lambda: both(x(), STOCHASTIC, None, Fp8.E5M2), 3),
        "stochastic, columns: FP8 (Q5)": (lambda: both(x(), None, STOCHASTIC, Fp8.E5M2, with_sum=True), 3),
        "stochastic, columns of codes: FP8 (Q4, Q6)": (lambda: both(packed, None, STOCHASTIC, Fp8.E4M3), 1 + bits),
    }


def matmuls(tokens: int, width: int, device: torch.device):
    """Name, floating-point operations, and the FP8 and bf16 operands of the matmuls of a block's linears."""
    shapes = {"qkv": (width, 3 * width), "proj": (width, width), "fc1": (width, 4 * width), "fc2": (4 * width, width)}
    for name, (d, c) in shapes.items():
        for matmul, m, k, n in (("Y", tokens, d, c), ("dX", tokens, c, d), ("dW", c, tokens, d)):
            a, b = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
            one = torch.ones(1, device=device)
            fp8 = Operand(a.to(torch.float8_e5m2), one), Operand(b.to(torch.float8_e4m3fn), one)
            bf16 = Operand(a.bfloat16()), Operand(b.bfloat16())
            yield f"{name} {matmul}", 2 * m * k * n, fp8, bf16, torch.float32 if matmul == "dW" else torch.bfloat16


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, default=128 * 197)
    parser.add_argument("--width", type=positive, default=768)
    parser.add_argument("--repeats", type=positive, default=30)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("--csv", type=csv_file, help="append one row a measurement to this file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("kernels.py: error: timing needs a GPU, PyTorch finds none", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    where = environment(device.type == "cuda")
    print(", ".join(f"{key} {value}" for key, value in where.items()), "\n")
    rows, copy_speed = [], None
    print("| quantizer | us (20 %, 80 %) | GB/s | of a copy |\n| --- | --- | --- | --- |")
    for name, (call, num_bytes) in quantizers(args.tokens, 4 * args.width, device).items():
        median, low, high = median_and_percentiles(timed(call, device, 3, args.repeats, behind=0.01))
        speed = num_bytes * args.tokens * 4 * args.width / median / 1e6
        copy_speed = copy_speed or speed
        print(f"| {name} | {1e3 * median:.1f} ({1e3 * low:.1f}, {1e3 * high:.1f}) | {speed:,.0f} ", end="")
        print(f"| {speed / copy_speed:.0%} |", flush=True)
        rows.append(where | {"what": name, "us": round(1e3 * median, 1), "rate": round(speed), "unit": "GB/s"})
    total = {"fp8": 0.0, "bf16": 0.0}
    print("\n| matmul | bf16 TFLOP/s | FP8 TFLOP/s | bf16 time / FP8 time |\n| --- | --- | --- | --- |")
    for name, operations, fp8, bf16, dtype in matmuls(args.tokens, args.width, device):
        times = {}
        for kind, operands in (("bf16", bf16), ("fp8", fp8)):
            product = partial(multiply, *operands, dtype)
            times[kind], _, _ = median_and_percentiles(timed(product, device, 3, args.repeats, behind=0.01))
            total[kind] += times[kind]
            rate = operations / times[kind] / 1e9
            what = {"what": f"{name} {kind}", "us": round(1e3 * times[kind], 1), "rate": round(rate)}
            rows.append(where | what | {"unit": "TFLOP/s"})
        speeds = [f"{operations / times[kind] / 1e9:.0f}" for kind in ("bf16", "fp8")]
        print(f"| {name} | {' | '.join(speeds)} | {times['bf16'] / times['fp8']:.2f} |", flush=True)
    print(f"| all of a block | | | {total['bf16'] / total['fp8']:.2f} |")
    if args.device == "cuda" and not has_fp8(device):
        print("\nThis GPU has no FP8 tensor cores; the FP8 column is not what training uses here.")
    if args.csv:
        append_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
