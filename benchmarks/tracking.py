"""The cost of `--track-oscillation`: a training step without it, outside its windows and within one, taking turns.

    python benchmarks/tracking.py [--model NAME] [--csv docs/tracking.csv]

A step is as in train_step.py. Milliseconds are medians over all rounds with 20th and 80th percentiles; opening a window
and what is measured at its end come once an epoch each.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from common import append_rows, csv_file, median_and_percentiles, model_name, positive, timed
from torch.utils.data import TensorDataset
from train_step import MODELS, Variant, training_step

from quantization import Recipe, create_model
from runtime.environment import environment
from tracking.tracker import NUM_IMAGES, TRACKED_STEPS, OscillationTracker

FAR = 10**9  # steps to the end of the epoch: no window opens
WITHOUT, OUTSIDE, WITHIN = "without", "outside a window", "within a window"
OPENING, CLOSING = "opening a window", "measuring at its end"


def measure(name: str, batch_size: int, graph: bool, device: torch.device, rounds: int, steps: int) -> dict[str, list]:
    """Milliseconds of `steps` steps of each kind a round; of openings and closings, one a round."""
    torch.manual_seed(0)
    model = create_model(name, Recipe(), drop_path_rate=0.1).to(device)
    step = training_step(model, batch_size, Variant(Recipe(), graph=graph), device)
    size = model.patch_embed.img_size
    images = TensorDataset(torch.randn(NUM_IMAGES, 3, *size), torch.zeros(NUM_IMAGES, dtype=torch.long))
    outside, within = (OscillationTracker(model, images, device) for _ in range(2))
    outside.before_epoch(FAR)

    def tracked(tracker: OscillationTracker) -> None:
        step()
        tracker.after_step()

    times = {kind: [] for kind in (WITHOUT, OUTSIDE, WITHIN, OPENING, CLOSING)}
    for _ in range(6):  # compilation; recording a graph
        step()
    for number in range(rounds + 1):
        found = {
            WITHOUT: timed(step, device, 1, steps),
            OUTSIDE: timed(lambda: tracked(outside), device, 1, steps),
            OPENING: timed(lambda: within.before_epoch(0), device, 0, 1),
            WITHIN: timed(lambda: tracked(within), device, 1, steps),
            CLOSING: timed(lambda: within.after_epoch(0, 0), device, 0, 1),
        }
        if number > 0:  # the first round compiles what a window needs
            for kind in times:
                times[kind] += found[kind]
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=model_name, default="deit_small_patch16_224", metavar="NAME", help="default: %(default)s"
    )
    parser.add_argument("--batch-size", type=positive, help="instead of the model's own")
    parser.add_argument("--graph", action="store_true", help="forward and backward pass replayed as a CUDA graph")
    parser.add_argument("--rounds", type=positive, default=6, help="default: 6")
    parser.add_argument("--steps", type=positive, default=10, help="of each kind a round (default: 10)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("--csv", type=csv_file, help="append one row a kind to this file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("tracking.py: error: timing needs a GPU, PyTorch finds none", file=sys.stderr)
        return 2
    if args.graph and args.device == "cpu":
        print("tracking.py: error: --graph records what a GPU does; leave it out with --device cpu", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    batch_size = args.batch_size or MODELS.get(args.model, 128)
    where = environment(device.type == "cuda")
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(
        f"{args.model}, batch {batch_size}{', CUDA graph' * args.graph}, {args.rounds} rounds of {args.steps} steps\n"
    )
    times = measure(args.model, batch_size, args.graph, device, args.rounds, args.steps)
    plain = statistics.median(times[WITHOUT])
    rows = []
    print("| TetraJet's step | ms (20 %, 80 %) | time / without |\n| --- | --- | --- |")
    for kind, found in times.items():
        median, low, high = median_and_percentiles(sorted(found))
        print(f"| {kind} | {median:.2f} ({low:.2f}, {high:.2f}) | {median / plain:.4f} |")
        numbers = {"model": args.model, "batch": batch_size, "graph": args.graph, "kind": kind, "ms": round(median, 3)}
        rows.append(
            where | numbers | {"ms_20": round(low, 3), "ms_80": round(high, 3), "ratio": round(median / plain, 4)}
        )
    window = TRACKED_STEPS * (statistics.median(times[WITHIN]) - plain)
    window += sum(statistics.median(times[kind]) for kind in (OPENING, CLOSING))
    print(
        f"\nA window of {TRACKED_STEPS} steps costs {window:.0f} ms per epoch, the time of {window / plain:.1f} steps."
    )
    if args.csv:
        append_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
