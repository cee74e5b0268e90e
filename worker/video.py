"""Frames and sound to an mp4 for the web: H.264, AAC, index in front."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pydub import AudioSegment


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A finished mp4 and what is known about it."""

    path: Path
    num_frames: int
    duration_seconds: float  # of the picture
    size_bytes: int
    sha256: str


def write_video(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],  # chunks of (F, H, W, 3), RGB
    *,
    fps: float,
    height: int,
    width: int,
    recording: "AudioSegment",
    metadata: Mapping[str, str],
) -> VideoFile:
    """An mp4 at `path`; frames are encoded as they come, and nothing stays behind on failure.

    Whatever `frames` raises (a cancelled job, a fault of the GPU) comes out unchanged.

    Args:
        metadata: tags that mp4 knows: "title", "comment", "description", ...

    Raises:
        EncodeError: the encoder or the disk failed.
        ValueError: frames of another size, an odd size, or no frame at all.
    """
    raise NotImplementedError


def write_thumbnail(frame: NDArray[np.uint8], path: Path) -> None:
    """A jpeg of one (H, W, 3) RGB frame at `path`."""
    raise NotImplementedError
