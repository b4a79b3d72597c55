"""The base class of data sets: the facts that the command line needs, and the method that opens a split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from PIL.Image import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset

from runtime.errors import UserError

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
"""Default options of data sets whose images have up to 32 x 32 pixels."""

Transform = Callable[[Image], Tensor]


class BadImages(str, Enum):
    """The action that is taken when an image file cannot be read."""

    STOP = "stop"
    SKIP = "skip"
    """Training takes the next readable image in its place; a held-out image is left out."""


class AugmentOn(str, Enum):
    """The device that prepares images, after they were read."""

    CPU = "cpu"
    """Each image by itself, in the loader's processes."""
    GPU = "gpu"
    """Batches on the device that trains; the loader's processes decode, crop and resize."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input, beside augmentation. The defaults are ImageNet's and DeiT's."""

    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    """The mean of each channel, for images in [0, 1]. It is subtracted."""
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    """The standard deviation of each channel, by which it is divided."""
    interpolation: str = "bicubic"
    crop: float = 0.875
    """Share of a held-out image's shorter side that the central crop covers."""


@dataclass(frozen=True)
class DataConfig:
    """The data of one run: the name of the data set, how its images are prepared, and how they form batches."""

    name: str
    path: str | None
    download: bool
    input_size: int
    batch_size: int
    """Images per step and process."""
    num_workers: int
    repeats: int
    """Copies of an image per epoch, each augmented on its own (repeated augmentation); 1 switches it off."""
    seed: int
    aa: str
    color_jitter: float
    reprob: float
    bad_images: BadImages = BadImages.STOP
    keep_last_batch: bool = False
    """Train on the images that do not fill a batch, too."""
    preprocessing: Preprocessing = Preprocessing()
    exif_orientation: bool = False
    """Turn an image file as its EXIF orientation says."""
    held_out_only: bool = False
    """Open no training split, which need not be there."""
    augment_on: AugmentOn = AugmentOn.CPU


@dataclass(frozen=True)
class DataSet(ABC):
    """A choice of --data-set. A subclass sets the fields below and opens a split."""

    name: str
    description: str
    """For the help of --data-set. If `needs_path`, it completes "--data-path is the directory of ..."."""
    num_classes: int | None
    """None: there are as many classes as the opened split has folders."""
    rgb: bool = True
    """False: the stored images are grey, and the loaders repeat their one channel three times."""
    needs_path: bool = True
    can_download: bool = False
    one_file_per_image: bool = False
    has_pixels: bool = False
    """The splits have `load_pixels` (`host_part.HasPixels`), which --augment-on gpu needs."""
    flip: float = 0.5
    """Probability of mirroring a training image."""
    padding: int = 4
    """Largest number of pixels by which a training image of at most `SMALL_IMAGE` pixels is shifted."""
    crops_centre: bool = True
    """Held-out images of more than `SMALL_IMAGE` pixels are cropped to their centre, as DeiT does it."""
    options: dict = field(default_factory=dict)
    """Options of main.py whose default differs from the ImageNet recipe."""

    @abstractmethod
    def open(self, config: DataConfig, transform: Transform, training: bool) -> tuple[Dataset, int]:
        """The training or the held-out split, and its number of classes. Raises UserError if files are missing.

        The split serves images that have gone through `transform`, fp32 [3, height, width], and their labels. If it has
        a method `__getitems__`, that returns a whole batch, else batches are collated from single images.
        """

    @abstractmethod
    def fingerprint(self, split: Dataset) -> str:
        """Identifies the content of an opened split, by one of the functions of data/fingerprint.py."""

    def directory(self, config: DataConfig) -> Path:
        """The directory that --data-path names. Raises UserError if there is none and nothing will be downloaded."""
        if config.path is None:
            raise UserError(f"--data-set {self.name} needs --data-path, the directory of {self.description}")
        root = Path(config.path)
        if not root.is_dir() and not config.download:
            raise UserError(f"--data-path must be a directory, got {root}, which is not one")
        return root


DATA_SETS: dict[str, DataSet] = {}
"""The choices of --data-set by name. `datasets.py` imports every file of data/, so that its data sets are entered."""


def register(*data_sets: DataSet) -> None:
    """Enter data sets into `DATA_SETS`. Raises ValueError for a name that another one has."""
    for data_set in data_sets:
        if data_set.name in DATA_SETS:
            raise ValueError(f"a data set's name must be its own, got {data_set.name}, which another one has")
        DATA_SETS[data_set.name] = data_set
