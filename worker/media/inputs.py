"""The inputs of a job, from where the client put them to checked values in memory.

What a file is, is decided by decoding it, in the sandbox; its name and its declared type are never
looked at.
"""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avatar_client.contract.job_errors import (
    InputTooLargeError,
    InternalError,
    InvalidInputError,
    UnsupportedMediaError,
    WorkerError,
)
from avatar_client.contract.media_source import MediaSource
from worker.media import connection, decoders, download, recording
from worker.media.sandbox import Decoded, Failure, Sandbox, SandboxError
from worker.media.sandbox_process import Limits
from worker.settings import Settings

with warnings.catch_warnings():
    # pydub looks for an ffmpeg on PATH, which nothing here calls, and imports the old audioop
    warnings.simplefilter("ignore")
    from pydub import AudioSegment as AudioSegment  # its other users import it from here

MAX_START_SECONDS = 7200.0  # all sound before the start has to be decoded

# What the decoders' process may say of a file.
REFUSALS = {
    error.code: error for error in (InputTooLargeError, InvalidInputError, UnsupportedMediaError)
}
MARK = "output.watermark.image"
MAX_MARK_PIXELS = 16_000_000
REMEDIES = {MARK: "export it as a plain PNG", "image": "export it as a plain JPEG or PNG"}
REMEDY_OF_SOUND = "export it as a plain wav or mp3"
START = "audio_start_seconds"

MAX_MESSAGE = 300  # characters

logger = logging.getLogger(__name__)

sandbox = Sandbox("worker.media.decoders")


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
    with _open(source, directory / "image", settings, "image", check) as file:
        limits = decoders.portrait_limits(max_pixels, os.fstat(file.fileno()).st_size)
        arguments = {"max_pixels": max_pixels}
        decoded = _decoded(decoders.read_portrait.__name__, "image", file, arguments, limits, check)
    [pixels] = decoded.arrays
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise UnsupportedMediaError("is not an image that can be decoded", field="image")
    decoders.require_portrait_size(*pixels.shape[:2])
    return Image.fromarray(pixels)


def load_mark(
    source: MediaSource,
    directory: Path,
    settings: Settings,
    *,
    check: Callable[[], None] = connection.nothing_to_check,
) -> Image.Image:
    """The picture of a watermark as an upright RGBA image.

    Raises:
        InputUrlBlockedError, InputDownloadError, InputTooLargeError, UnsupportedMediaError: as
            `load_portrait`, by the watermark's field.
    """
    max_pixels = min(MAX_MARK_PIXELS, settings.max_image_pixels)
    with _open(source, directory / "watermark", settings, MARK, check) as file:
        limits = decoders.portrait_limits(max_pixels, os.fstat(file.fileno()).st_size)
        limits = replace(limits, answer_bytes=4 * max_pixels)
        arguments = {"max_pixels": max_pixels}
        decoded = _decoded(decoders.read_mark.__name__, MARK, file, arguments, limits, check)
    [pixels] = decoded.arrays
    if pixels.ndim != 3 or pixels.shape[2] != 4 or pixels.dtype != np.uint8 or not pixels.size:
        raise UnsupportedMediaError("is not an image that can be decoded", field=MARK)
    return Image.fromarray(pixels)


def load_speech(
    source: MediaSource,
    directory: Path,
    settings: Settings,
    *,
    start_seconds: float = 0.0,
    max_seconds: float | None = None,
    trim_silence: bool = False,
    field: str = "audio",
    check: Callable[[], None] = connection.nothing_to_check,
) -> Speech:
    """The recording from `start_seconds` on, `max_seconds` of it at most.

    Decoding stops where the chosen part ends, so that a long recording costs no memory. With
    `trim_silence` the part is chosen of what is left. `field` is what the request calls it; the
    file is named after it.

    Raises:
        InputUrlBlockedError, InputDownloadError: see `download.download`.
        InputTooLargeError: over the limit of bytes or seconds.
        InvalidInputError: `start_seconds` lies beyond the end, or the part is too short.
        UnsupportedMediaError: no sound in it, or a damaged file.
    """
    if max_seconds is not None and max_seconds < decoders.MIN_SPEECH_SECONDS:
        message = f"must be at least {decoders.MIN_SPEECH_SECONDS}"
        raise InvalidInputError(message, field="max_seconds")
    if start_seconds > MAX_START_SECONDS:
        message = f"must be at most {MAX_START_SECONDS:g}"
        raise InvalidInputError(message, field=START)
    decoded_seconds = None if trim_silence else max_seconds
    limits = decoders.speech_limits(start_seconds, decoded_seconds, settings.max_audio_seconds)
    arguments = {
        "start_seconds": start_seconds,
        "max_seconds": max_seconds,
        "limit_seconds": settings.max_audio_seconds,
        "trim_silence": trim_silence,
    }
    with _open(source, directory / field, settings, field, check) as file:
        decoded = _decoded(decoders.read_speech.__name__, field, file, arguments, limits, check)
    return _speech(decoded, field)


def _decoded(
    function: str,
    field: str,
    file: BinaryIO,
    arguments: dict[str, Any],
    limits: Limits,
    check: Callable[[], None],
) -> Decoded:
    """What a function of `decoders` makes of the file, in the sandbox.

    Raises:
        WorkerError: what it raised; or the file took too much of something.
    """
    try:
        answer = sandbox.run(f"{decoders.__name__}:{function}", file, arguments, limits, check)
    except SandboxError as error:
        remedy = REMEDIES.get(field, REMEDY_OF_SOUND)
        raise UnsupportedMediaError(f"{error}; {remedy}", field=field) from None
    if isinstance(answer, Decoded):
        return answer
    raise _refusal(answer, field)


def _refusal(failure: Failure, field: str) -> WorkerError:
    if failure.kind in REFUSALS:
        message = "".join(filter(str.isprintable, failure.message))[:MAX_MESSAGE]
        # a process that a file may have taken over names no other field
        named = START if failure.field == START and field == "audio" else field
        return REFUSALS[failure.kind](message, field=named)
    logger.error("the %s could not be read: %r", field, failure.message)
    return InternalError(f"the {field} could not be read; the worker's log says why")


def _speech(decoded: Decoded, field: str) -> Speech:
    """The speech of numbers that anybody may have written.

    Raises:
        UnsupportedMediaError: they are none.
    """
    rate_hz, warnings_ = decoded.facts.get("rate_hz"), decoded.facts.get("warnings")
    forms = [(array.ndim, array.dtype.name) for array in decoded.arrays]
    if (
        forms != [(2, "int16"), (1, "float32")]
        or not isinstance(rate_hz, int)
        or not isinstance(warnings_, list)
        or rate_hz not in recording.SOURCE_RATES_HZ
        or decoded.arrays[0].shape[1] not in (1, 2)
        or not np.isfinite(decoded.arrays[1]).all()
    ):
        raise UnsupportedMediaError("is not a recording that can be decoded", field=field)
    samples, waveform = decoded.arrays
    segment = AudioSegment(
        samples.tobytes(), sample_width=2, frame_rate=rate_hz, channels=samples.shape[1]
    )
    return Speech(segment, waveform, tuple(warnings_))


def _open(
    source: MediaSource, path: Path, settings: Settings, field: str, check: Callable[[], None]
) -> BinaryIO:
    """The bytes of a source, in a file at `path`."""
    max_bytes = settings.max_input_bytes
    if source.url is None:
        content = source.content or b""
        if len(content) > max_bytes:
            message = f"is larger than the limit of {max_bytes} bytes"
            raise InputTooLargeError(message, field=field)
        path.write_bytes(content)
        return path.open("rb")
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
