"""Data sets, transforms, samplers and loaders."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision import datasets as tv_datasets
from torchvision import transforms as T

from data.epoch_order import EpochBatches, PlannedBatches
from data.fractals import fractal_images
from quantization.optim.snapshot import rng_state, set_rng_state
from runtime import processes
from runtime.errors import UserError
from runtime.interrupts import leave_to_parent

SMALL_IMAGE = 32  # up to this input size an image is cropped by a few pixels, not resized at random
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"  # DeiT's choice
LEFT_OUT = -100  # label of a held-out image that does not count; cross_entropy's default
CALIBRATION_ORDER = 1_000_000  # offset of Q-Ramping's shuffles, which must not repeat the training order


def _posterize(image: Image.Image, bits_to_keep: int, **unused: object) -> Image.Image:
    """timm's, with black for no bits at all, as of old: newer releases of Pillow refuse them."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):  # the default --aa draws 0 bits now and then
    auto_augment.NAME_TO_OP[_name] = _posterize

SMALL_DATA = {
    "model": "deit_micro_patch4_32",
    "input_size": 32,
    "epochs": 40,
    "batch_size": 128,
    "lr": 1e-3,
    "warmup_lr": 1e-4,
    "warmup_epochs": 2,
    "drop_path": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "aa": "none",
    "color_jitter": 0.0,
    "reprob": 0.0,
    "repeats": 1,
    "model_ema_decay": 0.0,
    "num_workers": 2,
}


@dataclass(frozen=True)
class DataSetInfo:
    """What the command line knows of a data set."""

    description: str
    needs_path: bool = True
    num_classes: int | None = None
    """None: as many as there are folders."""
    flip: float = 0.5
    """Probability of mirroring a training image."""
    padding: int = 4
    """Pixels by which a training image of up to SMALL_IMAGE pixels is shifted at most."""
    options: dict = field(default_factory=dict)
    """Options of main.py that differ from the ImageNet recipe."""


DATA_SETS = {
    "DIGITS": DataSetInfo(
        "1,797 handwritten digits of 8x8 pixels, in scikit-learn: nothing to download",
        needs_path=False,
        num_classes=10,
        flip=0.0,
        padding=0,
        options={**SMALL_DATA, "input_size": 8, "epochs": 8, "batch_size": 32, "lr": 3e-2, "num_workers": 0},
    ),
    "FASHION": DataSetInfo(
        "Fashion-MNIST, padded to 32x32; idx files, gzipped or not", num_classes=10, options=SMALL_DATA
    ),
    "FRACTAL": DataSetInfo(
        "1,000 classes of fractals of 32x32 pixels, drawn in ten seconds: nothing to download",
        needs_path=False,
        num_classes=1000,
        options=SMALL_DATA,
    ),
    "CIFAR10": DataSetInfo("CIFAR-10 as torchvision stores it", num_classes=10, options=SMALL_DATA),
    "CIFAR100": DataSetInfo("CIFAR-100 as torchvision stores it", num_classes=100, options=SMALL_DATA),
    "IMNET": DataSetInfo("ImageNet-1k in train/ and val/, a folder a class", num_classes=1000),
    "FOLDER": DataSetInfo("your own images in train/ and val/, a folder a class"),
}


DOWNLOADABLE = ("FASHION", "CIFAR10", "CIFAR100")
IN_FILES = ("IMNET", "FOLDER")  # a file an image


class BadImages(str, Enum):
    """What to do about an image file that cannot be read."""

    STOP = "stop"
    SKIP = "skip"
    """Train on the next readable image in its place; leave a held-out one out."""


@dataclass(frozen=True)
class DataConfig:
    """One run's data: which set, how its images are prepared, how they are dealt out."""

    name: str
    path: str | None
    download: bool
    input_size: int
    batch_size: int
    """Images a step and process."""
    num_workers: int
    repeats: int
    """Copies of an image, each augmented on its own, in an epoch (repeated augmentation; 1 switches it off)."""
    seed: int
    aa: str
    color_jitter: float
    reprob: float
    bad_images: BadImages = BadImages.STOP
    keep_last_batch: bool = False
    """Train on the images that do not fill a batch, too."""


@dataclass(frozen=True)
class Loaders:
    train: DataLoader
    val: DataLoader
    calibration: DataLoader
    """The training set in an order of its own, for Q-Ramping's detection."""
    num_classes: int


class ImageFiles(tv_datasets.ImageFolder):
    """Images in a folder a class. `bad_images` says what becomes of those that cannot be read.

    If they are skipped, the next readable image takes the place of one, the first following the last, and the label
    tells by being negative: `decode` says whose place was taken by what. So a loader's processes need no other way to
    the main one, and the same images are counted whatever their number.
    """

    def __init__(self, root: Path, transform, bad_images: BadImages) -> None:
        super().__init__(str(root), transform)
        self.bad_images = bad_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        count = len(self.samples)
        for used in (*range(index, count), *range(index)):
            path, label = self.samples[used]
            try:
                image = self.loader(path)
            except Exception as error:  # whatever decoding foreign bytes may raise
                if self.bad_images is BadImages.STOP:
                    raise UserError(
                        f"{path} is not a readable image ({error}); replace or remove it, or pass --bad-images skip"
                    ) from error
                continue
            return self.transform(image), label if used == index else ~(index * count + used)
        raise UserError(f"{self.root} must hold images, none of its {count:,} files is a readable one; replace them")

    def decode(self, label: int) -> tuple[int, list[str]]:
        """The label of the image that took the place, and the paths of those that could not be read."""
        count = len(self.samples)
        index, used = divmod(~label, count)
        bad = (self.samples[(index + i) % count][0] for i in range((used - index) % count))
        return self.targets[used], list(bad)


class ImageLoader(DataLoader):
    """A loader of `ImageFiles` that were not to stop the run: counts those that could not be read.

    Batches come out with ordinary labels; a held-out image that could not be read has the label `LEFT_OUT`.
    """

    def __init__(self, dataset: Dataset, training: bool, **options) -> None:
        self.bad_images = 0
        """Since whoever reports them has set it to 0."""
        self.bad_paths: set[str] = set()
        self._training = training
        super().__init__(dataset, **options)

    def __iter__(self):
        files = self.dataset.dataset
        for images, labels in super().__iter__():
            for place in (labels < 0).nonzero().flatten().tolist():  # on the host
                label, paths = files.decode(int(labels[place]))
                labels[place] = label if self._training else LEFT_OUT
                self.bad_images += 1
                self.bad_paths.update(paths)
            yield images, labels


class ArrayImages(Dataset):
    """Grey images held in memory, [n, height, width] uint8, served as RGB, a batch at a time.

    Where `transform` is no more than a shift by up to `padding` pixels and a flip with probability `flip`, a batch is
    transformed as a whole, a hundred times faster than image by image.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform, light: Light | None) -> None:
        self.images, self.labels, self.transform, self.light = images, labels, transform, light

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.__getitems__([index])
        return images[0], int(labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        labels = torch.from_numpy(self.labels[indices].astype(np.int64))
        if self.light is not None:
            return self.light(torch.from_numpy(self.images[indices])), labels
        images = (Image.fromarray(self.images[i]).convert("RGB") for i in indices)
        return torch.stack([self.transform(image) for image in images]), labels


@dataclass(frozen=True)
class Light:
    """Shift, flip and normalize a batch of grey images [B, height, width], as torchvision does one by one."""

    padding: int
    flip: float

    def __call__(self, images: Tensor) -> Tensor:
        count, height, width = images.shape
        if self.padding:
            padded = F.pad(images, [self.padding] * 4)
            windows = padded.unfold(1, height, 1).unfold(2, width, 1)
            down, right = torch.randint(2 * self.padding + 1, (2, count))
            images = windows[torch.arange(count), down, right]
        if self.flip:
            images = torch.where(torch.rand(count, 1, 1) < self.flip, images.flip(-1), images)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        return (images.unsqueeze(1).float() / 255 - mean) / std


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an idx file, gzipped or not, in the shape that its header states.

    Raises UserError for anything else: a wrong magic number, another element type, too few or too many bytes.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is not a readable idx file ({error}); fetch it again") from error
    data = content[4 + 4 * rank :]
    if zeros != 0 or kind != 8 or rank not in (1, 3) or 0 in shape or len(data) != math.prod(shape):
        raise UserError(f"{path} is not an idx file of labels or images, or is truncated; fetch it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def build_loaders(config: DataConfig) -> Loaders:
    """Training, validation and calibration loaders. Raises UserError for data that is missing or does not fit."""
    train, num_classes = _open(config, training=True)
    val, _ = _open(config, training=False)
    sampler_options = {"num_replicas": processes.world_size(), "rank": processes.rank(), "shuffle": True}

    def train_loader() -> DataLoader:
        if config.repeats > 1:
            whole = 256 if len(train) >= 256 else 0  # timm before 1.0.30 would select nothing of a smaller set
            sampler = RepeatAugSampler(train, num_repeats=config.repeats, selected_round=whole, **sampler_options)
        else:
            sampler = DistributedSampler(train, **sampler_options)
        batches = EpochBatches(sampler, config.batch_size, drop_last=not config.keep_last_batch)
        return _loader(PlannedBatches(train), config, batch_sampler=batches)

    loader = train_loader()
    if len(loader) == 0:
        raise UserError(
            f"an epoch must hold at least one batch: {config.name} gives {len(loader.batch_sampler.sampler)} training "
            f"images to a process, --batch-size is {config.batch_size}; lower --batch-size or --repeats"
        )
    val_share = Subset(val, range(processes.rank(), len(val), processes.world_size()))
    return Loaders(loader, _loader(val_share, config), train_loader(), num_classes)


def set_epoch(loader: DataLoader, config: DataConfig, epoch: int, first: int = 0) -> None:
    """Make the order of a training loader, and its augmentation, a function of seed and `epoch`.

    It begins with batch `first`, as it is in the whole epoch.
    """
    order = config.seed * 2 * CALIBRATION_ORDER + epoch
    loader.batch_sampler.set_epoch(order, processes.rank(), first)


def take_bad_images(loader: DataLoader) -> tuple[int, set[str]]:
    """How many images in its batches since the last call could not be read, and the paths of all such so far."""
    if not isinstance(loader, ImageLoader):
        return 0, set()
    count, loader.bad_images = loader.bad_images, 0
    return count, loader.bad_paths


def _loader(
    dataset: PlannedBatches | Subset, config: DataConfig, batch_sampler: EpochBatches | None = None
) -> DataLoader:
    """In order, in batches of the configured size, unless there is a `batch_sampler`."""
    options = {"batch_size": config.batch_size} if batch_sampler is None else {"batch_sampler": batch_sampler}
    kind, files = DataLoader, dataset.dataset
    if isinstance(dataset, PlannedBatches) or isinstance(files, ArrayImages):  # batches already
        options["collate_fn"] = _as_it_is
    if isinstance(files, ImageFiles) and files.bad_images is BadImages.SKIP:
        kind = partial(ImageLoader, training=batch_sampler is not None)
    return kind(
        dataset,
        num_workers=config.num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=leave_to_parent,
        **options,
    )


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def _open(config: DataConfig, training: bool) -> tuple[Dataset, int]:
    """The training or validation half and its number of classes."""
    info = DATA_SETS[config.name]
    if info.needs_path and config.path is None:
        raise UserError(f"--data-set {config.name} needs --data-path, the directory of {info.description}")
    root = None if config.path is None else Path(config.path)
    if root is not None and not root.is_dir() and not config.download:
        raise UserError(f"--data-path must be a directory, got {root}, which is none")
    transform = _transform(config, info, training)
    if config.name in _IN_MEMORY:
        images, labels = _IN_MEMORY[config.name](root, config.download, training)
        heavy = training and (config.aa != "none" or config.color_jitter or config.reprob)
        light = Light(info.padding, info.flip) if training else Light(0, 0.0)
        same_size = images.shape[1:] == (config.input_size, config.input_size)
        return ArrayImages(images, labels, transform, light if same_size and not heavy else None), info.num_classes
    if config.name in ("CIFAR10", "CIFAR100"):
        return _cifar(config.name, root, config.download, transform, training), info.num_classes
    return _folder(config.name, root, info.num_classes, transform, training, config.bad_images)


def _transform(config: DataConfig, info: DataSetInfo, training: bool):
    size = config.input_size
    if training:
        try:
            transform = create_transform(
                size,
                is_training=True,
                hflip=info.flip,
                color_jitter=config.color_jitter or None,
                auto_augment=None if config.aa == "none" else config.aa,
                interpolation="bicubic",
                re_prob=config.reprob,
                re_mode="pixel",
            )
            generators = rng_state()
            for step in transform.transforms:
                if type(step).__module__ == auto_augment.__name__:
                    step(Image.new("RGB", (32, 32)))  # some of what timm accepts fails when it is used
            set_rng_state(generators)
        except (AssertionError, ValueError) as error:
            raise UserError(f"--aa must be none or one of timm's, such as {RAND_AUGMENT}, got {config.aa!r}") from error
        if size <= SMALL_IMAGE:
            resize = T.Resize((size, size), T.InterpolationMode.BICUBIC)
            transform.transforms[0] = T.Compose([resize, T.RandomCrop(size, padding=info.padding)])
        return transform
    if size <= SMALL_IMAGE or config.name == "DIGITS":
        steps = [T.Resize((size, size), T.InterpolationMode.BICUBIC)]
    else:  # DeiT evaluates the centre 224 of 256 pixels
        steps = [T.Resize(round(size * 256 / 224), T.InterpolationMode.BICUBIC), T.CenterCrop(size)]
    return T.Compose([*steps, T.ToTensor(), T.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])


def _digits(root: Path | None, download: bool, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """A fixed, stratified split: 1,437 images to train on, 360 held out."""
    digits = load_digits()
    images = (digits.images * (255 / 16)).astype(np.uint8)
    split = train_test_split(images, digits.target, test_size=360, stratify=digits.target, random_state=0)
    return split[0 if training else 1], split[2 if training else 3]


def _fractal(root: Path | None, download: bool, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """60 images of each class to train on, 10 held out."""
    return fractal_images(DATA_SETS["FRACTAL"].num_classes, 60 if training else 10, 32, seed=1 if training else 2)


def _fashion(root: Path, download: bool, training: bool) -> tuple[np.ndarray, np.ndarray]:
    if download:
        _download(tv_datasets.FashionMNIST, root)
    stem = "train" if training else "t10k"
    arrays = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        name = f"{stem}-{kind}"
        places = [root / folder / (name + end) for folder in ("", "FashionMNIST/raw", "raw") for end in ("", ".gz")]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise UserError(f"--data-path {root} must hold {name} or {name}.gz; pass --download to fetch it there")
        arrays.append(read_idx(found))
    images, labels = arrays
    if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
        raise UserError(f"{root} must hold as many labels 0..9 as images, got {labels.shape} for {images.shape}")
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), labels


_IN_MEMORY = {"DIGITS": _digits, "FASHION": _fashion, "FRACTAL": _fractal}


def _cifar(name: str, root: Path, download: bool, transform, training: bool) -> Dataset:
    dataset = getattr(tv_datasets, name)
    if download:
        _download(dataset, root)
    try:
        return dataset(str(root), train=training, transform=transform)
    except RuntimeError as error:
        raise UserError(
            f"--data-path {root} must hold {dataset.base_folder}, found none or a damaged one; "
            "pass --download to fetch it there"
        ) from error


def _download(dataset, root: Path) -> None:
    """One process fetches, the others find the files. torchvision checks what it fetched."""
    problem = None
    if processes.is_main():
        try:
            dataset(str(root), download=True)
        except (OSError, RuntimeError) as error:
            problem = f"--download could not fetch {dataset.__name__} to {root}: {error}; fetch it by hand"
    problem = processes.from_main(problem)
    if problem:
        raise UserError(problem)


def _folder(
    name: str, root: Path, num_classes: int | None, transform, training: bool, bad_images: BadImages
) -> tuple[Dataset, int]:
    for half in ("train", "val"):
        if not (root / half).is_dir():
            raise UserError(f"--data-path {root} must hold train/ and val/, found no {half}/; see the README's data")
    try:
        train_classes, _ = tv_datasets.folder.find_classes(str(root / "train"))
        val_classes, _ = tv_datasets.folder.find_classes(str(root / "val"))
        half = root / ("train" if training else "val")
        images = ImageFiles(half, transform, bad_images)
    except FileNotFoundError as error:
        raise UserError(f"every class must be a folder with images in it: {error}") from error
    if train_classes != val_classes:
        odd = sorted(set(train_classes) ^ set(val_classes))
        raise UserError(
            f"train/ and val/ of {root} must hold the same classes; only one of them has {', '.join(odd[:5])}"
            + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
        )
    if num_classes is not None and len(train_classes) != num_classes:
        raise UserError(
            f"{name} has {num_classes} classes, {root} has {len(train_classes)}; use --data-set FOLDER for other images"
        )
    return images, len(train_classes)
