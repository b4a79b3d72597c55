"""Bandwidth of every quantizer against a copy, and speed of FP8 matmuls against bf16's, all in one run.

    python benchmarks/kernels.py [--shapes 25216x3072 ...] [--csv docs/kernels.csv]

The quantizers read a gradient-sized bf16 matrix, the next of three each time so that no cache holds it, and take turns
with the copy launch by launch; bytes are what must be read and written once. The matmuls are the three of every linear
of DeiT-B on 128 images: Y, dX, dW.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import count

import torch
from common import append_rows, csv_file, interleaved, median_and_percentiles, positive, timed

from quantization import Quantizer, has_fp8
from quantization.formats import Fp8
from quantization.matmul import multiply
from quantization.mx import backend_for
from quantization.reference import Operand, Packed
from runtime.environment import environment

NEAREST, STOCHASTIC = Quantizer(), Quantizer(rounding="stochastic")


SHAPES = ((25216, 3072), (25216, 768), (50432, 384), (12608, 4096))
"""Tokens and channels: fc1's output and the residual stream of DeiT-B, that of DeiT-S, fc1's output of ViT-L."""


def matrix_shape(text: str) -> tuple[int, int]:
    """An argparse type: ROWSxCOLUMNS."""
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) * int(columns)):
        raise argparse.ArgumentTypeError(f"must be ROWSxCOLUMNS, such as 25216x3072, got {text}")
    return int(rows), int(columns)


def quantizers(rows: int, columns: int, device: torch.device) -> dict:
    """For every kernel, the function to call and the bytes per element that it must move."""
    inputs = [torch.randn(rows, columns, device=device).bfloat16() for _ in range(3)]
    turn, output = count(), torch.empty_like(inputs[0])
    backend, key = backend_for(output), torch.randint(0, 2**62, (1,), device=device)
    lost = torch.zeros(1, dtype=torch.int64, device=device)
    largest = backend.largest_magnitude(inputs[0])
    _, codes, scales, _ = backend.quantize(inputs[0], NEAREST)
    packed = Packed(codes, scales, columns, NEAREST)

    def x() -> torch.Tensor:
        return inputs[next(turn) % 3]

    def both(source, q_rows, q_columns, fp8, **options):
        return backend.quantize_both(source, q_rows, q_columns, key=key, fp8=fp8, largest=largest, lost=lost, **options)

    bits = 4.25 / 8
    fp8 = {"fp8": Fp8.E5M2, "largest": largest, "lost": lost}
    return {
        "copy": (lambda: output.copy_(x()), 4),
        "largest magnitude": (lambda: backend.largest_magnitude(x()), 2),
        "nearest, rows: codes": (lambda: backend.quantize(x(), NEAREST), 2 + bits),
        "nearest, rows: FP8": (lambda: both(x(), NEAREST, None, Fp8.E5M2), 3),
        "nearest, rows: codes and FP8 (Q1)": (lambda: backend.quantize(x(), NEAREST, **fp8), 3 + bits),
        "stochastic, rows and columns: FP8, sums (Q3 + Q5)": (
            lambda: both(x(), STOCHASTIC, STOCHASTIC, Fp8.E5M2, with_sum=True),
            4,
        ),
        "stochastic, rows and columns: FP8": (lambda: both(x(), STOCHASTIC, STOCHASTIC, Fp8.E5M2), 4),
        "stochastic, rows: FP8 (Q3 alone)": (lambda: both(x(), STOCHASTIC, None, Fp8.E5M2), 3),
        "stochastic, columns: FP8, sums (Q5 alone)": (lambda: both(x(), None, STOCHASTIC, Fp8.E5M2, with_sum=True), 3),
        "stochastic, columns of codes: FP8 (Q4, Q6)": (lambda: both(packed, None, STOCHASTIC, Fp8.E4M3), 1 + bits),
    }


def time_quantizers(shape: tuple[int, int], device: torch.device, repeats: int) -> list[dict]:
    """Print a table of the quantizers of one matrix, and return its rows for a csv file."""
    calls = quantizers(*shape, device)
    times = interleaved({name: call for name, (call, _) in calls.items()}, device, 3, repeats)
    print(f"| quantizer, {shape[0]:,} x {shape[1]:,} | us (20 %, 80 %) | GB/s | of a copy |\n| --- | --- | --- | --- |")
    rows, speeds = [], {}
    for name, (_, num_bytes) in calls.items():
        median, low, high = median_and_percentiles(times[name])
        speeds[name] = num_bytes * shape[0] * shape[1] / median / 1e6
        print(f"| {name} | {1e3 * median:.1f} ({1e3 * low:.1f}, {1e3 * high:.1f}) | {speeds[name]:,.0f} ", end="")
        print(f"| {speeds[name] / speeds['copy']:.0%} |", flush=True)
        what = {"what": name, "shape": "x".join(map(str, shape)), "us": round(1e3 * median, 1)}
        rows.append(what | {"rate": round(speeds[name]), "unit": "GB/s"})
    print()
    return rows


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


def time_matmuls(tokens: int, width: int, device: torch.device, repeats: int) -> list[dict]:
    """Print a table of the matmuls of a block, and return its rows for a csv file."""
    rows, total = [], {"fp8": 0.0, "bf16": 0.0}
    print("| matmul | bf16 TFLOP/s | FP8 TFLOP/s | bf16 time / FP8 time |\n| --- | --- | --- | --- |")
    for name, operations, fp8, bf16, dtype in matmuls(tokens, width, device):
        times = {}
        for kind, operands in (("bf16", bf16), ("fp8", fp8)):
            product = partial(multiply, *operands, dtype)
            times[kind], _, _ = median_and_percentiles(timed(product, device, 3, repeats, behind=0.01))
            total[kind] += times[kind]
            rate = operations / times[kind] / 1e9
            what = {"what": f"{name} {kind}", "shape": f"{tokens}x{width}", "us": round(1e3 * times[kind], 1)}
            rows.append(what | {"rate": round(rate), "unit": "TFLOP/s"})
        speeds = [f"{operations / times[kind] / 1e9:.0f}" for kind in ("bf16", "fp8")]
        print(f"| {name} | {' | '.join(speeds)} | {times['bf16'] / times['fp8']:.2f} |", flush=True)
    print(f"| all of a block | | | {total['bf16'] / total['fp8']:.2f} |")
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = " ".join(f"{rows}x{columns}" for rows, columns in SHAPES)
    parser.add_argument(
        "--shapes", nargs="+", type=matrix_shape, default=SHAPES, metavar="ROWSxCOLUMNS", help=f"default: {default}"
    )
    parser.add_argument("--tokens", type=positive, default=128 * 197, help="of the matmuls (default: 25216)")
    parser.add_argument("--width", type=positive, default=768, help="of the matmuls' model (default: 768)")
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
    rows = [row for shape in args.shapes for row in time_quantizers(shape, device, args.repeats)]
    rows += time_matmuls(args.tokens, args.width, device, args.repeats)
    if args.device == "cuda" and not has_fp8(device):
        print("\nThis GPU has no FP8 tensor cores; the FP8 column is not what training uses here.")
    if args.csv:
        append_rows(args.csv, [where | row for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
