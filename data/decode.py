"""Image files as uint8 tensors: JPEGs by torchvision's decoder, everything that it does not take by Pillow.

Both give the same values for the same JPEG. A JPEG that is going to be made smaller by two or more is decoded at a
reduced scale, which Pillow's `draft` can do and torchvision's decoder cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

try:
    from torchvision.io import decode_jpeg
except ImportError:  # torchvision 0.29 announces that a later release will leave decoding to another package
    decode_jpeg = None

START, END_OF_HEADER = b"\xff\xd8", 0xDA
FRAMES = (0xC0, 0xC1, 0xC2)
"""Frame headers of JPEGs by Huffman coding: baseline, extended and progressive (ITU-T T.81, table B.1)."""
ORIENTATION = 0x0112
"""The tag of the orientation in EXIF."""
SCALES = (8, 4, 2)
"""The reductions that a JPEG decoder offers, besides none."""

Reduction = Callable[[int, int], float]
"""By how much an image of (height, width) is going to be made smaller, at least."""


class Frame(NamedTuple):
    """The header of a JPEG's frame."""

    height: int
    width: int
    channels: int


class Pixels(NamedTuple):
    """A decoded image."""

    values: Tensor
    """uint8 [3, height, width], perhaps reduced."""
    height: int
    """Height of the image before it was reduced, like `width`."""
    width: int

    @classmethod
    def of(cls, image: Image.Image) -> Pixels:
        """A Pillow image in RGB."""
        return cls(torch.from_numpy(np.array(image)).permute(2, 0, 1), image.height, image.width)


def jpeg_frame(content: bytes) -> Frame | None:
    """The frame of a grey or colour JPEG of eight bits; None for everything else and for a damaged header."""
    place = len(START)
    while content.startswith(START) and place + 9 < len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # a byte that fills
            place += 1
        elif marker in FRAMES:
            bits, channels = content[place + 4], content[place + 9]
            height, width = (int.from_bytes(content[place + i : place + i + 2], "big") for i in (5, 7))
            fits = bits == 8 and channels in (1, 3) and height * width > 0
            return Frame(height, width, channels) if fits else None
        elif marker == END_OF_HEADER:
            return None
        else:
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return None


def read_pixels(path: str, by_pillow: Callable[[str], Image.Image], upright: bool, reduction: Reduction) -> Pixels:
    """The image file's pixels. `by_pillow` reads what is no ordinary JPEG, and raises for what cannot be read.

    `upright`: JPEGs with an EXIF orientation go to `by_pillow`, which turns them.
    """
    with open(path, "rb") as file:
        content = file.read()
    frame = jpeg_frame(content)
    too_many = frame is not None and frame.height * frame.width > (Image.MAX_IMAGE_PIXELS or float("inf"))
    if decode_jpeg is None or frame is None or too_many:  # Pillow warns of images with very many pixels
        return Pixels.of(by_pillow(path))
    if upright and Image.open(BytesIO(content)).getexif().get(ORIENTATION, 1) != 1:
        return Pixels.of(by_pillow(path))
    smaller = reduction(frame.height, frame.width)
    scale = next((scale for scale in SCALES if smaller >= scale), 1)
    if scale > 1:
        image = Image.open(BytesIO(content))
        image.draft("RGB" if frame.channels == 3 else "L", (frame.width // scale, frame.height // scale))
        return Pixels(Pixels.of(image.convert("RGB")).values, frame.height, frame.width)
    try:
        values = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    except RuntimeError:  # Pillow decides whether the file can be read
        return Pixels.of(by_pillow(path))
    return Pixels(values.expand(3, -1, -1), frame.height, frame.width)
