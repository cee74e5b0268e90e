"""A recording as a player plays it: the frames of its sound on one clock.

What a file says of itself as a whole is not believed. Rate, channels and format are those of each
frame, since glued files and broadcasts change them midway. Where the timestamps leave a hole (a
pause of the recorder, lost packets, a track that begins late), there is silence, as in a player.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
import soxr
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from avatar_client.contract.job_errors import InvalidInputError, UnsupportedMediaError

SOURCE_RATES_HZ = range(4_000, 192_001)

# Containers whose sound lies in the file itself. Playlists (hls, concat, dash, sdp, ...) name other
# files and addresses, which ffmpeg would open.
AUDIO_FORMATS = (
    "aac,ac3,eac3,aiff,amr,ape,asf,au,avi,caf,dts,flac,flv,mp3,mpeg,mpegts,matroska,webm,"
    "mov,mp4,m4a,3gp,3g2,mj2,ogg,tta,voc,w64,wav,wv"
)
OPTIONS = {"format_whitelist": AUDIO_FORMATS, "protocol_whitelist": "none"}

# Formats whose timestamps are their own; in any other ffmpeg counts the frames.
TIMED_FORMATS = {"mov", "matroska", "ogg", "mpegts", "mpeg", "flv", "asf", "avi"}
# Of these, the ones whose clock begins with the file, so that a first sample may come late; the
# clock of the others (a broadcast, a part of a stream) begins anywhere.
ZERO_BASED_FORMATS = {"mov", "matroska"}
LATEST_START_SECONDS = 60.0  # a first sample that comes later tells of another clock
HOLE_SECONDS = 0.015  # less is rounding: Matroska and FLV count milliseconds
# A jump that is no hole but another clock. ffmpeg's own limits: a broadcast's clock may jump.
LONGEST_HOLE_SECONDS = {"mpegts": 10.0, "mpeg": 10.0, "ogg": 10.0}
LONGEST_OTHER_HOLE_SECONDS = 108_000.0

FLOAT_SCALE = np.float32(2.0**-31)


@dataclass(frozen=True, slots=True)
class Sound:
    """Part of a recording.

    Attributes:
        samples: (channels, num_samples) float32, one or two channels, in [-1, 1] unless overdriven.
        rate_hz: of the samples: the highest that the part has.
        silent_seconds: silence in it that fills holes of the recording.
    """

    samples: NDArray[np.float32]
    rate_hz: int
    silent_seconds: float


def decode(file: BinaryIO, start_seconds: float, wanted_seconds: float) -> Sound:
    """The sound from `start_seconds` on, `wanted_seconds` of it at most.

    Decoding stops where the part ends. Of several audio streams the one that ffmpeg would choose is
    taken, if it can be decoded, else the first that can.

    Raises:
        InvalidInputError: the recording ends before the start.
        UnsupportedMediaError: no sound in it, or none that can be decoded.
        av.FFmpegError, ValueError, ...: damaged bytes.
    """
    with av.open(file, "r", options=OPTIONS, metadata_errors="replace") as container:
        indices = _decodable_streams(container)
    for index in indices:
        file.seek(0)
        part = _Part(start_seconds, wanted_seconds)
        with av.open(file, "r", options=OPTIONS, metadata_errors="replace") as container:
            stream = container.streams[index]
            assert isinstance(stream, AudioStream)
            clock = _Clock(container)
            for frame in _frames(container, stream):
                part.add(frame, clock.hole_before(frame))
                if part.is_complete:
                    break
        if part.has_frames:
            return part.sound()
    raise UnsupportedMediaError("holds no sound", field="audio")


def resample(samples: NDArray[np.float32], rate_hz: int, new_rate_hz: int) -> NDArray[np.float32]:
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


def _decodable_streams(container: InputContainer) -> list[int]:
    """Indices of the audio streams that have a decoder, the one to prefer first.

    Raises:
        UnsupportedMediaError: there is sound, but no decoder for any of it.
    """
    streams = [stream for stream in container.streams if stream.type == "audio"]
    # Recent phones add a track of spatial sound (APAC), which nobody else can decode.
    decodable = [stream for stream in streams if stream.codec_context is not None]
    if streams and not decodable:
        message = "its sound is of a codec that cannot be decoded here; export it as AAC or wav"
        raise UnsupportedMediaError(message, field="audio")
    preferred = container.streams.best("audio")
    decodable.sort(key=lambda stream: stream is not preferred)
    return [stream.index for stream in decodable]


def _frames(container: InputContainer, stream: AudioStream) -> Iterator[av.AudioFrame]:
    """The frames of a stream; a damaged packet among whole ones is left out."""
    for packet in container.demux(stream):
        try:
            frames = stream.decode(packet)
        except av.error.InvalidDataError:
            continue
        yield from frames


class _Clock:
    """A player's clock for one stream: where the holes between its frames are."""

    def __init__(self, container: InputContainer) -> None:
        names = set(container.format.name.split(","))
        self._is_timed = bool(names & TIMED_FORMATS)
        limits = [LONGEST_HOLE_SECONDS[name] for name in names & LONGEST_HOLE_SECONDS.keys()]
        self._longest_hole = min(limits, default=LONGEST_OTHER_HOLE_SECONDS)
        start = (container.start_time or 0) / av.time_base
        is_zero_based = names & ZERO_BASED_FORMATS and 0 <= start <= LATEST_START_SECONDS
        self._origin = 0.0 if is_zero_based else start
        self._position = 0.0  # where the frame after the last one begins

    def hole_before(self, frame: av.AudioFrame) -> float:
        """Seconds of silence between the frame and the one before it."""
        hole = 0.0
        if self._is_timed and frame.time is not None:
            hole = frame.time - self._origin - self._position
            if hole < -HOLE_SECONDS or hole > self._longest_hole:
                self._origin += hole  # another clock from here on
                hole = 0.0
            elif hole < HOLE_SECONDS:
                hole = 0.0
        self._position += hole + frame.samples / frame.sample_rate
        return hole


class _Part:
    """The part of a recording from a start on, frame by frame."""

    def __init__(self, start_seconds: float, wanted_seconds: float) -> None:
        self._start = start_seconds
        self._wanted_seconds = wanted_seconds
        self._end = start_seconds + wanted_seconds
        self._position = 0.0  # of the next frame, in seconds
        self._silent_seconds = 0.0
        self._pieces: list[tuple[int, NDArray[np.float32]]] = []  # rate, (channels, samples)
        self._resampler: av.AudioResampler | None = None
        self._resampled_kind: tuple[int, str, str] | None = None
        self.has_frames = False

    @property
    def is_complete(self) -> bool:
        """Whether what follows does not belong to the part."""
        return self._position >= self._end

    def add(self, frame: av.AudioFrame, hole_seconds: float) -> None:
        """The next frame, and the silence before it."""
        rate_hz = frame.sample_rate
        if rate_hz not in SOURCE_RATES_HZ:
            raise UnsupportedMediaError(f"has a sample rate of {rate_hz} Hz", field="audio")
        self.has_frames = True
        if hole_seconds:
            first, last = self._cut(hole_seconds, rate_hz, round(hole_seconds * rate_hz))
            self._pieces.append((rate_hz, np.zeros((1, last - first), np.float32)))
            self._silent_seconds += (last - first) / rate_hz
        first, last = self._cut(frame.samples / rate_hz, rate_hz, frame.samples)
        if last > first:
            self._pieces.append((rate_hz, self._as_float(frame)[:, first:last]))

    def _cut(self, seconds: float, rate_hz: int, num_samples: int) -> tuple[int, int]:
        """The samples to keep of so many that come next; passes them."""
        first = min(max(round((self._start - self._position) * rate_hz), 0), num_samples)
        last = num_samples
        if self._end < math.inf:
            last = min(max(round((self._end - self._position) * rate_hz), first), num_samples)
        self._position += seconds
        return first, last

    def _as_float(self, frame: av.AudioFrame) -> NDArray[np.float32]:
        """(channels, samples), at most two channels; int16 exactly as value / 32768."""
        kind = (frame.sample_rate, frame.layout.name, frame.format.name)
        if self._resampler is None or kind != self._resampled_kind:
            # More channels are mixed in whole numbers, where ffmpeg scales its matrix so that the
            # sum of full channels is not clipped; in floating point it does not.
            surround = frame.layout.nb_channels > 2
            self._resampler = av.AudioResampler(
                format="s32p" if surround else "fltp",
                layout="stereo" if surround else frame.layout,
            )
            self._resampled_kind = kind
        parts = [part.to_ndarray() for part in self._resampler.resample(frame)]
        samples = np.concatenate(parts, axis=1)
        as_float: NDArray[np.float32] = samples.astype(np.float32)  # a copy: the frame's ends
        return as_float * FLOAT_SCALE if samples.dtype == np.int32 else as_float

    def sound(self) -> Sound:
        """All of it, at one rate and with as many channels as any frame has.

        Raises:
            InvalidInputError: nothing came after the start.
        """
        if not self._pieces:
            message = f"the recording ends after {self._position:.2f} s"
            raise InvalidInputError(message, field="audio_start_seconds")
        rate_hz = max(rate for rate, _ in self._pieces)
        num_channels = max(len(samples) for _, samples in self._pieces)
        runs: list[tuple[int, list[NDArray[np.float32]]]] = []  # pieces of one rate in a row
        for rate, samples in self._pieces:
            if not runs or runs[-1][0] != rate:
                runs.append((rate, []))
            shape = (num_channels, samples.shape[1])
            runs[-1][1].append(np.broadcast_to(samples, shape) if len(samples) == 1 else samples)
        parts = [resample(np.concatenate(run, axis=1).T, rate, rate_hz).T for rate, run in runs]
        samples = np.concatenate(parts, axis=1)
        if self._wanted_seconds < math.inf:
            samples = samples[:, : round(self._wanted_seconds * rate_hz)]
        return Sound(np.ascontiguousarray(samples), rate_hz, self._silent_seconds)
