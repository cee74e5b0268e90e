"""Recordings of every kind that people send, against what an independent decoder hears."""

import io
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from avatar_client.contract.job_errors import UnsupportedMediaError
from avatar_client.contract.media_source import MediaSource
from avatar_client.contract.request import JobInput
from tests.support.recordings import as_ffmpeg_hears, lag_seconds, likeness_db, voice, write
from worker.media.inputs import Speech, load_speech
from worker.settings import Settings

SETTINGS = Settings(max_audio_seconds=60.0)

FILES = [  # container, codec, sample rates, numbers of channels
    ("wav", "pcm_s16le", (8000, 11_025, 16_000, 44_100, 48_000, 96_000), (1, 2, 6)),
    ("wav", "pcm_s24le", (48_000,), (1, 2)),
    ("wav", "pcm_s32le", (44_100,), (2,)),
    ("wav", "pcm_f32le", (16_000, 192_000), (1,)),
    ("wav", "pcm_f64le", (22_050,), (1,)),
    ("wav", "pcm_u8", (8000,), (1,)),
    ("wav", "pcm_mulaw", (8000,), (1, 2)),
    ("wav", "pcm_alaw", (8000,), (1,)),
    ("wav", "adpcm_ms", (22_050,), (1,)),
    ("w64", "pcm_s16le", (48_000,), (2,)),
    ("aiff", "pcm_s16be", (44_100,), (1, 2)),
    ("au", "pcm_s16be", (16_000,), (1,)),
    ("caf", "pcm_s16be", (44_100,), (2,)),
    ("caf", "alac", (44_100,), (2,)),
    ("mp3", "mp3", (16_000, 22_050, 32_000, 44_100, 48_000), (1, 2)),
    ("adts", "aac", (16_000, 44_100, 48_000), (1, 2)),
    ("ipod", "aac", (8000, 22_050, 44_100, 48_000), (1, 2, 6)),
    ("ipod", "alac", (44_100,), (1, 2)),
    ("mp4", "aac", (44_100,), (1, 2)),
    ("mp4", "libopus", (48_000,), (2,)),
    ("mp4", "mp3", (44_100,), (2,)),
    ("mov", "pcm_s16le", (48_000,), (1, 2)),
    ("mov", "aac", (48_000,), (1,)),
    ("3gp", "aac", (16_000,), (1,)),
    ("ogg", "libopus", (16_000, 48_000), (1, 2, 6)),
    ("ogg", "vorbis", (44_100,), (2,)),
    ("ogg", "flac", (44_100,), (1,)),
    ("webm", "libopus", (48_000,), (1, 2)),
    ("matroska", "flac", (48_000,), (1, 6)),
    ("matroska", "pcm_s16le", (16_000,), (1,)),
    ("matroska", "mp3", (44_100,), (1,)),
    ("flac", "flac", (16_000, 44_100, 96_000), (1, 2)),
    ("wv", "wavpack", (44_100,), (2,)),
    ("tta", "tta", (44_100,), (1,)),
    ("ac3", "ac3", (48_000,), (2, 6)),
    ("eac3", "eac3", (48_000,), (2,)),
    ("avi", "mp3", (44_100,), (2,)),
    ("avi", "pcm_s16le", (22_050,), (1,)),
    ("flv", "aac", (44_100,), (2,)),
    ("mpegts", "aac", (48_000,), (2,)),
    ("mpegts", "mp2", (48_000,), (1,)),
    ("amr", "libopencore_amrnb", (8000,), (1,)),
]
CASES = [
    (container, codec, rate_hz, channels, seconds)
    for container, codec, rates_hz, all_channels in FILES
    for rate_hz in rates_hz
    for channels in all_channels
    for seconds in ((0.35, 2.7) if rate_hz == rates_hz[0] and channels == 1 else (1.9,))
]


@pytest.fixture
def speech(tmp_path: Path) -> Callable[..., Any]:
    """`speech(content)` loads a recording from its bytes."""

    def load(content: bytes, **options: Any) -> Speech:
        return load_speech(MediaSource(content=content), tmp_path, SETTINGS, **options)

    return load


needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg to compare")


@needs_ffmpeg
@pytest.mark.parametrize(("container", "codec", "rate_hz", "channels", "seconds"), CASES)
def test_it_sounds_as_ffmpeg_plays_it(
    speech: Callable[..., Any],
    tmp_path: Path,
    container: str,
    codec: str,
    rate_hz: int,
    channels: int,
    seconds: float,
) -> None:
    path = tmp_path / "recording"
    path.write_bytes(write(voice(seconds, rate_hz, channels), rate_hz, container, codec))

    loaded = speech(path.read_bytes())

    expected = as_ffmpeg_hears(path, channels)
    if container == "matroska" and codec in ("aac", "mp3"):  # older ones play the coder's delay
        expected = expected[round(lag_seconds(expected, voice(seconds, 16_000)[0]) * 16_000) :]
    assert abs(lag_seconds(loaded.waveform, expected)) <= 0.02
    assert likeness_db(loaded.waveform, expected) >= 30
    assert loaded.recording.channels == min(channels, 2)
    assert not loaded.warnings


PROMISED = {  # what the request's description names, and files of it
    "wav": ("wav", "pcm_s16le"),
    "mp3": ("mp3", "mp3"),
    "m4a": ("ipod", "aac"),
    "ogg": ("ogg", "vorbis"),
    "opus": ("ogg", "libopus"),
    "flac": ("flac", "flac"),
    "webm": ("webm", "libopus"),
    "the sound of an mp4": ("mp4", "aac"),
}


def test_what_is_promised_is_among_them() -> None:
    description = str(JobInput.model_fields["audio"].description).removeprefix("The speech: ")
    promised = description.partition(".")[0].replace(", or ", ", ").split(", ")

    assert promised == list(PROMISED)
    assert set(PROMISED.values()) <= {(container, codec) for container, codec, *_ in CASES}
    assert len(CASES) >= 80


# Which stream


def two_tracks(first_is_decodable: bool = True) -> bytes:
    """A film with two tracks of sound, of which one or none is of a codec that anybody knows."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as output:
        tracks = [output.add_stream("aac", rate=48_000) for _ in range(2)]
        for track, channels in zip(tracks, (1, 2), strict=True):
            track.layout = ("mono", "stereo")[channels - 1]
        for track, channels in zip(tracks, (1, 2), strict=True):
            samples = voice(2.0, 48_000, channels)
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples.T).reshape(1, -1), "flt", track.layout.name
            )
            frame.sample_rate, frame.pts = 48_000, 0
            output.mux(track.encode(frame))
            output.mux(track.encode(None))
    content = buffer.getvalue()
    for name, strange in ((b"mp4a", b"apac"), (b"esds", b"dapa")):
        head, _, tail = content.rpartition(name)
        content = head + strange + tail
        if not first_is_decodable:
            content = content.replace(name, strange)
    return content


def test_a_track_that_nobody_can_decode_is_passed_by(speech: Callable[..., Any]) -> None:
    loaded = speech(two_tracks())

    assert loaded.recording.channels == 1
    assert loaded.duration_seconds == pytest.approx(2.0, abs=0.05)


def test_sound_that_nobody_can_decode_is_told_from_none(speech: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedMediaError, match="codec") as caught:
        speech(two_tracks(first_is_decodable=False))

    assert caught.value.field == "audio"


# Facts that change midway


def test_glued_parts_of_other_rates_keep_their_pitch(speech: Callable[..., Any]) -> None:
    def tone(seconds: float, rate_hz: int) -> np.ndarray:
        time = np.arange(round(seconds * rate_hz)) / rate_hz
        return (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)[None]

    parts = [write(tone(2.0, rate), rate, "mp3", "mp3") for rate in (44_100, 48_000, 32_000)]

    loaded = speech(b"".join(parts))

    assert loaded.duration_seconds == pytest.approx(6.0, abs=0.2)
    assert loaded.recording.frame_rate == 48_000
    for start in (8000, 40_000, 72_000):
        part = loaded.waveform[start : start + 16_000] * np.hanning(16_000)
        assert np.argmax(np.abs(np.fft.rfft(part))) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("order", [(2, 1), (1, 2), (2, 1, 2)])
def test_mono_and_stereo_may_follow_each_other(
    speech: Callable[..., Any], order: tuple[int, int, int] | tuple[int, int]
) -> None:
    pieces = [voice(1.0, 44_100, channels, seed) for seed, channels in enumerate(order)]
    content = b"".join(write(piece, 44_100, "mp3", "mp3") for piece in pieces)

    loaded = speech(content)

    assert loaded.recording.channels == 2
    assert loaded.duration_seconds == pytest.approx(len(order), abs=0.05 * len(order))


# Time


TIMED = [("matroska", "pcm_s16le"), ("webm", "libopus"), ("mp4", "aac"), ("matroska", "flac")]


@needs_ffmpeg
@pytest.mark.parametrize(
    ("container", "codec"), [*TIMED, ("mpegts", "aac"), ("flv", "aac"), ("ogg", "libopus")]
)
def test_a_hole_in_the_timestamps_is_silence(
    speech: Callable[..., Any], tmp_path: Path, container: str, codec: str
) -> None:
    rate_hz = 48_000 if codec != "aac" else 44_100
    pieces = [(0.0, voice(1.5, rate_hz, seed=1)), (4.0, voice(2.0, rate_hz, seed=2))]
    path = tmp_path / "recording"
    path.write_bytes(write(pieces, rate_hz, container, codec))

    loaded = speech(path.read_bytes())

    expected = as_ffmpeg_hears(path)
    assert loaded.duration_seconds == pytest.approx(6.0, abs=0.06)
    assert abs(lag_seconds(loaded.waveform, expected)) <= 0.02
    late, late_expected = loaded.waveform[60_000:], expected[60_000:]
    assert abs(lag_seconds(late, late_expected)) <= 0.02
    if container != "ogg":  # whose clock ticks once a page
        assert np.abs(loaded.waveform[30_000:60_000]).max() < 0.02


@pytest.mark.parametrize(("container", "codec"), TIMED)
def test_sound_that_begins_late_stays_late(
    speech: Callable[..., Any], container: str, codec: str
) -> None:
    pieces = [(1.5, voice(2.0, 48_000))]
    content = write(
        pieces, 48_000, container, codec, picture_seconds=0.0 if container == "webm" else 3.0
    )

    loaded = speech(content)

    assert loaded.duration_seconds == pytest.approx(3.5, abs=0.06)
    assert np.abs(loaded.waveform[:23_000]).max() < 0.01
    expected = voice(2.0, 16_000)[0]
    assert lag_seconds(loaded.waveform, expected) == pytest.approx(1.5, abs=0.02)


def test_the_start_is_a_place_on_the_players_clock(speech: Callable[..., Any]) -> None:
    pieces = [(0.0, voice(1.0, 48_000, seed=1)), (3.0, voice(2.0, 48_000, seed=2))]
    content = write(pieces, 48_000, "matroska", "pcm_s16le")

    loaded = speech(content, start_seconds=2.5, max_seconds=1.5)

    assert loaded.duration_seconds == 1.5
    assert np.abs(loaded.waveform[:7900]).max() < 1e-4
    assert np.abs(loaded.waveform[8000:]).max() > 0.1


def test_a_recording_without_a_hole_is_not_touched(speech: Callable[..., Any]) -> None:
    samples = voice(3.0, 16_000)

    loaded = speech(write(samples, 16_000, "matroska", "pcm_s16le"))

    assert len(loaded.waveform) == 48_000
    assert np.abs(loaded.waveform - samples[0]).max() <= 1 / 32767


# What the model hears


def test_channels_that_cancel_each_other_are_not_mixed(speech: Callable[..., Any]) -> None:
    voice_alone = voice(2.0, 16_000)
    content = write(np.concatenate([voice_alone, -voice_alone]), 16_000)

    loaded = speech(content)

    assert np.abs(loaded.waveform - voice_alone[0]).max() < 1e-3
    assert any("cancel" in warning for warning in loaded.warnings)
    assert loaded.recording.channels == 2


def test_a_voice_in_one_channel_alone_is_mixed_as_ever(speech: Callable[..., Any]) -> None:
    voice_alone = voice(2.0, 16_000)
    content = write(np.concatenate([voice_alone, 0 * voice_alone]), 16_000)

    loaded = speech(content)

    assert np.abs(loaded.waveform - voice_alone[0] / 2).max() < 1e-3
    assert not loaded.warnings


@pytest.mark.parametrize(
    ("container", "codec", "rate_hz"),
    [("wav", "pcm_s16le", 48_000), ("ipod", "aac", 48_000), ("matroska", "flac", 48_000)],
)
def test_loud_surround_sound_is_not_clipped(
    speech: Callable[..., Any], container: str, codec: str, rate_hz: int
) -> None:
    time = np.arange(2 * rate_hz) / rate_hz
    loud = np.repeat(0.95 * np.sin(2 * np.pi * 300 * time)[None], 6, axis=0).astype(np.float32)

    loaded = speech(write(loud, rate_hz, container, codec))

    assert np.abs(loaded.waveform).max() < 0.99
    spectrum = np.abs(np.fft.rfft(loaded.waveform[4000:20_000] * np.hanning(16_000)))
    assert 20 * math.log10(spectrum[900] / spectrum[300]) < -50  # clipping would add harmonics


@pytest.mark.parametrize("colour", [-1, 0, 1, 2])
def test_noise_is_told_from_a_voice(speech: Callable[..., Any], colour: int) -> None:
    choice = np.random.default_rng(colour + 1)
    frequency = np.fft.rfftfreq(3 * 16_000, 1 / 16_000)
    shape = np.maximum(frequency, 20.0) ** (-colour / 2)
    spectrum = shape * (choice.normal(size=shape.shape) + 1j * choice.normal(size=shape.shape))
    noise = np.fft.irfft(spectrum)
    samples = (0.5 * noise / np.abs(noise).max()).astype(np.float32)[None]

    assert any("no voice" in warning for warning in speech(write(samples, 16_000)).warnings)


def test_silence_is_told(speech: Callable[..., Any]) -> None:
    loaded = speech(write(np.zeros((1, 32_000), np.float32), 16_000))

    assert loaded.warnings == ("the recording is silent",)
