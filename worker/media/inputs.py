"""The two inputs of a job, from where the client put them to checked values in memory.

What a file is, is decided by decoding it; its name and its declared type are never looked at.
"""

import io
import itertools
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import soxr
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from avatar_client.contract.job_errors import (
    InputTooLargeError,
    InvalidInputError,
    UnsupportedMediaError,
)
from avatar_client.contract.request import MediaSource
from worker.media import download
from worker.settings import Settings
from worker.shapes import SAMPLE_RATE_HZ

with warnings.catch_warnings():
    # pydub looks for an ffmpeg on PATH, which nothing here calls, and imports the old audioop
    warnings.simplefilter("ignore")
    from pydub import AudioSegment as AudioSegment  # its other users import it from here

MIN_SPEECH_SECONDS = 0.08  # one frame of video, at the lower of the frame rates
MAX_RECORDING_RATE_HZ = 48_000  # above it nothing is audible
SOURCE_RATES_HZ = range(4_000, 192_001)
MAX_START_SECONDS = 7200.0  # all sound before the start has to be decoded
MIN_SIDE = 32  # px
MAX_ASPECT_RATIO = 8

# Formats that Pillow decodes itself. EPS, for one, it hands to an interpreter.
# JPEG includes MPO, which has no entry of its own: naming one is a KeyError.
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM"]

# Containers whose sound lies in the file itself. Playlists (hls, concat, dash, sdp, ...) name other
# files and addresses, which ffmpeg would open.
AUDIO_FORMATS = (
    "aac,ac3,eac3,aiff,amr,ape,asf,au,avi,caf,dts,flac,flv,mp3,mpeg,mpegts,matroska,webm,"
    "mov,mp4,m4a,3gp,3g2,mj2,ogg,tta,voc,w64,wav,wv"
)
AUDIO_OPTIONS = {"format_whitelist": AUDIO_FORMATS, "protocol_whitelist": "none"}

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

    @property
    def duration_seconds(self) -> float:
        """Length of the recording."""
        return float(self.recording.frame_count()) / int(self.recording.frame_rate)


def load_portrait(source: MediaSource, directory: Path, settings: Settings) -> Image.Image:
    """The portrait as an upright RGB image: alpha laid on white, the first frame of an animation.

    `directory` is the job's own; a download is kept there.

    Raises:
        InputUrlBlockedError, InputDownloadError: see `download.download`.
        InputTooLargeError: over the limit of bytes or pixels.
        InvalidInputError: too small or too narrow to hold a face.
        UnsupportedMediaError: not an image, or a damaged one.
    """
    max_pixels = settings.max_image_pixels
    too_large = InputTooLargeError(f"has more than {max_pixels} pixels", field="image")
    with _open(source, directory / "image", settings, "image") as file:
        try:
            image = Image.open(file, formats=IMAGE_FORMATS)  # reads the header only
            if image.width * image.height > max_pixels:
                raise too_large
            _require_portrait_size(image.height, image.width)
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise too_large from error
        except DAMAGED as error:
            message = "is not an image that can be decoded"
            raise UnsupportedMediaError(message, field="image") from error


def load_speech(
    source: MediaSource,
    directory: Path,
    settings: Settings,
    *,
    start_seconds: float = 0.0,
    max_seconds: float | None = None,
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
    with _open(source, directory / "audio", settings, "audio") as file:
        try:
            samples, rate_hz = _decode(file, start_seconds, wanted_seconds)
        except DAMAGED as error:
            message = "is not a recording that can be decoded"
            raise UnsupportedMediaError(message, field="audio") from error
    if samples.shape[1] > limit_seconds * rate_hz:
        message = f"is longer than the limit of {limit_seconds:g} s; max_seconds takes a part of it"
        raise InputTooLargeError(message, field="audio")
    if not np.isfinite(samples).all():
        raise UnsupportedMediaError("holds samples that are no numbers", field="audio")
    waveform = _resample(samples.mean(axis=0), rate_hz, SAMPLE_RATE_HZ)
    if len(waveform) < MIN_SPEECH_SECONDS * SAMPLE_RATE_HZ:
        field = "audio_start_seconds" if start_seconds else "audio"
        message = f"{len(waveform) / SAMPLE_RATE_HZ:.3f} s of sound are too short for a video"
        raise InvalidInputError(message, field=field)
    return Speech(_recording(samples, rate_hz), waveform.clip(-1, 1))


def _open(source: MediaSource, path: Path, settings: Settings, field: str) -> BinaryIO:
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
    )
    return path.open("rb")


def _require_portrait_size(height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        message = f"is {width} x {height} pixels; each side must have at least {MIN_SIDE}"
        raise InvalidInputError(message, field="image")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        message = f"is {width} x {height} pixels; one side is over {MAX_ASPECT_RATIO} x the other"
        raise InvalidInputError(message, field="image")


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB, in sRGB if the image says which colours it means."""
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow's own conversion clips
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        message = "must have 8 or 16 bits a channel"
        raise UnsupportedMediaError(message, field="image")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        white.info = image.info
        image = Image.alpha_composite(white, layer)
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "RGBA", "CMYK"):
        with suppress(ImageCms.PyCMSError, OSError):  # a profile that cannot be read says nothing
            image = _in_srgb(image.convert("RGB") if image.mode == "RGBA" else image, profile)
    return image.convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "sRGB" in (ImageCms.getProfileDescription(source) or ""):
        return image
    converted = ImageCms.profileToProfile(
        image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert converted is not None
    return converted


def _decode(
    file: BinaryIO, start_seconds: float, wanted_seconds: float
) -> tuple[NDArray[np.float32], int]:
    """(channels, samples) of one or two channels from the start on, and their rate in Hz."""
    parts: list[NDArray[np.float32]] = []
    position = num_kept = 0  # samples
    with av.open(file, "r", options=AUDIO_OPTIONS, metadata_errors="replace") as container:
        frames = _frames(container)
        first = next(frames, None)
        if first is None:
            raise UnsupportedMediaError("holds no sound", field="audio")
        rate_hz = first.sample_rate
        if rate_hz not in SOURCE_RATES_HZ:
            raise UnsupportedMediaError(f"has a sample rate of {rate_hz} Hz", field="audio")
        layout = first.layout if first.layout.nb_channels <= 2 else "stereo"
        as_float = av.AudioResampler(format="fltp", layout=layout)  # int16 exactly as value / 32768
        start, num_wanted = round(start_seconds * rate_hz), round(wanted_seconds * rate_hz)
        for frame in itertools.chain([first], frames):
            skip = max(start - position, 0)
            position += frame.samples
            if skip >= frame.samples:
                continue
            for converted in as_float.resample(frame):
                samples = converted.to_ndarray().astype(np.float32, copy=False)  # (channels, N)
                part = samples[:, skip : skip + num_wanted - num_kept]
                parts.append(part)
                num_kept += part.shape[1]
            if num_kept >= num_wanted:
                break
    if not parts:
        message = f"the recording ends after {position / rate_hz:.2f} s"
        raise InvalidInputError(message, field="audio_start_seconds")
    return np.concatenate(parts, axis=1), rate_hz


def _frames(container: InputContainer) -> Iterator[av.AudioFrame]:
    """The frames of the main audio stream; a damaged packet among whole ones is left out."""
    stream = container.streams.best("audio")
    if not isinstance(stream, AudioStream):
        return
    for packet in container.demux(stream):
        try:
            frames = stream.decode(packet)
        except av.error.InvalidDataError:
            continue
        yield from frames


def _resample(samples: NDArray[np.float32], rate_hz: int, new_rate_hz: int) -> NDArray[np.float32]:
    """(N,) or (N, channels) at the new rate, ceil(N * new / old) long as librosa makes it.

    Source: librosa.resample with its default "soxr_hq", which the speech encoder's training and
    the reference use.
    """
    if rate_hz == new_rate_hz:
        return samples
    num_samples = -(-len(samples) * new_rate_hz // rate_hz)
    resampled = soxr.resample(samples, rate_hz, new_rate_hz, quality="HQ")[:num_samples]
    padding = [(0, num_samples - len(resampled))] + [(0, 0)] * (samples.ndim - 1)
    return np.pad(resampled, padding)


def _recording(samples: NDArray[np.float32], rate_hz: int) -> AudioSegment:
    new_rate_hz = min(rate_hz, MAX_RECORDING_RATE_HZ)
    interleaved = _resample(np.ascontiguousarray(samples.T), rate_hz, new_rate_hz)  # (N, channels)
    quantised = np.rint(interleaved * 32768).clip(-32768, 32767).astype("<i2")
    return AudioSegment(
        quantised.tobytes(), sample_width=2, frame_rate=new_rate_hz, channels=samples.shape[0]
    )
