"""Images that need no download: fractals drawn by iterated function systems, one system per class.

The method is that of Kataoka et al., "Pre-training without Natural Images" (ACCV 2020). A class is a set of affine
maps, each of which is chosen with a probability proportional to its determinant. An image is the orbit of a point under
the chosen maps. Images of one class differ by small changes of the maps. The singular values of the maps are below one,
as in Anderson and Farrell, "Improving Fractal Pre-training" (WACV 2022), so that every orbit is bounded.

Shapes: K classes, I images, M maps per class.
"""

from __future__ import annotations

import numpy as np

MAPS = 4  # per class
POINTS = 500  # per image, which has 32 x 32 pixels
BURN_IN = 20  # first points of an orbit, which are not drawn because they may lie off the attractor
CHANGE = 0.15  # largest relative change of a map's entry from image to image
LEAST_FILLED = 0.12  # smallest share of pixels that the fractal of a class, with its maps unchanged, must touch
_CHUNK = 10_000  # images that are drawn at once


def fractal_images(num_classes: int, per_class: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`per_class` grey images of each class: uint8 [I, size, size], and their labels, int64 [I].

    The classes are the same for every `seed`; only the changes of their maps and the orbits follow from it.
    """
    maps_KM6, shares_KM = _classes(num_classes, size)
    labels = np.repeat(np.arange(num_classes), per_class)
    generator = np.random.default_rng(seed)
    images = np.empty((len(labels), size, size), np.uint8)
    for start in range(0, len(labels), _CHUNK):
        part = labels[start : start + _CHUNK]
        maps = maps_KM6[part] * generator.uniform(1 - CHANGE, 1 + CHANGE, (len(part), MAPS, 6)).astype(np.float32)
        images[start : start + _CHUNK] = _draw(maps, shares_KM[part], size, generator)
    return images, labels


def _classes(num_classes: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps [K, M, 6] and their probabilities [K, M]: the first systems of a fixed sequence that fill enough pixels."""
    generator = np.random.default_rng(0)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    while sum(len(maps) for maps, _ in kept) < num_classes:
        shape = (max(num_classes, 64), MAPS)
        first = generator.uniform(0.3, 0.9, shape)
        second = first * generator.uniform(0.2, 1.0, shape)
        left, right = generator.uniform(0, 2 * np.pi, (2, *shape))
        turn = _rotation(left) * np.stack((first, second), -1)[..., None, :] @ _rotation(right)
        shift = generator.uniform(-1, 1, (*shape, 2))
        maps = np.concatenate((turn.reshape(*shape, 4), shift), -1).astype(np.float32)
        shares = first * second / (first * second).sum(1, keepdims=True)
        filled = (_draw(maps, shares, size, generator) > 0).mean((1, 2)) >= LEAST_FILLED
        kept.append((maps[filled], shares[filled]))
    maps_KM6, shares_KM = (np.concatenate(parts)[:num_classes] for parts in zip(*kept))
    return maps_KM6, shares_KM


def _rotation(angle: np.ndarray) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.stack((cosine, -sine, sine, cosine), -1).reshape(*angle.shape, 2, 2)


def _draw(maps_IM6: np.ndarray, shares_IM: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """One image per orbit, uint8 [I, size, size]: stretched to the frame, and brighter where more points fall."""
    count = len(maps_IM6)
    everyone = np.arange(count)
    bounds_IM = np.cumsum(shares_IM, 1)[:, :-1].astype(np.float32)
    x, y = np.zeros((2, count), np.float32)
    points = np.empty((2, POINTS, count), np.float32)
    for t in range(-BURN_IN, POINTS):
        chosen = (generator.random((count, 1), np.float32) > bounds_IM).sum(1)
        a, b, c, d, e, f = maps_IM6[everyone, chosen].T
        x, y = a * x + b * y + e, c * x + d * y + f
        if t >= 0:
            points[:, t] = x, y
    low, high = points.min(1, keepdims=True), points.max(1, keepdims=True)
    column, row = ((points - low) / np.maximum(high - low, 1e-6) * (size - 1e-3)).astype(np.int64)
    pixel = (everyone * size + row) * size + column
    hits = np.bincount(pixel.ravel(), minlength=count * size * size)
    return np.minimum(hits * 96, 255).astype(np.uint8).reshape(count, size, size)
