"""Recordings as the tests make them, and what an independent decoder hears in a file."""

import io
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]  # (channels, num_samples)


def voice(seconds: float, rate_hz: int, channels: int = 1, seed: int = 0) -> Samples:
    """Something like a voice, which sounds like itself at one place only.

    A pitch that glides at random under formants, in syllables at random; each channel has the voice
    at a level of its own.
    """
    choice = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    knots = np.linspace(0, max(seconds, 0.1), max(int(seconds * 6), 2))
    pitch = np.interp(time, knots, choice.uniform(90, 220, len(knots)))
    loudness = np.interp(time, knots, choice.uniform(0.1, 1.0, len(knots)))
    phase = 2 * np.pi * np.cumsum(pitch) / rate_hz
    sound = np.zeros_like(time)
    for harmonic in range(1, 14):
        formant = np.exp(-(((harmonic * pitch - 600) / 500) ** 2)) + 0.3 / harmonic
        sound += formant * np.sin(harmonic * phase + harmonic)
    sound = 0.4 * loudness * sound / max(np.abs(sound).max(initial=0), 1e-9)
    return np.stack([sound * level for level in np.linspace(1, 0.6, channels)]).astype(np.float32)


def write(
    samples: Samples | Sequence[tuple[float, Samples]],
    rate_hz: int,
    container: str = "wav",
    codec: str = "pcm_s16le",
    layout: str | None = None,
    *,
    picture_seconds: float = 0.0,
    options: dict[str, str] | None = None,
) -> bytes:
    """A file with the samples: all from its beginning on, or pieces at places in seconds.

    Args:
        picture_seconds: how long a video beside them is.
        options: of the container.
    """
    pieces = [(0.0, samples)] if isinstance(samples, np.ndarray) else list(samples)
    layout = layout or {1: "mono", 2: "stereo", 6: "5.1"}[len(pieces[0][1])]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options or {}) as output:
        sound = output.add_stream(codec, rate=rate_hz, options={"strict": "experimental"})
        assert isinstance(sound, av.AudioStream)
        sound.layout = layout
        if picture_seconds:
            _add_picture(output, picture_seconds)
        for start, piece in pieces:
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(piece.T).reshape(1, -1), format="flt", layout=layout
            )
            frame.sample_rate, frame.time_base = rate_hz, Fraction(1, rate_hz)
            frame.pts = round(start * rate_hz)
            output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
    return buffer.getvalue()


def _add_picture(output: Any, seconds: float) -> None:
    video = output.add_stream("libx264", rate=25)
    video.width = video.height = 64
    for index in range(round(seconds * 25)):
        frame = av.VideoFrame(64, 64, "yuv420p")
        frame.pts, frame.time_base = index, Fraction(1, 25)
        output.mux(video.encode(frame))
    output.mux(video.encode(None))


def as_ffmpeg_hears(path: Path, channels: int = 1, rate_hz: int = 16_000) -> Samples:
    """The file's sound by the system's ffmpeg, (num_samples,); holes filled with silence.

    The mean of one or two channels; surround sound is mixed to stereo first, as the worker does.
    """
    channels = min(channels, 2)
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-map", "0:a:0"]
    command += ["-af", "aresample=async=1:first_pts=0", "-ac", str(channels)]
    command += ["-ar", str(rate_hz), "-f", "s16le", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    samples = np.frombuffer(done.stdout, "<i2").reshape(-1, channels).astype(np.float32) / 32768
    return np.asarray(samples.mean(axis=1))


def lag_seconds(heard: Samples, expected: Samples, rate_hz: int = 16_000) -> float:
    """How much later what was heard is than what was expected."""
    size = 2 ** int(np.ceil(np.log2(len(heard) + len(expected))))
    spectrum = np.fft.rfft(heard, size) * np.conj(np.fft.rfft(expected, size))
    lag = int(np.argmax(np.fft.irfft(spectrum)))
    return (lag if lag < size // 2 else lag - size) / rate_hz


def likeness_db(heard: Samples, expected: Samples) -> float:
    """Level of what was expected above the difference, at the best lag and over the shorter one."""
    lag = round(lag_seconds(heard, expected) * 16_000)
    heard, expected = heard[max(lag, 0) :], expected[max(-lag, 0) :]
    length = min(len(heard), len(expected))
    difference = heard[:length] - expected[:length]
    error = max(float(np.square(difference).sum()), 1e-12)
    return float(10 * np.log10(np.square(expected[:length]).sum() / error))
