"""Image files as tensors, against Pillow."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.decode import Frame, jpeg_frame, read_pixels
from data.image_files import read_image


def picture(mode: str = "RGB", size: tuple[int, int] = (60, 44)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).convert(mode)


def saved(path: Path, image: Image.Image, **how: object) -> str:
    image.save(path, **how)
    return str(path)


def read(path: str, upright: bool = False, smaller: float = 1.0):
    return read_pixels(path, partial(read_image, upright=upright), upright, lambda height, width: smaller)


FILES = {
    "baseline": ("a.jpg", "RGB", {}),
    "progressive": ("a.jpg", "RGB", {"progressive": True}),
    "without subsampling": ("a.jpg", "RGB", {"subsampling": 0}),
    "grey": ("a.jpg", "L", {}),
    "CMYK": ("a.jpg", "CMYK", {}),
    "png": ("a.png", "RGB", {}),
    "palette": ("a.png", "P", {}),
    "16 bits": ("a.png", "I;16", {}),
    "webp": ("a.webp", "RGB", {}),
    "gif": ("a.gif", "P", {}),
}


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_pixels_are_those_of_pillow(file, tmp_path):
    name, mode, how = file
    path = saved(tmp_path / name, picture(mode), **how)
    pixels = read(path)
    assert pixels.values.dtype == torch.uint8 and (pixels.height, pixels.width) == (44, 60)
    assert torch.equal(pixels.values.permute(1, 2, 0), torch.from_numpy(np.array(read_image(path))))


def test_ordinary_jpegs_do_not_go_to_pillow(tmp_path):
    def refuse(path: str) -> Image.Image:
        raise AssertionError(path)

    for mode in ("RGB", "L"):
        path = saved(tmp_path / f"{mode}.jpg", picture(mode))
        assert read_pixels(path, refuse, True, lambda height, width: 1.0).values.shape == (3, 44, 60)


def test_a_jpeg_is_turned_as_its_orientation_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "a.jpg", picture(), exif=exif)
    assert read(path).values.shape == (3, 44, 60)
    turned = read(path, upright=True)
    assert (turned.height, turned.width) == (60, 44)
    assert torch.equal(turned.values.permute(1, 2, 0), torch.from_numpy(np.array(read_image(path, upright=True))))


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "text"])
def test_what_pillow_cannot_read_is_not_read(damage, tmp_path):
    content = Path(saved(tmp_path / "a.jpg", picture())).read_bytes()
    broken = {"truncated": content[:-40], "header": content[:30], "empty": b"", "text": b"no image"}[damage]
    (tmp_path / "a.jpg").write_bytes(broken)
    with pytest.raises(Exception) as wanted:
        read_image(str(tmp_path / "a.jpg"))
    with pytest.raises(type(wanted.value)):
        read(str(tmp_path / "a.jpg"))


@pytest.mark.parametrize("smaller, scale", [(1.9, 1), (2.0, 2), (3.5, 2), (4.0, 4), (100.0, 8)])
def test_a_jpeg_that_becomes_much_smaller_is_decoded_at_a_reduced_scale(smaller, scale, tmp_path):
    path = saved(tmp_path / "a.jpg", picture(size=(162, 98)), quality=95)
    pixels = read(path, smaller=smaller)
    assert pixels.values.shape == (3, -(-98 // scale), -(-162 // scale)) and pixels[1:] == (98, 162)
    whole = Image.fromarray(read(path).values.permute(1, 2, 0).numpy())
    wanted = np.array(whole.reduce(scale), dtype=int).transpose(2, 0, 1)
    assert np.abs(pixels.values.numpy() - wanted)[:, :-1, :-1].mean() < 2


def test_the_frame_of_a_jpeg():
    def content(image: Image.Image, **how: object) -> bytes:
        buffer = BytesIO()
        image.save(buffer, "JPEG", **how)
        return buffer.getvalue()

    whole = content(picture(), comment=b"some words", icc_profile=b"x" * 70_000)
    assert jpeg_frame(whole) == Frame(44, 60, 3)
    assert jpeg_frame(content(picture("L"))) == Frame(44, 60, 1)
    assert jpeg_frame(content(picture("CMYK"))) is None
    assert all(jpeg_frame(whole[:cut]) is None for cut in (0, 1, 2, 10, 100, 70_000))
    assert jpeg_frame(b"\xff\xd8" + b"\xff" * 100) is None
