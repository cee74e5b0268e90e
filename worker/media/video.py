"""Frames and sound to a file for the web, its index in front."""

import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.container import OutputContainer
from av.packet import Packet
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from numpy.typing import NDArray
from PIL import Image

from avatar_client.contract.job_errors import EncodeError, ResultTooLargeError
from worker.atomic_file import atomic_write
from worker.media.encoding import (
    CONTAINER_OPTIONS,
    SOUND_BITS_PER_SECOND,
    Encoding,
    add_picture,
    add_sound,
    layout,
)
from worker.media.provenance import SOURCE_TYPE, Provenance

if TYPE_CHECKING:
    from pydub import AudioSegment

H264 = Encoding()
ROOM = 0.85  # of a limited file, for the streams; x264 may be a second's worth over its limit
MIN_PICTURE_BITS_PER_SECOND = 100_000


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A finished video and what is known about it."""

    path: Path
    num_frames: int
    duration_seconds: float  # of the picture
    size_bytes: int
    sha256: str
    provenance: Provenance = "metadata"  # what it says of its making, and who signed that


def write_video(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],  # chunks of (F, H, W, 3), RGB
    *,
    fps: float,
    height: int,
    width: int,
    recording: "AudioSegment",
    metadata: Mapping[str, str],
    encoding: Encoding = H264,
    mark: Callable[[Path], Provenance] | None = None,
    max_bytes: int | None = None,
) -> VideoFile:
    """A video at `path`; frames are encoded as they come, and nothing stays behind on failure.

    Whatever `frames` raises (a cancelled job, a fault of the GPU) comes out unchanged.

    Args:
        metadata: facts that the file's comment names, after "AI-generated".
        mark: adds to the finished file what it says of its making, and tells what it could add.
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
        with atomic_write(path) as unfinished:
            with _output(unfinished, encoding) as container:
                facts = "; ".join(f"{name}: {value}" for name, value in metadata.items())
                container.metadata["comment"] = f"AI-generated; {facts}"
                if encoding.container == "webm":  # which has no place for XMP
                    container.metadata["DIGITAL_SOURCE_TYPE"] = SOURCE_TYPE
                limit = _picture_limit(max_bytes, recording) if max_bytes else None
                picture = add_picture(container, encoding, rate, height, width, limit)
                sound = add_sound(container, encoding, recording.frame_rate, recording.channels)
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
            provenance = mark(unfinished) if mark is not None else "metadata"
    except av.FFmpegError as error:
        raise EncodeError("the video could not be encoded") from error
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return VideoFile(
        path, num_frames, float(num_frames / rate), path.stat().st_size, sha256, provenance
    )


def write_thumbnail(frame: NDArray[np.uint8], path: Path, xmp: bytes = b"") -> None:
    """A jpeg of one (H, W, 3) RGB frame at `path`, with that XMP."""
    content = io.BytesIO()  # on a full disk Pillow itself leaves a cut file and says nothing
    Image.fromarray(frame).save(content, "JPEG", quality=90, optimize=True, xmp=xmp)
    path.write_bytes(content.getvalue())


@contextmanager
def _output(path: Path, encoding: Encoding) -> Iterator[OutputContainer]:
    options = dict(CONTAINER_OPTIONS[encoding.container])
    container = av.open(str(path), "w", format=encoding.container, options=options)
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


def _sound_pieces(recording: "AudioSegment", rate: Fraction) -> Iterator[av.AudioFrame]:
    """The recording in pieces as long as a frame of the picture."""
    samples = np.frombuffer(recording.raw_data, "<i2").reshape(-1, recording.channels)
    for index in itertools.count():
        start, end = (round(i * recording.frame_rate / rate) for i in (index, index + 1))
        if start >= len(samples):
            return
        packed = samples[start:end].reshape(1, -1)  # (1, N * channels)
        piece = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout(recording.channels))
        piece.sample_rate = recording.frame_rate
        piece.pts, piece.time_base = start, Fraction(1, recording.frame_rate)
        yield piece
