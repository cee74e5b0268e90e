"""The encoders of picture and sound, and how each is told of quality and limits.

A face is looked at closely: smooth skin shows bands, and fine hair smears when the head moves, long
before the rest of a picture suffers. So each default keeps most of a portrait's grain, at a rate
that a phone can load. Rates were measured with a moving, grainy portrait at 704 x 704, 25 frames a
second; the time is that of two cores, in H.264's.

    libx264 medium     crf 17 8.3 Mbit/s 38.1 dB, 20 2.3 Mbit/s 36.9 dB, 23 0.5 Mbit/s 36.7 dB   1.0
    libx265 fast       crf 17 4.4 Mbit/s 37.7 dB, 19 2.1 Mbit/s 37.2 dB, 23 0.4 Mbit/s 36.8 dB   1.3
    libvpx-vp9 4       crf 20 3.1 Mbit/s 37.5 dB, 24 2.2 Mbit/s 37.3 dB, 28 0.6 Mbit/s 37.0 dB   2.3
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import av
from av.audio.stream import AudioStream
from av.codec.codec import UnknownCodecError
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream

from avatar_client.contract.formats import FORMATS, Codec, Container

CRF_OF_DOUBLE = 3  # steps of quality that double the rate; less for what is not grain
GOP_SECONDS = 2  # a player can seek to within this
SOUND_BITS_PER_SECOND = 128_000  # a channel; beyond it neither AAC nor Opus gains anything


@dataclass(frozen=True, slots=True)
class PictureEncoder:
    """One of FFmpeg's encoders, with the settings that are the same for every video."""

    name: str
    quality: int  # crf, where the client names none
    options: Mapping[str, str]
    tag: str | None = None  # of the stream; None: the container's own


PICTURE_ENCODERS: Mapping[Codec, PictureEncoder] = {
    # Preset slow takes 2.5 times as long as medium and saves nothing.
    "h264": PictureEncoder("libx264", 17, {"preset": "medium", "profile": "high"}),
    # Apple's players know the tag hvc1 alone. The encoder's own log would fill the worker's.
    "hevc": PictureEncoder(
        "libx265", 19, {"preset": "fast", "x265-params": "log-level=error"}, "hvc1"
    ),
    "vp9": PictureEncoder("libvpx-vp9", 24, {"deadline": "good", "cpu-used": "4", "row-mt": "1"}),
}
SOUND_ENCODERS: Mapping[Container, str] = {"mp4": "aac", "webm": "libopus"}
# The index stands before the media, so that a player need not read the end first.
CONTAINER_OPTIONS: Mapping[Container, Mapping[str, str]] = {
    "mp4": {"movflags": "+faststart"},
    "webm": {"cues_to_front": "1", "fflags": "+bitexact"},  # else it is given a random id
}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a video is encoded."""

    container: Container = "mp4"
    codec: Codec = "h264"
    quality: int = PICTURE_ENCODERS["h264"].quality  # crf

    @classmethod
    def of(cls, container: Container, codec: Codec | None, quality: int | None) -> "Encoding":
        """As the request says it; None is the default."""
        codec = codec or FORMATS[container].codecs[0]
        return cls(container, codec, quality or PICTURE_ENCODERS[codec].quality)

    @property
    def rate(self) -> float:
        """At most how many times as large a file is as at the default quality."""
        steps = PICTURE_ENCODERS[self.codec].quality - self.quality
        return math.pow(2, max(steps, 0) / CRF_OF_DOUBLE)


def add_picture(
    container: OutputContainer,
    encoding: Encoding,
    rate: Fraction,
    height: int,
    width: int,
    max_bits_per_second: int | None,
) -> VideoStream:
    """A stream of the container that takes yuv420p frames in BT.709."""
    encoder = PICTURE_ENCODERS[encoding.codec]
    options = {**encoder.options, "crf": str(encoding.quality)}
    if max_bits_per_second is not None:
        options |= {"maxrate": str(max_bits_per_second), "bufsize": str(max_bits_per_second)}
    stream = container.add_stream(encoder.name, rate=rate, options=options)
    assert isinstance(stream, VideoStream)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    context = stream.codec_context
    if encoder.name == "libvpx-vp9":
        # constant quality, or with a rate as good as it can be within that
        context.bit_rate = max_bits_per_second or 0
    if encoder.tag is not None:
        context.codec_tag = encoder.tag
    context.gop_size = round(GOP_SECONDS * rate)
    context.thread_count = 0  # as many as there are cores
    # without these tags players guess, and guess BT.601 for small pictures: faces turn green
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    return stream


def add_sound(
    container: OutputContainer, encoding: Encoding, rate_hz: int, channels: int
) -> AudioStream:
    """A stream at the recording's own rate, or at the next that the encoder has."""
    name = SOUND_ENCODERS[encoding.container]
    rates_hz = av.Codec(name, "w").audio_rates or []
    stream = container.add_stream(name, rate=min(rate for rate in rates_hz if rate >= rate_hz))
    assert isinstance(stream, AudioStream)
    stream.layout = layout(channels)
    stream.bit_rate = SOUND_BITS_PER_SECOND * channels
    return stream


def layout(channels: int) -> str:
    """FFmpeg's name for so many channels."""
    return "mono" if channels == 1 else "stereo"


def encoder_names() -> list[str]:
    """FFmpeg's names of all encoders that a request may ask for."""
    return [*(each.name for each in PICTURE_ENCODERS.values()), *SOUND_ENCODERS.values()]


def check_encoders() -> None:
    """Returns if the encoders are there.

    Raises:
        RuntimeError: one is missing; names it.
    """
    for name in encoder_names():
        try:
            av.Codec(name, "w")
        except UnknownCodecError as error:
            raise RuntimeError(f"PyAV was built without the encoder {name}") from error
