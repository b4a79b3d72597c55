"""The loaders of a run, for the data sets of the files in data/."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

import data
from data.augmentation.images import BatchAugmentation
from data.base import DATA_SETS, SMALL_DATA, AugmentOn, BadImages, DataConfig, DataSet, Preprocessing
from data.epoch_order import EpochBatches, PlannedBatches
from data.feed import Feed
from data.host_part import HostPart
from data.image_files import ImageFiles, ImageFilesLoader, take_bad_images
from data.in_memory import ArrayImages
from data.resident import Resident
from data.transforms import RAND_AUGMENT, SMALL_IMAGE, build_host_part, build_transform
from runtime import processes
from runtime.errors import UserError
from runtime.interrupts import leave_to_parent

__all__ = [
    "CALIBRATION_ORDER",
    "DATA_SETS",
    "RAND_AUGMENT",
    "SMALL_DATA",
    "AugmentOn",
    "BadImages",
    "DataConfig",
    "DataSet",
    "Loaders",
    "Preprocessing",
    "build_loaders",
    "fingerprint",
    "set_epoch",
    "take_bad_images",
]

CALIBRATION_ORDER = 1_000_000  # offset of Q-Ramping's shuffles, which must not repeat the training order

for _module in pkgutil.iter_modules(data.__path__):  # each enters its data sets
    importlib.import_module(f"data.{_module.name}")


@dataclass(frozen=True)
class Loaders:
    """A run's loaders. Each serves batches (images, labels): fp32 [B, 3, height, width] and int64 [B].

    Batches are on the CPU, or on the device if images are augmented there.
    """

    train: DataLoader | Feed | None
    """None for an evaluation, like `calibration`."""
    val: DataLoader | Feed
    """The held-out images, in order, divided among the processes."""
    calibration: DataLoader | Feed | None
    """The training set in an order of its own, for Q-Ramping's detection."""
    num_classes: int
    classes: tuple[str, ...] | None = None
    """The classes' names in the order of their labels, where the data set has them."""


def build_loaders(config: DataConfig, device: torch.device | None = None) -> Loaders:
    """Training, held-out and calibration loaders. Raises UserError for data that is missing or does not fit.

    `device` is where images are augmented if that is by the batch (default: the CPU).
    """
    device = torch.device("cpu") if device is None else device
    train = None if config.held_out_only else _open(config, device, training=True)[0]
    val, num_classes = _open(config, device, training=False)
    val_share = Subset(val, range(processes.rank(), len(val), processes.world_size()))
    classes = tuple(_split(val).classes) if isinstance(_split(val), ImageFiles) else None
    if config.held_out_only:
        return Loaders(None, _loader(val_share, config, device), None, num_classes, classes)
    sampler_options = {"num_replicas": processes.world_size(), "rank": processes.rank(), "shuffle": True}

    def train_loader() -> DataLoader:
        if config.repeats > 1:
            whole = 256 if len(train) >= 256 else 0  # timm before 1.0.30 would select nothing from a smaller set
            sampler = RepeatAugSampler(train, num_repeats=config.repeats, selected_round=whole, **sampler_options)
        else:
            sampler = DistributedSampler(train, **sampler_options)
        batches = EpochBatches(sampler, config.batch_size, drop_last=not config.keep_last_batch)
        return _loader(PlannedBatches(train), config, device, batch_sampler=batches)

    loader = train_loader()
    if len(loader) == 0:
        raise UserError(
            f"an epoch must hold at least one batch: {config.name} gives {len(loader.batch_sampler.sampler)} training "
            f"images to a process, --batch-size is {config.batch_size}; lower --batch-size or --repeats"
        )
    return Loaders(loader, _loader(val_share, config, device), train_loader(), num_classes, classes)


def set_epoch(loader: DataLoader | Feed, config: DataConfig, epoch: int, first: int = 0) -> None:
    """Make the order of a training loader, and its augmentation, a function of the seed and `epoch`.

    The loader then begins with batch `first` of the epoch; it and the later batches are the same for every `first`.
    """
    order = config.seed * 2 * CALIBRATION_ORDER + epoch
    loader.batch_sampler.set_epoch(order, processes.rank(), first)


def fingerprint(config: DataConfig, loaders: Loaders) -> str:
    """Identifies the content of the training and the held-out split. Checkpoints hold it, and resuming compares it."""
    # Each loader wraps its split once: in PlannedBatches or in a Subset.
    splits = (_split(loader.dataset.dataset) for loader in (loaders.train, loaders.val))
    return " + ".join(DATA_SETS[config.name].fingerprint(split) for split in splits)


def _split(dataset: Dataset) -> Dataset:
    """The split as its data set opened it."""
    return dataset.dataset if isinstance(dataset, (HostPart, Resident)) else dataset


def _open(config: DataConfig, device: torch.device, training: bool) -> tuple[Dataset, int]:
    """A split and its number of classes. If batches are augmented on the device, small sets are held there."""
    data_set = DATA_SETS[config.name]
    split, num_classes = data_set.open(config, build_transform(config, data_set, training), training)
    if config.augment_on is AugmentOn.CPU:
        return split, num_classes
    crop, drawer = build_host_part(config, data_set, training)
    as_they_are = config.input_size <= SMALL_IMAGE and isinstance(split, ArrayImages)
    if as_they_are and split.images.shape[1:3] == (config.input_size, config.input_size):
        return Resident(split, device, data_set.padding if training else 0, drawer), num_classes
    return HostPart(split, crop, drawer), num_classes


def _loader(
    dataset: PlannedBatches | Subset,
    config: DataConfig,
    device: torch.device,
    batch_sampler: EpochBatches | None = None,
) -> DataLoader | Feed:
    """A loader in the order of `batch_sampler`; without one in the order of the data set."""
    options = {"batch_size": config.batch_size} if batch_sampler is None else {"batch_sampler": batch_sampler}
    split = dataset.dataset
    if isinstance(dataset, PlannedBatches) or hasattr(split, "__getitems__"):  # which serve whole batches
        options["collate_fn"] = _as_it_is
    loader = (ImageFilesLoader if isinstance(split, (ImageFiles, HostPart, Resident)) else DataLoader)(
        dataset,
        num_workers=0 if isinstance(split, Resident) else config.num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=leave_to_parent,
        **options,
    )
    augmentation = BatchAugmentation(config.preprocessing)
    if isinstance(split, Resident):
        return Feed(loader, device, lambda places, draws: augmentation(split.take(places), draws))
    return Feed(loader, device, augmentation) if isinstance(split, HostPart) else loader


def _as_it_is(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch
