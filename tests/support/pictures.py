"""Pictures as the tests make them."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def chart(height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """Smooth colours from everywhere in the cube, and no two corners alike."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height - 1, width - 1])[:, None, None]
    pixels = np.stack([255 * x, 255 * y, 255 * (1 - x) * (0.3 + 0.7 * y)], axis=-1)
    return pixels.round().astype(np.uint8)


def jpeg(height: int = 48, width: int = 64, **options: Any) -> bytes:
    """A small JPEG, as a preview is."""
    return encoded(Image.fromarray(chart(height, width)), "JPEG", **options)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
