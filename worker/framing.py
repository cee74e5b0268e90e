"""How the portrait becomes the picture of the video: which part of it, at what size, and where.

The model's frames have sides of multiples of 64, so what it sees is squeezed a little, as in the
published code. The finished frames are scaled back: a circle in the portrait is one in the video.

    source   the whole portrait; the video has its aspect ratio
    cover    the largest part of that ratio around the face
    contain  the whole portrait in the middle of a frame of that ratio. The model makes the portrait
             alone: it costs less, and the frame around it stays as it is
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.contract.request import Aspect, Fit
from worker.shapes import Box, FrameSize, fit_size, rounded_size

# Of an aspect ratio. Nobody sees it, and frames that are not scaled stay sharper.
MAX_STRETCH = 0.005
# Where the middle of the face comes to lie in a frame that is cut from the portrait, of its height:
# above the middle, as people are pictured.
FACE_HEIGHT = 0.45
MIN_CONTAINED_SIDE = 256  # px of the model's frame, while the picture in the video may be narrower


def size_of(image: Image.Image) -> FrameSize:
    """The picture's size."""
    return FrameSize(image.height, image.width)


@dataclass(frozen=True, slots=True)
class Framing:
    """The sizes of one video, known before anything is looked for in the portrait."""

    model: FrameSize  # of the frames that the model makes
    picture: FrameSize  # of the same in the video
    video: FrameSize  # of the video's frames; larger than `picture` where that is contained

    @classmethod
    def of(
        cls, portrait: FrameSize, resolution: int, aspect: Aspect = "source", fit: Fit = "cover"
    ) -> "Framing":
        """The framing of a portrait of that size."""
        ratio = portrait if aspect == "source" else _ratio(aspect)
        model = fit_size(ratio.height, ratio.width, resolution)
        video = _at_ratio(model, ratio)
        if aspect == "source" or fit == "cover":
            return cls(model, video, video)
        picture = _within(video, portrait)
        enlarged = min(
            max(1.0, MIN_CONTAINED_SIDE / min(picture)),
            math.sqrt(model.height * model.width / (picture.height * picture.width)),
        )
        contained = rounded_size(picture.height * enlarged, picture.width * enlarged)
        return cls(contained, picture, video)


def cover(portrait: FrameSize, aspect: Aspect, face: Box | None, named: str = "the face is") -> Box:
    """The largest part of the portrait with that aspect ratio, around the face if there is one.

    `face` may hold several; `named` is how a refusal begins.

    Raises:
        InvalidInputError: the face does not fit into it.
    """
    if aspect == "source":
        return (0, 0, portrait.width, portrait.height)
    ratio = _ratio(aspect)
    width = min(portrait.width, portrait.height * ratio.width / ratio.height)
    height = min(portrait.height, portrait.width * ratio.height / ratio.width)
    room_across, room_down = portrait.width - width, portrait.height - height
    if face is None:
        return (room_across / 2, room_down / 2, width, height)
    left, top = max(face[0], 0), max(face[1], 0)
    right = min(face[0] + face[2], portrait.width)
    bottom = min(face[1] + face[3], portrait.height)
    if right - left > width or bottom - top > height:
        side = "wider" if right - left > width else "higher"
        raise InvalidInputError(
            f"{named} {side} than the part of the image that {aspect} leaves; choose another "
            "aspect, or output.fit 'contain'",
            field="output.aspect",
        )
    x = (left + right - width) / 2
    # the whole face is in the frame, wherever its middle comes to lie
    y = min((top + bottom) / 2 - FACE_HEIGHT * height, top)
    return (min(max(x, 0), room_across), min(max(y, 0), room_down), width, height)


def cut(image: Image.Image, part: Box, size: FrameSize) -> Image.Image:
    """A part of the picture at that size, squeezed where its aspect ratio is another."""
    x, y, width, height = part
    box = (x, y, min(x + width, image.width), min(y + height, image.height))
    return image.convert("RGB").resize((size.width, size.height), Image.Resampling.LANCZOS, box=box)


def box_in_part(box: Box, part: Box, size: FrameSize) -> Box:
    """The box of the same face in a part of the picture that was brought to that size."""
    x, y, width, height = box
    left, top, part_width, part_height = part
    across, down = size.width / part_width, size.height / part_height
    return ((x - left) * across, (y - top) * down, width * across, height * down)


def box_of_whole(box: Box, part: Box, size: FrameSize) -> Box:
    """The box in the whole picture of a face in a part of it: what `box_in_part` was given."""
    x, y, width, height = box
    left, top, part_width, part_height = part
    across, down = part_width / size.width, part_height / size.height
    return (left + x * across, top + y * down, width * across, height * down)


def around(boxes: Sequence[Box]) -> Box | None:
    """The smallest box that holds all of them; None: there are none."""
    if not boxes:
        return None
    left, top = (min(box[side] for box in boxes) for side in (0, 1))
    right, bottom = (max(box[side] + box[side + 2] for box in boxes) for side in (0, 1))
    return (left, top, right - left, bottom - top)


def _ratio(aspect: Aspect) -> FrameSize:
    width, _, height = aspect.partition(":")
    return FrameSize(int(height), int(width))


def _at_ratio(size: FrameSize, ratio: FrameSize) -> FrameSize:
    """The size shortened to that aspect ratio: one side of it, or both where that comes closer.

    Sides stay even, since the encoders have one colour for 2 x 2 pixels.
    """
    if _stretch(size, ratio) <= MAX_STRETCH:
        return size
    scale = min(size.height / ratio.height, size.width / ratio.width)
    shortened = FrameSize(*(2 * round(side * scale / 2) for side in ratio))
    return shortened if _stretch(shortened, ratio) <= MAX_STRETCH else _within(size, ratio, step=2)


def _within(size: FrameSize, ratio: FrameSize, step: int = 1) -> FrameSize:
    """About the largest size of that ratio in another, both sides multiples of `step`.

    The shorter side is rounded, and the longer one follows it: so the ratio is off by half a step
    of the longer one.
    """
    scale = min(size.height / ratio.height, size.width / ratio.width)
    short = max(int(min(ratio) * scale / step), 1) * step
    long = round(short * max(ratio) / min(ratio) / step) * step
    return FrameSize(long, short) if ratio.height > ratio.width else FrameSize(short, long)


def _stretch(size: FrameSize, ratio: FrameSize) -> float:
    """By how much things are stretched in a frame of that size, if they are meant for the ratio."""
    return abs(size.width * ratio.height / (size.height * ratio.width) - 1)
