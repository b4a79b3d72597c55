"""A data set's fingerprint tells whether it is still the one that a run began with.

A fingerprint is the number of images and a hash of the content; it does not depend on where the data set is stored.
Checkpoints hold it, so its text must stay as it is.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

MOST_SIZES = 20_000  # looking up the sizes of ImageNet's 1.3 million files would take minutes on a network file system


def fingerprint_arrays(*arrays: np.ndarray | list) -> str:
    """Fingerprint of images in memory: dtype, shape and every byte of each array. The first axis counts the images."""
    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        digest.update(f"{array.dtype} {array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return _text(len(arrays[0]), digest.hexdigest())


def fingerprint_files(root: str, samples: list[tuple[str, int]]) -> str:
    """Fingerprint of image files, given as (path below `root`, label).

    Covers the name and label of every file, and the sizes of at most `MOST_SIZES` evenly spaced ones.
    """
    digest = hashlib.sha256()
    start = len(os.path.join(root, ""))
    for path, label in samples:
        digest.update(f"{path[start:]}\0{label}\0".encode(errors="surrogateescape"))
    every = -(-len(samples) // MOST_SIZES)
    for path, _ in samples[::every]:
        size = os.path.getsize(path) if os.path.exists(path) else None  # None: the file is a broken symbolic link
        digest.update(f"{size}\0".encode())
    return _text(len(samples), digest.hexdigest())


def _text(count: int, digest: str) -> str:
    return f"{count} images, sha256 {digest[:16]}"
