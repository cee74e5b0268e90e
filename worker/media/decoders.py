"""What is done with a client's bytes, in a process of the sandbox: a portrait or a speech of them.

What these functions raise and return is all that leaves the process, so it is small and plain.
"""

import importlib
import math
import pkgutil
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import BinaryIO

import av
import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image

from avatar_client.contract.job_errors import (
    InputTooLargeError,
    InvalidInputError,
    UnsupportedMediaError,
)
from worker.media import file_kind, picture, recording, silence, speech_check
from worker.media.sandbox_process import Answer, Budget, Limits
from worker.shapes import SAMPLE_RATE_HZ

MIN_SPEECH_SECONDS = 0.08  # one frame of video, at the lower of the frame rates
MAX_RECORDING_RATE_HZ = 48_000  # above it nothing is audible
MIN_SIDE = 32  # px
MAX_ASPECT_RATIO = 8
NUM_AVIF_THREADS = 4  # the machines have a hundred cores, and each thread wants memory

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

AvifImagePlugin.DEFAULT_MAX_THREADS = NUM_AVIF_THREADS

# Measured at the slowest decoders of each kind; docs/decisions/sandbox.md has the figures.
FIRST_SECONDS, SECONDS_PER_MEGAPIXEL, SECONDS_PER_SOUND_SECOND = 20.0, 1.0, 0.05
FIRST_BYTES, BYTES_PER_PIXEL, BYTES_PER_SOUND_SECOND = 256 * 2**20, 36, 8 * 2**20
COPIES = 3  # of a picture's file


def portrait_limits(max_pixels: int, file_bytes: int) -> Limits:
    """For a picture of which nothing is known but its file's size."""
    first_bytes = FIRST_BYTES + COPIES * file_bytes
    return Limits(
        seconds=FIRST_SECONDS,
        num_bytes=first_bytes,
        max_seconds=FIRST_SECONDS + SECONDS_PER_MEGAPIXEL * max_pixels / 1e6,
        max_bytes=first_bytes + BYTES_PER_PIXEL * max_pixels,
        answer_bytes=3 * max_pixels,
    )


def speech_limits(start_seconds: float, max_seconds: float | None, limit_seconds: float) -> Limits:
    """For so much of a recording."""
    kept_seconds = min(max_seconds or math.inf, limit_seconds + 1.0)
    seconds = FIRST_SECONDS + SECONDS_PER_SOUND_SECOND * (start_seconds + kept_seconds)
    num_bytes = FIRST_BYTES + int(BYTES_PER_SOUND_SECOND * kept_seconds)
    kept_samples = kept_seconds * (2 * 2 * MAX_RECORDING_RATE_HZ + 4 * SAMPLE_RATE_HZ)
    return Limits(seconds, num_bytes, seconds, num_bytes, answer_bytes=int(kept_samples) + 64)


def warm_up() -> None:
    """Imports what is imported on first use: in the sandbox no file can be opened."""
    Image.init()
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.startswith("av.__"):
            importlib.import_module(module.name)
    for encoding in ("ascii", "latin-1", "utf-8", "utf-16", "utf-16-le", "utf-16-be", "cp1252"):
        "".encode(encoding)
    tone = np.sin(np.arange(SAMPLE_RATE_HZ, dtype=np.float32))
    speech_check.voice_warnings(tone)
    silence.spoken_part(tone[None], SAMPLE_RATE_HZ)


def read_portrait(file: BinaryIO, budget: Budget, *, max_pixels: int) -> Answer:
    """The upright RGB pixels (height, width, 3): alpha on white, an animation's first frame.

    Raises:
        InputTooLargeError: over the limit of pixels.
        InvalidInputError: too small or too narrow to hold a face.
        UnsupportedMediaError: not an image, or a damaged one.
    """
    pixels, _ = _read_picture(file, budget, max_pixels, require_portrait_size)
    return Answer({}, [pixels])


def read_mark(file: BinaryIO, budget: Budget, *, max_pixels: int) -> Answer:
    """The upright RGBA pixels (height, width, 4) of a picture of any size.

    Raises:
        InputTooLargeError, UnsupportedMediaError: as `read_portrait`.
    """
    pixels, alpha = _read_picture(file, budget, max_pixels)
    if alpha is None:
        alpha = np.full(pixels.shape[:2], 255, np.uint8)
    seen = np.maximum(alpha, 1)[..., None] / np.float32(255)
    colours = (pixels - 255 * (1 - seen)) / seen  # the picture has been laid on white
    return Answer({}, [np.dstack([np.rint(colours.clip(0, 255)).astype(np.uint8), alpha])])


def _read_picture(
    file: BinaryIO,
    budget: Budget,
    max_pixels: int,
    require_size: Callable[[int, int], None] = lambda height, width: None,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """RGB pixels, transparent ones laid on white, and the alpha if there is any."""
    content = file.read()
    too_large = InputTooLargeError(f"has more than {max_pixels} pixels", field="image")
    try:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit is below what phones make
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of side data, which decide nothing
            image = picture.open_picture(content)
            if image.width * image.height > max_pixels:
                raise too_large
            require_size(image.height, image.width)
            num_pixels = image.width * image.height
            budget.add(SECONDS_PER_MEGAPIXEL * num_pixels / 1e6, BYTES_PER_PIXEL * num_pixels)
            pixels = np.asarray(picture.decode(image, content))
            if not image.has_transparency_data:
                return pixels, None
            alpha = picture.upright(image).convert("RGBA").getchannel("A")
            return pixels, np.asarray(alpha)
    except Image.DecompressionBombError as error:
        raise too_large from error
    except DAMAGED as error:
        what = file_kind.describe(content[: file_kind.HEAD_BYTES])
        message = what or "is not an image that can be decoded"
        raise UnsupportedMediaError(message, field="image") from error


def require_portrait_size(height: int, width: int) -> None:
    """Returns if a face can be seen in so many pixels.

    Raises:
        InvalidInputError: too small or too narrow.
    """
    if min(height, width) < MIN_SIDE:
        message = f"is {width} x {height} pixels; each side must have at least {MIN_SIDE}"
        raise InvalidInputError(message, field="image")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        message = f"is {width} x {height} pixels; one side is over {MAX_ASPECT_RATIO} x the other"
        raise InvalidInputError(message, field="image")


def read_speech(
    file: BinaryIO,
    budget: Budget,  # whole from the start: it depends on the request alone
    *,
    start_seconds: float,
    max_seconds: float | None,
    limit_seconds: float,
    trim_silence: bool = False,
) -> Answer:
    """The recording (N, channels) int16 with its rate, the waveform (M,) float32, warnings.

    Decoding stops where the chosen part ends, so that a long recording costs no memory. Where
    silence at both ends is cut first, the part is chosen of what is left.

    Raises:
        InputTooLargeError: over the limit of seconds.
        InvalidInputError: `start_seconds` lies beyond the end, or the part is too short.
        UnsupportedMediaError: no sound in it, or a damaged file.
    """
    wanted_seconds = min(max_seconds or math.inf, limit_seconds + 1.0)  # 1 s more: too long
    decoded_seconds = limit_seconds + 1.0 if trim_silence else wanted_seconds
    try:
        sound = recording.decode(file, start_seconds, decoded_seconds)
    except DAMAGED as error:
        file.seek(0)
        what = file_kind.describe(file.read(file_kind.HEAD_BYTES))
        message = what or "is not a recording that can be decoded"
        raise UnsupportedMediaError(message, field="audio") from error
    samples, rate_hz = sound.samples, sound.rate_hz
    if trim_silence and np.isfinite(samples).all():
        first, last = silence.spoken_part(samples, rate_hz)
        samples = samples[:, first : min(last, first + round(wanted_seconds * rate_hz))]
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
    kept_rate_hz = min(rate_hz, MAX_RECORDING_RATE_HZ)
    facts = {
        "rate_hz": kept_rate_hz,
        "warnings": [*mix_warnings, *speech_check.voice_warnings(waveform)],
    }
    return Answer(facts, [_quantised(samples, rate_hz, kept_rate_hz), waveform])


def _quantised(
    samples: NDArray[np.float32], rate_hz: int, new_rate_hz: int
) -> NDArray[np.int16]:  # (N, channels)
    interleaved = recording.resample(np.ascontiguousarray(samples.T), rate_hz, new_rate_hz)
    return np.rint(interleaved * 32768).clip(-32768, 32767).astype("<i2")
