"""How fast images arrive and how fast a step takes them, all in one run, on generated JPEGs of ImageNet's size.

    python benchmarks/input.py [--models NAME ...] [--workers N] [--csv docs/input.csv]

The files are JPEGs of 500 x 375 pixels and about 78 KB with DeiT's augmentation. Decoding, the CPU's transform and the
CPU's part of --augment-on gpu are images for each core and second, on one core. The loader without training and
training end to end use --workers processes and are timed when the batches that were loaded in advance are used up.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from common import append_rows, csv_file, median_and_percentiles, model_name, positive, timed
from PIL import Image
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torchvision.io import decode_jpeg

from data.augmentation.draws import Draws
from data.feed import Feed
from datasets import RAND_AUGMENT, AugmentOn, DataConfig, build_loaders, set_epoch
from engine import TrainStep
from quantization import Recipe, create_model
from runtime.environment import environment
from training.losses import OutputLoss

MODELS = {"deit_small_patch16_224": 256, "deit_base_patch16_224": 128}
FILES = 256
"""Different files; the data set has each of them under many names."""
PREFETCHED = 2
"""Batches that each loader process prepares in advance."""


def jpeg(random: np.random.Generator, width: int, height: int) -> bytes:
    """A smooth image with noise, whose weight at 500 x 375 is that of ImageNet's mean file."""
    small = Image.fromarray(random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    noise = random.normal(0, 17, (height, width, 3))
    values = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) + noise
    content = BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=85)
    return content.getvalue()


def write_images(root: Path, training: int) -> list[bytes]:
    """train/ with `training` names and val/ with ten for the generated files; returns the files' contents."""
    random = np.random.default_rng(0)
    contents = [jpeg(random, 500, 375) for _ in range(min(FILES, training))]
    for split, count in (("train", training), ("val", 10)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i}.jpg"
            first = root / "train" / "ab"[i % len(contents) % 2] / f"{i % len(contents)}.jpg"
            if first.exists():
                os.link(first, path)
            else:
                path.write_bytes(contents[i])
    return contents


def config_of(root: Path, size: int, batch_size: int, workers: int, augment_on: AugmentOn) -> DataConfig:
    """DeiT's augmentation, without repeats, so that an epoch has each name once."""
    files = DataConfig("FOLDER", str(root), False, size, batch_size, workers, 1, 0, RAND_AUGMENT, 0.3, 0.25)
    return replace(files, augment_on=augment_on)


def per_second(work: Callable[[], object], images: int, seconds: float) -> float:
    """Images a second on this process's core, for as long as `seconds`."""
    work()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or not done:
        work()
        done += images
    return done / (time.perf_counter() - start)


def on_one_core(root: Path, size: int, contents: list[bytes], seconds: float) -> dict[str, float]:
    """Images for each core and second: decoding alone, the CPU's whole transform, and its part of --augment-on gpu."""
    torch.set_num_threads(1)
    part = contents[:32]
    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in part]
    found = {
        "decoding by Pillow": lambda: [Image.open(BytesIO(content)).convert("RGB") for content in part],
        "decoding by torchvision": lambda: [decode_jpeg(tensor) for tensor in tensors],
    }
    for title, augment_on in (("transform on the CPU", AugmentOn.CPU), ("CPU part of gpu", AugmentOn.GPU)):
        loaders = build_loaders(config_of(root, size, len(part), 0, augment_on))
        plan = next(iter(loaders.train.batch_sampler))
        found[title] = lambda split=loaders.train.dataset, plan=plan: split.__getitems__(plan)
    return {title: per_second(work, len(part), seconds) for title, work in found.items()}


def by_nvjpeg(contents: list[bytes], batch_size: int, device: torch.device) -> float:
    """Images a second that the GPU decodes, a batch at a time."""
    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    batch = list(itertools.islice(itertools.cycle(tensors), batch_size))
    times = timed(lambda: decode_jpeg(batch, device=device), device, warm_up=2, repeats=5)
    return 1000 * batch_size / median_and_percentiles(times)[0]


def gpu_part(feed: Feed, device: torch.device, repeats: int) -> float:
    """Milliseconds of GPU work for a batch: flip, operations, normalization and erasing."""
    plans = iter(feed.batch_sampler)
    batches = [feed.dataset.__getitems__(next(plans)) for _ in range(2)]
    ready = itertools.cycle([(batch.images.to(device), batch.draws) for batch in batches])

    def augment() -> torch.Tensor:
        images, draws = next(ready)
        assert isinstance(draws, Draws)
        return feed.finish(images, draws)

    behind = 0.5 if device.type == "cuda" else 0.0
    return median_and_percentiles(timed(augment, device, 3, repeats, behind))[0]


def speed_of(batches: Iterable, batch_size: int, warm_up: int, steps: int, work: Callable, device) -> float:
    """Images a second over `steps` batches after `warm_up` ones; `work` takes each batch."""
    start = 0.0
    for index, batch in enumerate(itertools.islice(batches, warm_up + steps)):
        if index == warm_up:
            _wait(device)
            start = time.perf_counter()
        work(batch)
    _wait(device)
    return batch_size * steps / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_of(name: str, device: torch.device) -> TrainStep:
    """A TetraJet step with Mixup and CutMix; on a GPU compiled and replayed as a graph."""
    torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(0)
    model = create_model(name, Recipe(), drop_path_rate=0.1, num_classes=2).to(device).train()
    on_gpu = device.type == "cuda"
    if on_gpu:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=on_gpu)
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=2)
    return TrainStep(model, OutputLoss(SoftTargetCrossEntropy()), optimizer, device, mixup, cuda_graph=on_gpu)


def measure_model(name: str, root: Path, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Images a second of the step alone, of the loaders without training, and of training end to end."""
    batch_size, step = args.batch_size or MODELS.get(name, 128), step_of(name, device)
    size = step.model.patch_embed.img_size[0]
    images = torch.randn(batch_size, 3, size, size, device=device)
    random = itertools.repeat((images, torch.zeros(batch_size, dtype=torch.int64, device=device)))
    found = {"step alone": speed_of(random, batch_size, min(8, args.steps), args.steps, step, device)}
    for augment_on, steps in ((AugmentOn.CPU, args.cpu_steps), (AugmentOn.GPU, args.steps)):
        if steps < 1:
            continue
        config = config_of(root, size, batch_size, args.workers, augment_on)
        loader = build_loaders(config, device).train
        warm_up = PREFETCHED * args.workers
        for epoch, (title, work) in enumerate((("loader alone", lambda batch: None), ("end to end", step))):
            set_epoch(loader, config, epoch)
            speed = speed_of(Feed.of(loader, device), batch_size, warm_up, steps, work, device)
            found[f"{title}, {augment_on.value}"] = speed
        if augment_on is AugmentOn.GPU:
            found["GPU part, ms"] = gpu_part(loader, device, args.steps)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=model_name, default=list(MODELS), metavar="NAME")
    parser.add_argument(
        "--workers", type=positive, default=max(1, (os.cpu_count() or 2) - 1), help="default: cores - 1"
    )
    parser.add_argument("--steps", type=positive, default=60, help="timed steps (default: 60)")
    parser.add_argument("--cpu-steps", type=int, default=30, help="the same of --augment-on cpu; 0: none (default: 30)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement on one core (default: 5)")
    parser.add_argument("--batch-size", type=positive, help="instead of each model's own")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("--csv", type=csv_file, help="append one row a number to this file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("input.py: error: timing needs a GPU, PyTorch finds none", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    where = environment(device.type == "cuda") | {"cores": os.cpu_count(), "workers": args.workers}
    print(", ".join(f"{key} {value}" for key, value in where.items()) + "\n")
    print("| model, batch | what | value |\n| --- | --- | --- |")

    def show(model: str, batch_size: int | str, found: dict[str, float]) -> None:
        for title, value in found.items():
            unit = "" if title.endswith("ms") else " img/s"
            print(
                f"| {model.split('_patch')[0]}, {batch_size} | {title} | {value:,.{0 if unit else 2}f}{unit} |",
                flush=True,
            )
        rows = [
            where | {"model": model, "batch": batch_size, "what": t, "value": round(v, 2)} for t, v in found.items()
        ]
        if args.csv:
            append_rows(args.csv, rows)

    with tempfile.TemporaryDirectory() as directory:
        root, largest = Path(directory), max(args.batch_size or MODELS.get(name, 128) for name in args.models)
        steps = PREFETCHED * args.workers + max(args.steps, args.cpu_steps) + 1
        contents = write_images(root, max(32, largest * steps))
        weight = sum(map(len, contents)) / len(contents) / 1000
        print(f"| | weight of a file | {weight:.0f} KB |")
        show("one core", "", on_one_core(root, 224, contents, args.seconds))
        if device.type == "cuda":
            show("nvJPEG", largest, {"decoding by nvJPEG": by_nvjpeg(contents, largest, device)})
        for name in args.models:
            show(name, args.batch_size or MODELS.get(name, 128), measure_model(name, root, args, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
