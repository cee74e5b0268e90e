"""Frames and sound to an mp4 for the web: H.264, AAC, index in front."""

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.audio.stream import AudioStream
from av.codec.codec import UnknownCodecError
from av.container import OutputContainer
from av.packet import Packet
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from avatar_client.contract.job_errors import EncodeError, ResultTooLargeError
from worker.atomic_file import atomic_write

if TYPE_CHECKING:
    from pydub import AudioSegment

# A face is looked at closely: smooth skin shows bands, and fine hair smears when the head moves,
# long before the rest of a picture suffers. A grainy portrait at 704 x 704, 25 frames a second:
# crf 14 7.7 Mbit/s 36.8 dB, 17 2.2 Mbit/s 36.2 dB, 20 0.7 Mbit/s 35.6 dB, 23 0.3 Mbit/s 34.9 dB.
# Preset slow takes 2.5 times as long as medium and saves nothing.
PICTURE_OPTIONS = {"crf": "17", "preset": "medium", "profile": "high"}
GOP_SECONDS = 2  # a player can seek to within this
SOUND_BITS_PER_SECOND = 128_000  # a channel; beyond it AAC gains nothing
ROOM = 0.85  # of a limited file, for the streams; x264 may be a second's worth over its limit
MIN_PICTURE_BITS_PER_SECOND = 100_000


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
    max_bytes: int | None = None,
) -> VideoFile:
    """An mp4 at `path`; frames are encoded as they come, and nothing stays behind on failure.

    Whatever `frames` raises (a cancelled job, a fault of the GPU) comes out unchanged.

    Args:
        metadata: facts that the file's comment names, after "AI-generated".
        max_bytes: the largest file that is of use. The picture's bit rate is kept below what fits;
            a file that is larger all the same is an error.

    Raises:
        EncodeError: the encoder or the disk failed.
        ResultTooLargeError: more than `max_bytes`.
        ValueError: frames of another size, an odd size, or no frame at all.
    """
    if height % 2 or width % 2:
        raise ValueError(f"{width} x {height} is odd; yuv420p has one colour for 2 x 2 pixels")
    rate = Fraction(fps).limit_denominator(1000)
    try:
        with atomic_write(path) as unfinished, _mp4(unfinished) as container:
            facts = "; ".join(f"{name}: {value}" for name, value in metadata.items())
            container.metadata["comment"] = f"AI-generated; {facts}"
            limit = _picture_limit(max_bytes, recording) if max_bytes else None
            picture = _picture_stream(container, rate, height, width, limit)
            sound = _sound_stream(container, recording)
            mux = _Muxer(container, max_bytes)
            pieces = _sound_pieces(recording, rate)
            num_frames = 0
            for frame in _picture_frames(frames, rate, height, width):
                mux(picture.encode(frame))
                for piece in itertools.islice(pieces, 1):  # picture and sound side by side
                    mux(sound.encode(piece))
                num_frames += 1
            if num_frames == 0:
                raise ValueError("no frames")
            mux(picture.encode(None))
            for piece in pieces:
                mux(sound.encode(piece))
            mux(sound.encode(None))
    except av.FFmpegError as error:
        raise EncodeError("the video could not be encoded") from error
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return VideoFile(path, num_frames, float(num_frames / rate), path.stat().st_size, sha256)


def write_thumbnail(frame: NDArray[np.uint8], path: Path) -> None:
    """A jpeg of one (H, W, 3) RGB frame at `path`."""
    content = io.BytesIO()  # on a full disk Pillow itself leaves a cut file and says nothing
    Image.fromarray(frame).save(content, "JPEG", quality=90, optimize=True)
    path.write_bytes(content.getvalue())


def check_encoders() -> None:
    """Returns if the encoders are there.

    Raises:
        RuntimeError: one is missing; names it.
    """
    for name in ("libx264", "aac"):
        try:
            av.Codec(name, "w")
        except UnknownCodecError as error:
            raise RuntimeError(f"PyAV was built without the encoder {name}") from error


@contextmanager
def _mp4(path: Path) -> Iterator[OutputContainer]:
    container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
    try:
        yield container
    except BaseException:
        with suppress(av.FFmpegError):  # the end of an unfinished file; the first failure counts
            container.close()
        raise
    container.close()


class _Muxer:
    """Writes packets, up to a size."""

    def __init__(self, container: OutputContainer, max_bytes: int | None) -> None:
        self._container = container
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def __call__(self, packets: "Sequence[Packet[Any]]") -> None:
        self._num_bytes += sum(packet.size for packet in packets)
        if self._max_bytes is not None and self._num_bytes > self._max_bytes:
            message = (
                f"the video is larger than the {self._max_bytes} bytes that can be handed over"
            )
            raise ResultTooLargeError(message, field="output.delivery")
        self._container.mux(packets)


def _picture_limit(max_bytes: int, recording: "AudioSegment") -> int:
    """Bits a second that leave room for the sound and for what is neither picture nor sound."""
    bits_per_second = 8 * ROOM * max_bytes / float(recording.duration_seconds)
    sound = SOUND_BITS_PER_SECOND * int(recording.channels)
    return max(int(bits_per_second - sound), MIN_PICTURE_BITS_PER_SECOND)


def _picture_stream(
    container: OutputContainer,
    rate: Fraction,
    height: int,
    width: int,
    max_bits_per_second: int | None,
) -> VideoStream:
    options = dict(PICTURE_OPTIONS)
    if max_bits_per_second is not None:
        options |= {"maxrate": str(max_bits_per_second), "bufsize": str(max_bits_per_second)}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    context = stream.codec_context
    context.gop_size = round(GOP_SECONDS * rate)
    context.thread_count = 0  # as many as there are cores
    # without these tags players guess, and guess BT.601 for small pictures: faces turn green
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    return stream


def _picture_frames(
    chunks: Iterable[NDArray[np.uint8]], rate: Fraction, height: int, width: int
) -> Iterator[av.VideoFrame]:
    pixels = itertools.chain.from_iterable(chunks)  # (H, W, 3)
    for index, frame in enumerate(pixels):
        if frame.shape != (height, width, 3):
            raise ValueError(f"a frame of shape {frame.shape}, not {(height, width, 3)}")
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        converted = rgb.reformat(
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            dst_colorspace=Colorspace.ITU709,
            # without ACCURATE_RND the colours of the whole picture shift by an eighth of a step
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
        )
        converted.pts, converted.time_base = index, 1 / rate
        yield converted


def _sound_stream(container: OutputContainer, recording: "AudioSegment") -> AudioStream:
    """A stream at the recording's own rate, or at the next that AAC has."""
    rates_hz = av.Codec("aac", "w").audio_rates or []
    rate_hz = min(rate for rate in rates_hz if rate >= recording.frame_rate)
    stream = container.add_stream("aac", rate=rate_hz)
    stream.layout = _layout(recording)
    stream.bit_rate = SOUND_BITS_PER_SECOND * recording.channels
    return stream


def _sound_pieces(recording: "AudioSegment", rate: Fraction) -> Iterator[av.AudioFrame]:
    """The recording in pieces as long as a frame of the picture."""
    samples = np.frombuffer(recording.raw_data, "<i2").reshape(-1, recording.channels)
    for index in itertools.count():
        start, end = (round(i * recording.frame_rate / rate) for i in (index, index + 1))
        if start >= len(samples):
            return
        packed = samples[start:end].reshape(1, -1)  # (1, N * channels)
        piece = av.AudioFrame.from_ndarray(packed, format="s16", layout=_layout(recording))
        piece.sample_rate = recording.frame_rate
        piece.pts, piece.time_base = start, Fraction(1, recording.frame_rate)
        yield piece


def _layout(recording: "AudioSegment") -> str:
    return "mono" if recording.channels == 1 else "stereo"
