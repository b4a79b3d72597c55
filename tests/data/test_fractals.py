"""Fractal images: the same classes for everyone, images of a class alike, classes apart."""

from __future__ import annotations

import numpy as np

from data import fractals
from data.fractals import CHANGE, LEAST_FILLED, fractal_images


def test_images_follow_from_their_seed_and_classes_do_not():
    images, labels = fractal_images(6, 4, 32, seed=1)
    again, _ = fractal_images(6, 4, 32, seed=1)
    other, _ = fractal_images(6, 4, 32, seed=2)
    assert images.shape == (24, 32, 32) and images.dtype == np.uint8
    assert labels.tolist() == [k for k in range(6) for _ in range(4)]
    assert np.array_equal(images, again) and not np.array_equal(images, other)


def test_the_nearest_class_mean_recognises_most_held_out_images():
    images, labels = (part.astype(np.float64) for part in fractal_images(20, 30, 32, seed=1))
    held_out, answers = (part.astype(np.float64) for part in fractal_images(20, 10, 32, seed=2))
    means = np.stack([images[labels == k].mean(0) for k in range(20)])
    distance = ((held_out[:, None] - means[None]) ** 2).sum((2, 3))
    assert (distance.argmin(1) == answers).mean() > 0.6
    assert (images > 0).mean() > LEAST_FILLED / 2 and images.max() == 255


def test_maps_are_taken_by_their_share():
    """Maps that send every point to a corner each; the last one, whose share is 0, is never taken."""
    corners = np.array([[(0, 0, 0, 0, x, y) for x, y in ((0, 0), (1, 0), (0, 1), (1, 1))]], np.float32)
    (picture,) = fractals._draw(corners, np.array([[0.6, 0.3, 0.1, 0.0]]), 32, np.random.default_rng(0))
    assert sorted(map(tuple, np.argwhere(picture).tolist())) == [(0, 0), (0, 31), (31, 0)]  # y is the row


def test_shares_are_proportional_to_determinants():
    maps, shares = fractals._classes(8, 32)
    a, b, c, d, e, f = np.moveaxis(maps.astype(np.float64), -1, 0)
    determinants = np.abs(a * d - b * c)
    assert np.allclose(shares, determinants / determinants.sum(1, keepdims=True), rtol=1e-4)
    singular = np.linalg.svd(np.stack((a, b, c, d), -1).reshape(-1, 2, 2), compute_uv=False)
    assert 0.06 <= singular.min() and singular.max() <= 0.9  # every map draws points together
    assert e.min() < -0.5 and e.max() > 0.5 and f.min() < -0.5 and f.max() > 0.5 and np.abs([e, f]).max() <= 1


def test_images_of_a_class_deviate_in_every_entry_of_every_map(monkeypatch):
    drawn, draw = [], fractals._draw
    monkeypatch.setattr(fractals, "_draw", lambda maps, *rest: drawn.append(maps) or draw(maps, *rest))
    fractal_images(3, 50, 32, seed=1)
    maps = drawn[-1].reshape(3, 50, -1)
    change = maps / fractals._classes(3, 32)[0].reshape(3, 1, -1) - 1
    assert 0.9 * CHANGE < np.abs(change).max() <= CHANGE * 1.001 and CHANGE == 0.15
    assert np.abs(change.mean((0, 1))).max() < 0.035  # four standard errors: 0.15 / sqrt(3) / sqrt(150)
    assert len(np.unique(change.round(6))) > 0.95 * change.size
