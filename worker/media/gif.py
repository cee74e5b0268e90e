"""A small GIF of a video's beginning, for where no video can be shown."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_SECONDS = 4.0
MAX_SIDE = 320  # px
MIN_SIDE = 64
MAX_FPS = 12.5  # GIF counts in hundredths of a second, which 80 ms are
MAX_GIF_BYTES = 2**20
NUM_COLORS = 128


class GifWriter:
    """Takes of the frames that pass what the GIF will show.

    Args:
        fps: of the video.
    """

    def __init__(self, fps: float) -> None:
        self._step = max(round(fps / MAX_FPS), 1)
        self._milliseconds = round(1000 * self._step / fps)
        self._missing = round(MAX_SECONDS * 1000 / self._milliseconds)
        self._passed = 0
        self._pictures: list[Image.Image] = []

    def watch(self, chunks: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """The same chunks of (F, H, W, 3) RGB frames."""
        for frames in chunks:
            for frame in frames[-self._passed % self._step :: self._step][: self._missing]:
                picture = Image.fromarray(frame)
                picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
                self._pictures.append(picture)
                self._missing -= 1
            self._passed += len(frames)
            yield frames

    def write(self, path: Path, comment: str) -> None:
        """The GIF at `path`, of `MAX_GIF_BYTES` at most: a larger one is made smaller.

        Raises:
            ValueError: no frame has passed.
        """
        if not self._pictures:
            raise ValueError("no frames")
        side = max(self._pictures[0].size)
        content = self._encoded(side, comment)
        while len(content) > MAX_GIF_BYTES and side > MIN_SIDE:
            side = max(side * 3 // 4, MIN_SIDE)
            content = self._encoded(side, comment)
        path.write_bytes(content)

    def _encoded(self, side: int, comment: str) -> bytes:
        first, *others = [_with_few_colors(picture, side) for picture in self._pictures]
        content = io.BytesIO()
        first.save(
            content,
            "GIF",
            save_all=True,
            append_images=others,
            duration=self._milliseconds,
            loop=0,
            comment=comment.encode(),
        )
        return content.getvalue()


def _with_few_colors(picture: Image.Image, side: int) -> Image.Image:
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.BOX)
    return small.quantize(NUM_COLORS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
