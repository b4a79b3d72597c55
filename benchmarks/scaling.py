"""One training step by one process and by several, each on a GPU of its own: how many more images per second.

    python benchmarks/scaling.py [--model deit_small_patch16_224] [--batch-size 256] [--compile] [--graph] [--csv FILE]

Starts the processes itself. Each trains on random images of its own that lie on its GPU, under bf16 autocast, all of
them with batches of the same size: DDP gives each the whole model, FSDP2 a part of it (`main.py --fsdp`). With
`--graph`, each replays its passes as a CUDA graph and gradients are averaged after them (`main.py --cuda-graph`).
Steps follow one another without a break, as in training. Milliseconds are the slowest process's median with 20th and
80th percentiles, memory is the first one's peak. At the end all processes must hold the same weights.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from itertools import cycle

import torch
import torch.nn.functional as F
from common import append_rows, csv_file, median_and_percentiles, model_name, positive, timed
from torch import multiprocessing
from torch.distributed import TCPStore

from engine import TrainStep
from quantization import RECIPES as NAMED
from quantization import Recipe, create_model
from runtime import processes, sharding
from runtime.environment import environment
from runtime.rank_check import RankCheck
from training.losses import OutputLoss

RECIPES = {"bf16": NAMED["none"], "TetraJet": Recipe()}
WARM_UP = 8  # steps
QUEUED = 0.05  # seconds of other work before the first timed step; from there on no step waits for the one before


def measure(recipe: str, how: str, args: argparse.Namespace, device: torch.device) -> dict:
    """All processes must call it; `how` is "alone", "DDP", "FSDP2" or "graphs". Raises RanksDiffer."""
    torch._dynamo.reset()
    gc.collect()  # models refer to themselves in circles
    torch.manual_seed(0)
    model = create_model(args.model, RECIPES[recipe], drop_path_rate=0.1)
    size, classes = model.patch_embed.img_size, model.num_classes
    parallel = model
    if how == "FSDP2":
        sharding.shard(model, device)
    else:
        model.to(device)
        if args.compile:
            model.compile()
    if how == "DDP":
        parallel = processes.data_parallel(model, device)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=fused)
    torch.manual_seed(1 + processes.rank())
    images = torch.randn(4, args.batch_size, 3, *size, device=device)
    labels = torch.randint(0, classes, (4, args.batch_size), device=device)
    batches = cycle(zip(images, labels))
    step = TrainStep(parallel, OutputLoss(F.cross_entropy), optimizer, device, cuda_graph=args.graph)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = timed(lambda: step(next(batches)), device, WARM_UP, args.steps, behind=QUEUED)
    step.settle()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    RankCheck(model, optimizer, every=1).after_step()
    median, low, high = max(processes.gather(median_and_percentiles(times)))
    speed = 1000 * args.batch_size * processes.world_size() / median
    return {
        **{"model": args.model, "batch": args.batch_size, "recipe": recipe, "how": how},
        **{"compiled": args.compile, "graph": args.graph, "processes": processes.world_size()},
        **{"ms": round(median, 2), "ms_20": round(low, 2), "ms_80": round(high, 2)},
        **{"img_per_s": round(speed), "peak_gib": round(peak, 2)},
    }


def work(rank: int, world_size: int, port: int, args: argparse.Namespace, results: multiprocessing.SimpleQueue) -> None:
    """The work of each process; the first one puts a dict into `results` for every measurement."""
    if world_size > 1:
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world_size}
        there |= {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ |= {name: str(value) for name, value in (there | {"TORCHELASTIC_RESTART_COUNT": 0}).items()}
    device = processes.start(args.device)
    together = ["graphs"] if args.graph else ["DDP"] if args.compile else ["DDP", "FSDP2"]
    for how in ["alone"] if world_size == 1 else together:
        for recipe in args.recipes:
            row = measure(recipe, how, args, device)
            if processes.is_main():
                results.put(environment(device.type == "cuda") | row)
    processes.stop()


def rows(world_size: int, args: argparse.Namespace) -> list[dict]:
    """Raises an exception with the first failed process's traceback."""
    # As torchrun does: the store is here, so that no other program can take its port before the processes come.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(work, (world_size, store.port, args, results), nprocs=world_size)
    found = []
    while not results.empty():
        found.append(results.get())
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=model_name, default="deit_small_patch16_224", metavar="NAME", help="default: %(default)s"
    )
    parser.add_argument("--batch-size", type=positive, default=256, help="images per step and process (default: 256)")
    parser.add_argument("--steps", type=positive, default=30, help="timed steps (default: 30)")
    parser.add_argument("--processes", type=positive, help="default: as many as there are GPUs; two on a CPU")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES, help="default: all")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model; without FSDP2")
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs; without DDP and FSDP2")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("--csv", type=csv_file, help="append one row a measurement to this file")
    args = parser.parse_args(argv)
    present = torch.cuda.device_count()
    wanted = args.processes or (present if args.device == "cuda" else 2)
    if args.processes == 1:
        print("scaling.py: error: --processes must be at least 2, one is always measured, got 1", file=sys.stderr)
        return 2
    if args.device == "cuda" and (wanted < 2 or wanted > present):
        print(
            f"scaling.py: error: several processes need a GPU each, PyTorch finds {present}; --device cpu needs none",
            file=sys.stderr,
        )
        return 2
    if args.graph and args.device == "cpu":
        print("scaling.py: error: --graph records what a GPU does; leave it out with --device cpu", file=sys.stderr)
        return 2
    alone: dict[str, float] = {}
    for world_size in (1, wanted):
        for row in rows(world_size, args):
            if not alone:
                print(", ".join(f"{key} {row[key]}" for key in ("device", "torch", "triton", "timm", "commit")), end="")
                more = ", compiled" * args.compile + ", CUDA graphs" * args.graph
                print(f"; {args.model}, batch {args.batch_size} each{more}\n")
                print("| recipe | processes | ms per step (20 %, 80 %) | img/s | / one process | peak GiB |")
                print("| --- | --- | --- | --- | --- | --- |")
            ratio = row["img_per_s"] / alone.setdefault(row["recipe"], row["img_per_s"])
            print(
                f"| {row['recipe']} | {world_size}{'' if world_size == 1 else ', ' + row['how']} "
                f"| {row['ms']:.1f} ({row['ms_20']:.1f}, {row['ms_80']:.1f}) | {row['img_per_s']:,} | {ratio:.2f} "
                f"| {row['peak_gib']:.1f} |",
                flush=True,
            )
            if args.csv:
                append_rows(args.csv, [row | {"ratio": round(ratio, 3)}])
    return 0


if __name__ == "__main__":
    sys.exit(main())
