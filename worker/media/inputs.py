"""The two inputs of a job, from where the client put them to checked values in memory.

What a file is, is decided by decoding it; its name and its declared type are never looked at.
"""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avatar_client.contract.job_errors import (
    InputTooLargeError,
    InvalidInputError,
    UnsupportedMediaError,
)
from avatar_client.contract.request import MediaSource
from worker.media import connection, download, file_kind, picture, recording, speech_check
from worker.settings import Settings
from worker.shapes import SAMPLE_RATE_HZ

with warnings.catch_warnings():
    # pydub looks for an ffmpeg on PATH, which nothing here calls, and imports the old audioop
    warnings.simplefilter("ignore")
    from pydub import AudioSegment as AudioSegment  # its other users import it from here

MIN_SPEECH_SECONDS = 0.08  # one frame of video, at the lower of the frame rates
MAX_RECORDING_RATE_HZ = 48_000  # above it nothing is audible
MAX_START_SECONDS = 7200.0  # all sound before the start has to be decoded
MIN_SIDE = 32  # px
MAX_ASPECT_RATIO = 8

# What decoders raise at damaged or hostile bytes.
DAMAGED = (
    OSError,
    SyntaxError,  # Pillow's PNG
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    AttributeError,
    struct.error,
    zlib.error,
    av.FFmpegError,
)


@dataclass(frozen=True, slots=True)
class Speech:
    """The chosen part of the recording: as it was recorded, and as the model hears it."""

    recording: AudioSegment  # at the source's rate, at most 48 kHz; mono or stereo, 16 bit
    waveform: NDArray[np.float32]  # (num_samples,) at 16 kHz, mono, in [-1, 1]
    warnings: tuple[str, ...] = ()  # for the client

    @property
    def duration_seconds(self) -> float:
        """Length of the recording."""
        return float(self.recording.frame_count()) / int(self.recording.frame_rate)


def load_portrait(
    source: MediaSource,
    directory: Path,
    settings: Settings,
    *,
    check: Callable[[], None] = connection.nothing_to_check,
) -> Image.Image:
    """The portrait as an upright RGB image: alpha laid on white, the first frame of an animation.

    `directory` is the job's own; a download is kept there. `check` may raise to end the download.

    Raises:
        InputUrlBlockedError, InputDownloadError: see `download.download`.
        InputTooLargeError: over the limit of bytes or pixels.
        InvalidInputError: too small or too narrow to hold a face.
        UnsupportedMediaError: not an image, or a damaged one.
    """
    max_pixels = settings.max_image_pixels
    too_large = InputTooLargeError(f"has more than {max_pixels} pixels", field="image")
    with _open(source, directory / "image", settings, "image", check) as file:
        content = file.read()
    try:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit is below what phones make
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of side data, which decide nothing
            image = picture.open_picture(content)
            if image.width * image.height > max_pixels:
                raise too_large
            _require_portrait_size(image.height, image.width)
            return picture.decode(image, content)
    except Image.DecompressionBombError as error:
        raise too_large from error
    except DAMAGED as error:
        what = file_kind.describe(content[: file_kind.HEAD_BYTES])
        message = what or "is not an image that can be decoded"
        raise UnsupportedMediaError(message, field="image") from error


def load_speech(
    source: MediaSource,
    directory: Path,
    settings: Settings,
    *,
    start_seconds: float = 0.0,
    max_seconds: float | None = None,
    check: Callable[[], None] = connection.nothing_to_check,
) -> Speech:
    """The recording from `start_seconds` on, `max_seconds` of it at most.

    Decoding stops where the chosen part ends, so that a long recording costs no memory.

    Raises:
        InputUrlBlockedError, InputDownloadError: see `download.download`.
        InputTooLargeError: over the limit of bytes or seconds.
        InvalidInputError: `start_seconds` lies beyond the end, or the part is too short.
        UnsupportedMediaError: no sound in it, or a damaged file.
    """
    if max_seconds is not None and max_seconds < MIN_SPEECH_SECONDS:
        raise InvalidInputError(f"must be at least {MIN_SPEECH_SECONDS}", field="max_seconds")
    if start_seconds > MAX_START_SECONDS:
        message = f"must be at most {MAX_START_SECONDS:g}"
        raise InvalidInputError(message, field="audio_start_seconds")
    limit_seconds = settings.max_audio_seconds
    wanted_seconds = min(max_seconds or math.inf, limit_seconds + 1.0)  # 1 s more: too long
    with _open(source, directory / "audio", settings, "audio", check) as file:
        try:
            sound = recording.decode(file, start_seconds, wanted_seconds)
        except DAMAGED as error:
            file.seek(0)
            what = file_kind.describe(file.read(file_kind.HEAD_BYTES))
            message = what or "is not a recording that can be decoded"
            raise UnsupportedMediaError(message, field="audio") from error
    samples, rate_hz = sound.samples, sound.rate_hz
    if samples.shape[1] > limit_seconds * rate_hz:
        message = f"is longer than the limit of {limit_seconds:g} s; max_seconds takes a part of it"
        raise InputTooLargeError(message, field="audio")
    if not np.isfinite(samples).all():
        raise UnsupportedMediaError("holds samples that are no numbers", field="audio")
    mono, mix_warnings = speech_check.mix_for_model(samples)
    waveform = recording.resample(mono, rate_hz, SAMPLE_RATE_HZ).clip(-1, 1)
    if len(waveform) < MIN_SPEECH_SECONDS * SAMPLE_RATE_HZ:
        field = "audio_start_seconds" if start_seconds else "audio"
        message = f"{len(waveform) / SAMPLE_RATE_HZ:.3f} s of sound are too short for a video"
        raise InvalidInputError(message, field=field)
    return Speech(
        recording=_recording(samples, rate_hz),
        waveform=waveform,
        warnings=(*mix_warnings, *speech_check.voice_warnings(waveform)),
    )


def _open(
    source: MediaSource, path: Path, settings: Settings, field: str, check: Callable[[], None]
) -> BinaryIO:
    """The bytes of a source; an address is downloaded to `path` first."""
    max_bytes = settings.max_input_bytes
    if source.url is None:
        content = source.content or b""
        if len(content) > max_bytes:
            message = f"is larger than the limit of {max_bytes} bytes"
            raise InputTooLargeError(message, field=field)
        return io.BytesIO(content)
    download.download(
        source.url,
        path,
        max_bytes=max_bytes,
        timeout_seconds=settings.download_timeout_seconds,
        field=field,
        allow_private=settings.runpod_allow_private_download_urls,
        check=check,
    )
    return path.open("rb")


def _require_portrait_size(height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        message = f"is {width} x {height} pixels; each side must have at least {MIN_SIDE}"
        raise InvalidInputError(message, field="image")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        message = f"is {width} x {height} pixels; one side is over {MAX_ASPECT_RATIO} x the other"
        raise InvalidInputError(message, field="image")


def _recording(samples: NDArray[np.float32], rate_hz: int) -> AudioSegment:
    new_rate_hz = min(rate_hz, MAX_RECORDING_RATE_HZ)
    interleaved = recording.resample(
        np.ascontiguousarray(samples.T), rate_hz, new_rate_hz
    )  # (N, channels)
    quantised = np.rint(interleaved * 32768).clip(-32768, 32767).astype("<i2")
    return AudioSegment(
        quantised.tobytes(), sample_width=2, frame_rate=new_rate_hz, channels=samples.shape[0]
    )
