"""Who speaks in a video: the voices, each with its recording and its face."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker.shapes import FRAME_RATES, Box, FrameSize, count_frames


@dataclass(frozen=True, slots=True)
class Voice:
    """One recording and the face that speaks it."""

    # (samples,) mono in [-1, 1], 16 kHz, on the video's own timeline: zeros where it is silent.
    # All voices of a video are equally long.
    waveform: NDArray[np.float32]
    # x, y, width, height in pixels of the portrait. None, for one voice alone: the largest face,
    # or without any the whole frame.
    face_box: Box | None


def require_voices(voices: Sequence[Voice], size: FrameSize, fps: float) -> int:
    """The frames of video that they last.

    Args:
        size: of the portrait that their boxes lie in.

    Raises:
        ValueError: no voice, unequal lengths, several channels, less than one frame, another frame
            rate than the model's; a box that does not lie in the portrait, or none among several.
    """
    if fps not in FRAME_RATES:
        raise ValueError(f"fps must be one of {FRAME_RATES}, not {fps}")
    if not voices:
        raise ValueError("voices must be one at least")
    for voice in voices:
        if voice.waveform.ndim != 1:
            shape = voice.waveform.shape
            raise ValueError(f"audio must be one channel, (samples,), not {shape}")
        if voice.face_box is not None:
            _require_box(voice.face_box, size)
        elif len(voices) > 1:
            raise ValueError("face_box must be given for each of several voices")
    lengths = {len(voice.waveform) for voice in voices}
    if len(lengths) > 1:
        raise ValueError(
            f"audio must be equally long for all voices, not {sorted(lengths)} samples"
        )
    num_frames = count_frames(lengths.pop(), fps)
    if num_frames == 0:
        raise ValueError("audio is shorter than one frame")
    return num_frames


def _require_box(box: Box, size: FrameSize) -> None:
    x, y, width, height = box
    in_picture = x < size.width and y < size.height and x + width > 0 and y + height > 0
    if width < 1 or height < 1 or not in_picture:
        raise ValueError("face_box must be (x, y, width, height) of a face in the image")
