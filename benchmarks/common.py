"""Code that the benchmarks share: timing, CSV files with one row per number, and the path to the project's modules."""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def model_name(text: str) -> str:
    """An argparse type: a model of timm that can be quantized."""
    from quantization import Recipe, create_model

    try:
        with torch.device("meta"):
            create_model(text, Recipe())
    except (RuntimeError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"must be a model of timm that can be quantized, got {text}: {error}"
        ) from error
    return text


def csv_file(text: str) -> Path:
    """An argparse type: a file to append to, which is made with its directory if it does not exist."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, got the directory {text}")
    return Path(text)


def timed(call: Callable[[], object], device: torch.device, warm_up: int, repeats: int, behind: float = 0.0) -> list:
    """Milliseconds of every repeat, sorted.

    `behind` seconds of other work are queued on a GPU first, so that short calls are not timed by how fast Python
    launches them.
    """
    for _ in range(warm_up):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
        return sorted(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    if behind:
        torch.cuda._sleep(int(behind * 1.7e9))  # clock cycles
    for start, end in events:
        start.record()
        call()
        end.record()
        if not behind:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)


def interleaved(
    calls: dict[str, Callable[[], object]], device: torch.device, warm_up: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of every repeat of each call, sorted. The calls take turns, launch by launch.

    So whatever changes with time, such as the clock of a GPU, changes for all of them.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    times = {name: [] for name in calls}
    for _ in range(repeats):
        if device.type == "cuda":
            # Other work is queued first, so that no call is timed by how fast Python launches it.
            torch.cuda._sleep(int(len(calls) * 2e-4 * 1.7e9))  # clock cycles
        spans = []
        for call in calls.values():
            start = _now(device)
            call()
            spans.append((start, _now(device)))
        if device.type == "cuda":
            torch.cuda.synchronize()
        for name, (start, end) in zip(calls, spans):
            times[name].append(start.elapsed_time(end) if device.type == "cuda" else 1000 * (end - start))
    return {name: sorted(values) for name, values in times.items()}


def _now(device: torch.device) -> torch.cuda.Event | float:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def median_and_percentiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), low, high


def append_rows(path: Path, rows: list[dict]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)
