"""The model's frames as the video shows them: in their aspect ratio, on their background."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageFilter, ImageOps

from worker.framing import Framing
from worker.shapes import FrameSize

BLUR = "blur"
BLUR_REDUCTION = 8  # the blur is made of fewer pixels: nobody sees which
BLUR_RADIUS = 0.04  # of the frame's short side


def finished(
    chunks: Iterable[NDArray[np.uint8]],  # (F, H, W, 3), RGB, of `framing.model`
    framing: Framing,
    background: str = BLUR,
) -> Iterator[NDArray[np.uint8]]:  # of `framing.video`
    """The frames, scaled and laid on the background where the framing wants it.

    A blurred background is made of the first frame and stays as it is, else it would move with
    each nod.
    """
    if framing.model == framing.picture == framing.video:
        yield from chunks
        return
    canvas: Image.Image | None = None
    for chunk in chunks:
        frames = []
        for pixels in chunk:
            picture = _scaled(Image.fromarray(pixels), framing.picture)
            if framing.picture != framing.video:
                canvas = canvas or _background(picture, framing.video, background)
                picture = _centred(picture, canvas)
            frames.append(np.asarray(picture))
        yield np.stack(frames)


def _scaled(picture: Image.Image, size: FrameSize) -> Image.Image:
    return picture.resize((size.width, size.height), Image.Resampling.LANCZOS)


def _centred(picture: Image.Image, canvas: Image.Image) -> Image.Image:
    frame = canvas.copy()
    place = ((canvas.width - picture.width) // 2, (canvas.height - picture.height) // 2)
    frame.paste(picture, place)
    return frame


def _background(picture: Image.Image, size: FrameSize, background: str) -> Image.Image:
    if background != BLUR:
        return Image.new("RGB", (size.width, size.height), ImageColor.getrgb(background))
    small = (-(-size.width // BLUR_REDUCTION), -(-size.height // BLUR_REDUCTION))
    filled = ImageOps.fit(picture, small, Image.Resampling.BOX)
    blurred = filled.filter(ImageFilter.GaussianBlur(BLUR_RADIUS * min(small)))
    return blurred.resize((size.width, size.height), Image.Resampling.BICUBIC)
