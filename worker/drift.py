"""`python -m worker drift`: how far a video leaves its portrait as it goes on.

What a job's metrics say of its own video, for any mp4, and frame by frame.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from worker.media.drift import DriftMeter, Likeness

HEADER = "seconds  identity  colour mean  colour spread"


def main(
    video: Path, portrait: Path | None, face_box: Sequence[float] | None, *, as_json: bool
) -> int:
    """The exit code of the command.

    Args:
        portrait: as it was sent; None: the video's first frame stands for it.
        face_box: as a request has it; None: the largest face of the portrait.
    """
    try:
        times, meter = measure(video, portrait, face_box)
    except (OSError, ValueError) as error:  # PyAV's errors are of both kinds
        print(f"{video}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if as_json:
        print(json.dumps(meter.summary()))  # noqa: T201
        return 0
    print(HEADER)  # noqa: T201
    for seconds, likeness in zip(times, meter.measured, strict=True):
        print(_line(seconds, likeness))  # noqa: T201
    for name, values in (meter.summary() or {}).items():
        print(f"{name.replace('_', ' ')}: {values or 'no face was found'}")  # noqa: T201
    return 0


def measure(
    video: Path, portrait: Path | None, face_box: Sequence[float] | None
) -> tuple[list[float], DriftMeter]:
    """When the frames were that are measured, in seconds, and their meter.

    Raises:
        OSError, ValueError: a file is missing, or none of its kind.
    """
    times: list[float] = []
    meter = None
    with av.open(str(video)) as file:
        if not file.streams.video:
            raise ValueError("it has no picture")
        num_frames = file.streams.video[0].frames
        if num_frames == 0:
            raise ValueError("it does not say how many frames it has")
        for frame in file.decode(video=0):
            pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
            if meter is None:
                reference = Image.fromarray(pixels) if portrait is None else _read(portrait)
                box = face_box or _largest_face(reference)
                meter = DriftMeter(reference, [] if box is None else [box], num_frames)
            meter.see(pixels[None])
            times += [frame.time or 0.0] * (len(meter.measured) - len(times))
    if meter is None:
        raise ValueError("it has no frame")
    return times, meter


def _read(portrait: Path) -> Image.Image:
    with Image.open(portrait) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _largest_face(portrait: Image.Image) -> Sequence[float] | None:
    from worker.generation.face import largest_face  # imports torch

    return largest_face(portrait, None)


def _line(seconds: float, likeness: Likeness) -> str:
    identity = np.nan if likeness.identity is None else likeness.identity
    return (
        f"{seconds:7.2f}  {identity:8.3f}  {likeness.colour_mean:11.2f}  "
        f"{likeness.colour_spread:13.2f}"
    )
