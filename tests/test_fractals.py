"""Fractal images: the same classes for everyone, images of a class alike, classes apart."""

from __future__ import annotations

import numpy as np

from fractals import LEAST_FILLED, fractal_images


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
