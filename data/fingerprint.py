"""Tells whether a data set is still the one that a run began with."""

from __future__ import annotations

import hashlib
import os

import numpy as np
from torch.utils.data import Dataset

MOST_SIZES = 20_000  # files whose size is looked up: ImageNet's 1.3 million would take minutes on a network's disk


def fingerprint(dataset: Dataset) -> str:
    """Number of samples and a hash of the content, the same wherever the data lie.

    Of images in memory (`images` and `labels`, or torchvision's `data` and `targets`) it covers every byte; of folders
    (`samples` under `root`) the name and class of every file and the sizes of at most `MOST_SIZES`, evenly spaced.
    """
    found = hashlib.sha256()
    if hasattr(dataset, "samples"):
        start = len(os.path.join(dataset.root, ""))
        for path, label in dataset.samples:
            found.update(f"{path[start:]}\0{label}\0".encode(errors="surrogateescape"))
        every = -(-len(dataset) // MOST_SIZES)
        for path, _ in dataset.samples[::every]:
            size = os.path.getsize(path) if os.path.exists(path) else None  # a link to nothing: no readable image
            found.update(f"{size}\0".encode())
    else:
        names = ("images", "labels") if hasattr(dataset, "images") else ("data", "targets")
        for name in names:
            array = np.ascontiguousarray(getattr(dataset, name))
            found.update(f"{array.dtype} {array.shape}\0".encode())
            found.update(array.reshape(-1).view(np.uint8))
    return f"{len(dataset)} images, sha256 {found.hexdigest()[:16]}"
