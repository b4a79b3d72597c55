"""Data sets of small images, which are held in memory.

To add one, follow `Digits` if its arrays come from Python, and `Cifar` if torchvision reads its files.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets as tv_datasets

from data.base import SMALL_DATA, DataConfig, DataSet, Preprocessing, Transform, register
from data.decode import Pixels, Reduction
from data.fingerprint import fingerprint_arrays
from data.fractals import fractal_images
from data.host_part import Loaded
from runtime import processes
from runtime.errors import UserError


class ArrayImages(Dataset):
    """One split: uint8 images, grey [N, height, width] or RGB [N, height, width, 3]. It serves batches of RGB images.

    Each image goes through `transform`, unless there is a `batch_transform`, which takes a whole batch at once and is a
    hundred times faster.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, transform: Transform, batch_transform: ShiftAndFlip | None
    ) -> None:
        self.images, self.labels, self.transform, self.batch_transform = images, labels, transform, batch_transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.__getitems__([index])
        return images[0], int(labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        labels = torch.from_numpy(self.labels[indices].astype(np.int64))
        if self.batch_transform is not None:
            return self.batch_transform(torch.from_numpy(self.images[indices])), labels
        images = (Image.fromarray(self.images[i]).convert("RGB") for i in indices)
        return torch.stack([self.transform(image) for image in images]), labels

    def load_pixels(self, index: int, reduction: Reduction) -> Loaded:
        """The image without a transform, for `HostPart`."""
        image = Image.fromarray(self.images[index]).convert("RGB")
        return Loaded(Pixels.of(image), int(self.labels[index]))


@dataclass(frozen=True)
class ShiftAndFlip:
    """Shifts each image of a batch by up to `padding` pixels, mirrors it with probability `flip`, and normalizes it.

    Given the same shifts and flips, an image gets the bits that torchvision's transforms give it.
    """

    padding: int
    flip: float
    preprocessing: Preprocessing = Preprocessing()

    def __call__(self, images: Tensor) -> Tensor:
        """uint8, grey [B, height, width] or RGB [B, height, width, 3] -> fp32 [B, 3, height, width]."""
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        count, _, height, width = images.shape
        if self.padding:
            padded = F.pad(images, [self.padding] * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)
            down, right = torch.randint(2 * self.padding + 1, (2, count))
            images = windows[torch.arange(count), :, down, right]
        if self.flip:
            images = torch.where(torch.rand(count, 1, 1, 1) < self.flip, images.flip(-1), images)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.preprocessing.mean, self.preprocessing.std))
        return (images.contiguous().float() / 255 - mean) / std


@dataclass(frozen=True)
class InMemory(DataSet):
    """The code that the data sets below share. Their `open` reads the arrays of a split and hands them to `serve`."""

    has_pixels: bool = True
    by_batch: bool = True
    """Transform whole batches where the augmentation is no more than a shift and a flip."""
    options: dict = field(default_factory=lambda: SMALL_DATA)

    def serve(
        self, images: np.ndarray, labels: np.ndarray, config: DataConfig, transform: Transform, training: bool
    ) -> tuple[ArrayImages, int]:
        """The arrays as a split. Batches are transformed as a whole if a shift and a flip are all the augmentation."""
        wanted = "[N, height, width, 3]" if self.rgb else "[N, height, width]"
        fits = images.dtype == np.uint8 and images.ndim == 3 + self.rgb and images.shape[3:] in ((), (3,))
        if not fits or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{self.name} must have uint8 images {wanted} and labels [N], "
                f"got {images.dtype} {images.shape} and {labels.shape}"
            )
        augmented = training and (config.aa != "none" or config.color_jitter or config.reprob)
        resized = images.shape[1:3] != (config.input_size, config.input_size)
        batch_transform = None
        if self.by_batch and not augmented and not resized:
            padding, flip = (self.padding, self.flip) if training else (0, 0.0)
            batch_transform = ShiftAndFlip(padding, flip, config.preprocessing)
        return ArrayImages(images, labels, transform, batch_transform), self.num_classes

    def fingerprint(self, split: ArrayImages) -> str:
        return fingerprint_arrays(split.images, split.labels)


@dataclass(frozen=True)
class Digits(InMemory):
    """A fixed, stratified split: 1,437 images to train on, 360 held-out ones."""

    name: str = "DIGITS"
    description: str = "1,797 handwritten digits of 8x8 pixels, in scikit-learn: nothing to download"
    num_classes: int = 10
    rgb: bool = False
    needs_path: bool = False
    flip: float = 0.0
    padding: int = 0
    crops_centre: bool = False
    options: dict = field(
        default_factory=lambda: {
            **SMALL_DATA,
            "input_size": 8,
            "epochs": 8,
            "batch_size": 32,
            "lr": 3e-2,
            "num_workers": 0,
        }
    )

    def open(self, config: DataConfig, transform: Transform, training: bool) -> tuple[ArrayImages, int]:
        return self.serve(*self.arrays(training), config, transform, training)

    def arrays(self, training: bool) -> tuple[np.ndarray, np.ndarray]:
        # No other data set needs scikit-learn, whose import takes a second, so that it is imported here.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = (digits.images * (255 / 16)).astype(np.uint8)
        split = train_test_split(images, digits.target, test_size=360, stratify=digits.target, random_state=0)
        return split[0 if training else 1], split[2 if training else 3]


@dataclass(frozen=True)
class Fractals(InMemory):
    """Fractals: 60 images of each class to train on, 10 held-out ones."""

    name: str = "FRACTAL"
    description: str = "1,000 classes of fractals of 32x32 pixels, drawn in ten seconds: nothing to download"
    num_classes: int = 1000
    rgb: bool = False
    needs_path: bool = False

    def open(self, config: DataConfig, transform: Transform, training: bool) -> tuple[ArrayImages, int]:
        per_class, seed = (60, 1) if training else (10, 2)
        arrays = fractal_images(self.num_classes, per_class, 32, seed)
        return self.serve(*arrays, config, transform, training)


@dataclass(frozen=True)
class Fashion(InMemory):
    """Fashion-MNIST's four idx files, in --data-path or where torchvision stores them below it."""

    name: str = "FASHION"
    description: str = "Fashion-MNIST, padded to 32x32; idx files, gzipped or not"
    num_classes: int = 10
    rgb: bool = False
    can_download: bool = True

    def open(self, config: DataConfig, transform: Transform, training: bool) -> tuple[ArrayImages, int]:
        root = self.directory(config)
        if config.download:
            _download(tv_datasets.FashionMNIST, root)
        stem = "train" if training else "t10k"
        images, labels = (
            _read_idx_below(root, f"{stem}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
            raise UserError(f"{root} must hold as many labels 0..9 as images, got {labels.shape} for {images.shape}")
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        return self.serve(images, labels, config, transform, training)


@dataclass(frozen=True)
class Cifar(InMemory):
    """CIFAR-10 or CIFAR-100, whose torchvision class has the data set's name."""

    can_download: bool = True
    # Runs on CIFAR have always been augmented image by image; by the batch they would draw other random numbers.
    by_batch: bool = False

    def open(self, config: DataConfig, transform: Transform, training: bool) -> tuple[ArrayImages, int]:
        root = self.directory(config)
        cifar = getattr(tv_datasets, self.name)
        if config.download:
            _download(cifar, root)
        try:
            split = cifar(str(root), train=training)
        except RuntimeError as error:
            raise UserError(
                f"--data-path {root} must hold {cifar.base_folder}, found none or a damaged one; "
                "pass --download to fetch it there"
            ) from error
        return self.serve(split.data, np.array(split.targets), config, transform, training)


register(
    Digits(),
    Fashion(),
    Fractals(),
    Cifar("CIFAR10", "CIFAR-10 as torchvision stores it", num_classes=10),
    Cifar("CIFAR100", "CIFAR-100 as torchvision stores it", num_classes=100),
)


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


def _read_idx_below(root: Path, name: str) -> np.ndarray:
    """The idx file of that name, in `root` or where torchvision stores it. Raises UserError if it is missing."""
    places = [root / folder / (name + end) for folder in ("", "FashionMNIST/raw", "raw") for end in ("", ".gz")]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(f"--data-path {root} must hold {name} or {name}.gz; pass --download to fetch it there")
    return read_idx(found)


def _download(dataset: type[Dataset], root: Path) -> None:
    """The main process downloads, the others find the files afterwards. torchvision checks what it has downloaded."""
    problem = None
    if processes.is_main():
        try:
            dataset(str(root), download=True)
        except (OSError, RuntimeError) as error:
            problem = f"--download could not fetch {dataset.__name__} to {root}: {error}; fetch it by hand"
    problem = processes.from_main(problem)
    if problem:
        raise UserError(problem)
