"""The two inputs of a job, from where the client put them to checked values in memory.

What a file is, is decided by decoding it; its name and its declared type are never looked at.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worker.schema import MediaSource
from worker.settings import Settings

if TYPE_CHECKING:
    from pydub import AudioSegment

SAMPLE_RATE_HZ = 16_000  # what the speech encoder hears


@dataclass(frozen=True, slots=True)
class Speech:
    """The chosen part of the recording: as it was recorded, and as the model hears it."""

    recording: "AudioSegment"  # at the source's rate, at most 48 kHz; mono or stereo, 16 bit
    waveform: NDArray[np.float32]  # (num_samples,) at 16 kHz, mono, in [-1, 1]

    @property
    def duration_seconds(self) -> float:
        """Length of the recording."""
        return float(self.recording.frame_count()) / int(self.recording.frame_rate)


def load_portrait(source: MediaSource, directory: Path, settings: Settings) -> Image.Image:
    """The portrait as an upright RGB image, alpha laid on white.

    `directory` is the job's own; a download is kept there.

    Raises:
        InputUrlBlockedError, InputDownloadError: see `network.download`.
        InputTooLargeError: over the limit of bytes or pixels.
        InvalidInputError: too small to hold a face.
        UnsupportedMediaError: not an image, or a damaged one.
    """
    raise NotImplementedError


def load_speech(
    source: MediaSource,
    directory: Path,
    settings: Settings,
    *,
    start_seconds: float = 0.0,
    max_seconds: float | None = None,
) -> Speech:
    """The recording from `start_seconds` on, `max_seconds` of it at most.

    Raises:
        InputUrlBlockedError, InputDownloadError: see `network.download`.
        InputTooLargeError: over the limit of bytes or seconds.
        InvalidInputError: `start_seconds` lies beyond the end.
        UnsupportedMediaError: no sound in it, or a damaged file.
    """
    raise NotImplementedError
