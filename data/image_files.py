"""Data sets that store one file per image, in one folder per class; and what happens to files that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import datasets as tv_datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.base import BadImages, DataConfig, DataSet, Transform, register
from data.decode import ORIENTATION, Pixels, Reduction, read_pixels
from data.feed import Feed
from data.fingerprint import fingerprint_files
from data.host_part import BadImage, HostBatch, Loaded
from runtime import processes
from runtime.errors import UserError

Content = TypeVar("Content", Image.Image, Pixels)
LEFT_OUT = -100  # label of a held-out image that does not count; it is cross_entropy's default for that
BITS, PHOTOMETRIC = 258, 262
"""The tags of the bits of a pixel and of its meaning in a TIFF; the meaning 0 is that 0 is white (TIFF 6.0)."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image upright, by its EXIF orientation (TIFF 6.0, tag Orientation); 1 needs none."""


class FileBatch(NamedTuple):
    """A batch as a loader's worker process sends it. `ImageFilesLoader` takes the records of bad images off."""

    images: Tensor
    labels: Tensor
    bad: tuple[BadImage, ...]


class ImageFiles(tv_datasets.ImageFolder):
    """One split: the images of a directory that has one folder per class.

    `bad_images` says what happens to an image that cannot be read. If such images are skipped, the next readable image
    replaces it (after the last image comes the first). In training the replacement keeps its own label; in evaluation
    its label is `LEFT_OUT`.
    """

    def __init__(
        self, root: Path, transform: Transform, bad_images: BadImages, training: bool, upright: bool = False
    ) -> None:
        self.passed_over: list[str] = []
        """Files without the suffix of an image, and links that lead back to a directory around them."""
        super().__init__(str(root), transform, loader=partial(read_image, upright=upright))
        self.bad_images, self.training, self.upright = bad_images, training, upright

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return find_classes(Path(directory))

    def make_dataset(self, directory: str, class_to_idx: dict[str, int], *unused: object, **unused_too: object) -> list:
        """The (path, label) of every image, class by class, in the order of torchvision. Hidden files are passed over.

        Raises FileNotFoundError for a class without images.
        """
        samples = []
        for name, label in class_to_idx.items():
            files = sorted(_files_below(Path(directory, name), self.passed_over, _above(Path(directory, name))))
            found = [os.path.join(*place) for place in files if place[1].lower().endswith(IMG_EXTENSIONS)]
            self.passed_over += [os.path.join(*f) for f in files if not f[1].lower().endswith(IMG_EXTENSIONS)]
            if not found:
                raise FileNotFoundError(
                    f"{Path(directory, name)} has none; the names of images end in {', '.join(IMG_EXTENSIONS)}"
                )
            samples += [(path, label) for path in found]
        return samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label, _ = self._load(index)
        return image, label

    def __getitems__(self, indices: list[int]) -> FileBatch:
        """The images of a batch. Records travel with it, so the counts do not depend on the number of workers."""
        loaded = [self._load(index) for index in indices]
        images, labels = default_collate([(image, label) for image, label, _ in loaded])
        return FileBatch(images, labels, tuple(bad for _, _, bad in loaded if bad is not None))

    def load_pixels(self, index: int, reduction: Reduction) -> Loaded:
        """The image without a transform, for `HostPart`."""
        return Loaded(*self._read(index, lambda path: read_pixels(path, self.loader, self.upright, reduction)))

    def _load(self, index: int) -> tuple[Tensor, int, BadImage | None]:
        image, label, bad = self._read(index, self.loader)
        return self.transform(image), label, bad

    def _read(self, index: int, read: Callable[[str], Content]) -> tuple[Content, int, BadImage | None]:
        """What `read` makes of the file, or of the next one that it can read."""
        unreadable: list[str] = []
        for used in chain(range(index, len(self.samples)), range(index)):
            path, label = self.samples[used]
            try:
                content = read(path)
            except Exception as error:  # Decoding a damaged file may raise any exception.
                if self.bad_images is BadImages.STOP:
                    raise UserError(
                        f"{path} is not a readable image ({error}); replace or remove it, or pass --bad-images skip"
                    ) from error
                unreadable.append(path)
                continue
            if not unreadable:
                return content, label, None
            return content, label if self.training else LEFT_OUT, BadImage(unreadable[0], tuple(unreadable[1:]))
        raise UserError(
            f"{self.root} must hold images, but none of its {len(self.samples):,} files is a readable one; replace them"
        )


def find_classes(directory: Path) -> tuple[list[str], dict[str, int]]:
    """The names of the classes, which are the folders that are not hidden, and their labels in alphabetical order.

    Raises FileNotFoundError if there are none.
    """
    classes = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise FileNotFoundError(f"{directory} has none")
    return classes, {name: label for label, name in enumerate(classes)}


def _above(directory: Path) -> frozenset[tuple[int, int]]:
    """The directories above `directory`, as it is named and where a link leads. They hold the other classes, too."""
    return frozenset(map(_inode, {*directory.absolute().parents, *directory.resolve().parents}))


def _inode(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return status.st_dev, status.st_ino


def _files_below(directory: Path, loops: list[str], around: frozenset) -> Iterator[tuple[str, str]]:
    """(Directory, name) of every file that is not hidden. Links are followed; those to `around` go into `loops`."""
    here = _inode(directory)
    if here in around:
        loops.append(str(directory))
        return
    for entry in os.scandir(directory):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_below(Path(entry.path), loops, around | {here})
        else:
            yield str(directory), entry.name


def read_image(path: str, upright: bool = False) -> Image.Image:
    """An image file in RGB, eight bits a channel; with `upright` it is turned as its EXIF orientation says.

    A grey image of 12 or 16 bits keeps its brightness: Pillow's own conversion would cut off all above 255. Raises
    ValueError for integers of 32 bits and for floating-point numbers, of which nobody but the user knows which value is
    white.
    """
    with open(path, "rb") as file:
        image = Image.open(file)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # Pillow scales PPM
            converted = _eight_bits(image).convert("RGB")
        elif image.mode[:1] in ("I", "F"):
            kind = "floating-point numbers" if image.mode[0] == "F" else "32-bit integers"
            raise ValueError(f"its pixels are {kind}, whose white is unknown; store 8 or 16 bits")
        else:
            converted = image.convert("RGB")
        return _turned(converted, image.getexif().get(ORIENTATION, 1)) if upright else converted


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of more than eight bits in eight. Pillow leaves 12 bits as they are, and 0 where it is white."""
    tags = getattr(image, "tag_v2", {})
    grey = np.asarray(image).astype(np.float64) * (255 / (2 ** tags.get(BITS, (16,))[0] - 1))
    grey = grey.round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == 0 else grey)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


class ImageFilesLoader(DataLoader):
    """A loader of `ImageFiles`. It counts the bad images of its batches and serves (images, labels).

    Batches of a `HostPart` keep their draws: (images, labels, draws).
    """

    def __init__(self, dataset: Dataset, **options) -> None:
        self.num_bad = 0
        """Number of bad images in the batches since the last call of `take_bad_images`."""
        self.bad_paths: set[str] = set()
        """Paths of all files so far that could not be read."""
        super().__init__(dataset, **options)

    def __iter__(self) -> Iterator[tuple]:
        for batch in super().__iter__():
            for bad in batch.bad:
                self.num_bad += 1
                self.bad_paths.update((bad.path, *bad.tried))
            yield (batch.images, batch.labels, batch.draws) if isinstance(batch, HostBatch) else batch[:2]


def take_bad_images(loader: DataLoader | Feed) -> tuple[int, set[str]]:
    """The number of bad images in the batches since the last call, and the paths of all unreadable files so far."""
    loader = loader.loader if isinstance(loader, Feed) else loader
    if not isinstance(loader, ImageFilesLoader):
        return 0, set()
    count, loader.num_bad = loader.num_bad, 0
    return count, loader.bad_paths


@dataclass(frozen=True)
class ImageFolders(DataSet):
    """train/ and val/ in --data-path, each with one folder per class."""

    one_file_per_image: bool = True
    has_pixels: bool = True

    def open(self, config: DataConfig, transform: Transform, training: bool) -> tuple[ImageFiles, int]:
        root = self.directory(config)
        splits = ("val",) if config.held_out_only else ("train", "val")
        for split in splits:
            if not (root / split).is_dir():
                raise UserError(
                    f"--data-path {root} must hold {' and '.join(f'{s}/' for s in splits)}, found no {split}/; "
                    "see docs/data.md"
                )
        try:
            *others, classes = (find_classes(root / split)[0] for split in splits)
            split = root / ("train" if training else "val")
            images = ImageFiles(split, transform, config.bad_images, training, config.exif_orientation)
        except FileNotFoundError as error:
            raise UserError(f"every class must be a folder with images in it: {error}") from error
        if others and classes != others[0]:
            odd = sorted(set(classes) ^ set(others[0]))
            raise UserError(
                f"train/ and val/ of {root} must hold the same classes; only one of them has {', '.join(odd[:5])}"
                + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
            )
        if self.num_classes not in (None, len(classes)):
            raise UserError(
                f"{self.name} has {self.num_classes} classes, {root} has {len(classes)}; "
                "use --data-set FOLDER for other images"
            )
        if images.passed_over:
            number, first = len(images.passed_over), images.passed_over[0]
            processes.say(
                f"note    {number} files or links in {images.root} are passed over, as no images by their suffix or as "
                f"links that lead back; the first is {first}"
            )
        return images, len(classes)

    def fingerprint(self, split: ImageFiles) -> str:
        return fingerprint_files(split.root, split.samples)


register(
    ImageFolders("IMNET", "ImageNet-1k in train/ and val/, one folder per class", num_classes=1000),
    ImageFolders("FOLDER", "your own images in train/ and val/, one folder per class", num_classes=None),
)
