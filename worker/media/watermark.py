"""A mark that people see, on every finished frame: a line of text or a picture in a corner."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from avatar_client.contract.request import Watermark
from worker.shapes import FrameSize

# Of the frame's short side.
MARGIN = 0.03
TEXT_HEIGHT = 0.045
PICTURE_SIDE = 0.2  # of the longer side of a picture
MIN_TEXT_PIXELS = 10
OUTLINE = 0.1  # of the text's height: white letters are read on any ground


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark as it lies on frames of one size."""

    top: int
    left: int
    colours: NDArray[np.float32]  # (h, w, 3), already weighed by `weight`
    weight: NDArray[np.float32]  # (h, w, 1), 0 to 1: how much of the frame it hides

    @classmethod
    def of(cls, asked: Watermark, picture: Image.Image | None, size: FrameSize) -> Self:
        """The mark that is asked for; `picture` (RGBA) is the one that it names."""
        short = min(size)
        layer = _fitted(picture, short) if picture is not None else _written(asked.text or "", size)
        pixels = np.asarray(layer).astype(np.float32)
        weight = (pixels[..., 3:] / 255 * asked.opacity).astype(np.float32)
        vertical, _, horizontal = asked.place.partition("-")
        margin = round(MARGIN * short)
        return cls(
            top=margin if vertical == "top" else size.height - layer.height - margin,
            left=margin if horizontal == "left" else size.width - layer.width - margin,
            colours=(pixels[..., :3] * weight).astype(np.float32),
            weight=weight,
        )

    def on(self, chunks: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """The frames, chunks of (F, H, W, 3), with the mark on them."""
        height, width = self.weight.shape[:2]
        rows, columns = slice(self.top, self.top + height), slice(self.left, self.left + width)
        for chunk in chunks:
            marked = chunk.copy()
            seen = marked[:, rows, columns] * (1 - self.weight) + self.colours
            marked[:, rows, columns] = np.rint(seen).astype(np.uint8)
            yield marked


def _fitted(picture: Image.Image, short: int) -> Image.Image:
    scale = PICTURE_SIDE * short / max(picture.size)
    width, height = (max(round(side * scale), 1) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _written(text: str, size: FrameSize) -> Image.Image:
    """The text, in letters that are smaller where it would be wider than the frame."""
    short = min(size)
    pixels = max(TEXT_HEIGHT * short, MIN_TEXT_PIXELS)
    room = size.width - 2 * round(MARGIN * short)
    for _ in range(2):
        font = ImageFont.load_default(pixels)
        stroke = max(round(OUTLINE * pixels), 1)
        left, top, right, bottom = font.getbbox(text, stroke_width=stroke)
        if right - left <= room:
            break
        pixels *= 0.97 * room / (right - left)
    layer = Image.new("RGBA", (min(round(right - left), room), round(bottom - top)))
    ImageDraw.Draw(layer).text(
        (-left, -top), text, "white", font, stroke_width=stroke, stroke_fill="black"
    )
    return layer
