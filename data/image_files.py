"""Data sets that store one file per image, in one folder per class; and what happens to files that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import datasets as tv_datasets

from data.base import BadImages, DataConfig, DataSet, Transform
from data.fingerprint import fingerprint_files
from runtime.errors import UserError

LEFT_OUT = -100  # label of a held-out image that does not count; it is cross_entropy's default for that


@dataclass(frozen=True)
class BadImage:
    """An image of a batch whose file could not be read. The next readable image took its place in the batch."""

    path: str
    tried: tuple[str, ...]
    """Files between it and the next readable image, which could not be read either."""


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

    def __init__(self, root: Path, transform: Transform, bad_images: BadImages, training: bool) -> None:
        super().__init__(str(root), transform)
        self.bad_images, self.training = bad_images, training

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label, _ = self._load(index)
        return image, label

    def __getitems__(self, indices: list[int]) -> FileBatch:
        """The images of a batch. Records travel with it, so the counts do not depend on the number of workers."""
        loaded = [self._load(index) for index in indices]
        images, labels = default_collate([(image, label) for image, label, _ in loaded])
        return FileBatch(images, labels, tuple(bad for _, _, bad in loaded if bad is not None))

    def _load(self, index: int) -> tuple[Tensor, int, BadImage | None]:
        unreadable: list[str] = []
        for used in chain(range(index, len(self.samples)), range(index)):
            path, label = self.samples[used]
            try:
                image = self.loader(path)
            except Exception as error:  # Decoding a damaged file may raise any exception.
                if self.bad_images is BadImages.STOP:
                    raise UserError(
                        f"{path} is not a readable image ({error}); replace or remove it, or pass --bad-images skip"
                    ) from error
                unreadable.append(path)
                continue
            if not unreadable:
                return self.transform(image), label, None
            bad = BadImage(unreadable[0], tuple(unreadable[1:]))
            return self.transform(image), label if self.training else LEFT_OUT, bad
        raise UserError(
            f"{self.root} must hold images, but none of its {len(self.samples):,} files is a readable one; replace them"
        )


class ImageFilesLoader(DataLoader):
    """A loader of `ImageFiles`. It counts the bad images of its batches and serves (images, labels)."""

    def __init__(self, dataset: Dataset, **options) -> None:
        self.num_bad = 0
        """Number of bad images in the batches since the last call of `take_bad_images`."""
        self.bad_paths: set[str] = set()
        """Paths of all files so far that could not be read."""
        super().__init__(dataset, **options)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().__iter__():
            for bad in batch.bad:
                self.num_bad += 1
                self.bad_paths.update((bad.path, *bad.tried))
            yield batch.images, batch.labels


def take_bad_images(loader: DataLoader) -> tuple[int, set[str]]:
    """The number of bad images in the batches since the last call, and the paths of all unreadable files so far."""
    if not isinstance(loader, ImageFilesLoader):
        return 0, set()
    count, loader.num_bad = loader.num_bad, 0
    return count, loader.bad_paths


@dataclass(frozen=True)
class ImageFolders(DataSet):
    """train/ and val/ in --data-path, each with one folder per class."""

    one_file_per_image: bool = True

    def open(self, config: DataConfig, transform: Transform, training: bool) -> tuple[ImageFiles, int]:
        root = self.directory(config)
        for split in ("train", "val"):
            if not (root / split).is_dir():
                raise UserError(
                    f"--data-path {root} must hold train/ and val/, found no {split}/; see the README's data"
                )
        try:
            classes, val_classes = (tv_datasets.folder.find_classes(str(root / split))[0] for split in ("train", "val"))
            images = ImageFiles(root / ("train" if training else "val"), transform, config.bad_images, training)
        except FileNotFoundError as error:
            raise UserError(f"every class must be a folder with images in it: {error}") from error
        if classes != val_classes:
            odd = sorted(set(classes) ^ set(val_classes))
            raise UserError(
                f"train/ and val/ of {root} must hold the same classes; only one of them has {', '.join(odd[:5])}"
                + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
            )
        if self.num_classes not in (None, len(classes)):
            raise UserError(
                f"{self.name} has {self.num_classes} classes, {root} has {len(classes)}; "
                "use --data-set FOLDER for other images"
            )
        return images, len(classes)

    def fingerprint(self, split: ImageFiles) -> str:
        return fingerprint_files(split.root, split.samples)
