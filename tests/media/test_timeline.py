"""Several recordings on one clock: what each voice is, and what is heard of all of them."""

from typing import Any

import numpy as np
import pytest

from tests.support.recordings import voice
from worker.media.inputs import AudioSegment, Speech
from worker.media.timeline import LOUDEST, PlacedSpeech, Soundtrack


def speech(
    seconds: float = 0.5,
    rate_hz: int = 16_000,
    channels: int = 1,
    level: float = 1.0,
    seed: int = 0,
) -> Speech:
    samples = voice(seconds, rate_hz, channels, seed)
    samples *= level / np.abs(samples).max()
    quantised = (samples.T * 32767).astype("<i2")
    segment = AudioSegment(
        quantised.tobytes(), sample_width=2, frame_rate=rate_hz, channels=channels
    )
    waveform = voice(seconds, 16_000, seed=seed)[0]
    return Speech(segment, waveform)


def heard(track: Soundtrack) -> Any:
    """(num_samples, channels) in [-1, 1]."""
    samples = np.frombuffer(track.recording.raw_data, "<i2")
    return samples.reshape(-1, track.recording.channels) / 32768


def test_one_voice_alone_is_what_was_recorded() -> None:
    alone = speech(level=1.0, channels=2, rate_hz=44_100)
    track = Soundtrack.of([PlacedSpeech(alone)])
    assert track.recording is alone.recording
    assert np.array_equal(track.waveforms[0], alone.waveform)


def test_one_voice_that_begins_later_is_the_same_after_silence() -> None:
    alone = speech(channels=2)
    track = Soundtrack.of([PlacedSpeech(alone, 0.25)])
    assert track.recording.raw_data == bytes(4000 * 4) + alone.recording.raw_data
    assert not track.waveforms[0][:4000].any()
    assert np.array_equal(track.waveforms[0][4000:], alone.waveform)


def test_each_voice_is_heard_at_its_own_place_and_silent_elsewhere() -> None:
    first, second = speech(0.5, level=0.3), speech(0.7, level=0.3, seed=1)
    track = Soundtrack.of([PlacedSpeech(first, 0.1), PlacedSpeech(second, 0.9)])
    assert track.duration_seconds == pytest.approx(1.6)
    assert [len(waveform) for waveform in track.waveforms] == [25_600, 25_600]
    for waveform, each, start in zip(track.waveforms, (first, second), (1600, 14_400), strict=True):
        end = start + len(each.waveform)
        assert np.array_equal(waveform[start:end], each.waveform)
        assert not waveform[:start].any()
        assert not waveform[end:].any()
    sound = heard(track)[:, 0]
    assert np.array_equal(sound[1600:9600], np.frombuffer(first.recording.raw_data, "<i2") / 32768)
    assert not sound[9600:14_400].any()


def test_voices_that_would_clip_together_are_quieter_as_a_whole() -> None:
    loud = [speech(0.5, level=1.0), speech(0.5, level=1.0), speech(0.5, 48_000, level=1.0)]
    sound = heard(Soundtrack.of([PlacedSpeech(each) for each in loud]))
    assert np.abs(sound).max() == pytest.approx(LOUDEST, abs=1e-3)
    quiet = [speech(0.5, level=0.2), speech(0.5, level=0.2, seed=1)]
    parts = [np.frombuffer(each.recording.raw_data, "<i2") / 32768 for each in quiet]
    together = heard(Soundtrack.of([PlacedSpeech(each) for each in quiet]))[:, 0]
    assert np.abs(together - sum(parts)).max() <= 1 / 32768  # as loud as they were


def test_recordings_of_several_rates_and_channels_become_the_best_of_them() -> None:
    left, right = speech(0.5, 44_100, channels=2, level=0.3), speech(0.5, 8_000, level=0.3, seed=1)
    track = Soundtrack.of([PlacedSpeech(left), PlacedSpeech(right, 0.5)])
    assert (track.recording.frame_rate, track.recording.channels) == (44_100, 2)
    original = np.frombuffer(left.recording.raw_data, "<i2").reshape(-1, 2) / 32768
    sound = heard(track)
    assert np.abs(sound[: len(original)] - original).max() <= 1 / 32768  # its channels stay apart
    mono = sound[len(original) + 100 : -100]
    assert np.array_equal(mono[:, 0], mono[:, 1])
    assert np.abs(mono).max() == pytest.approx(0.3, abs=0.05)


def test_a_warning_says_whose_recording_it_is_where_there_are_several() -> None:
    silent = Speech(speech().recording, speech().waveform, ("the recording is silent",))
    alone = Soundtrack.of([PlacedSpeech(silent)])
    assert alone.warnings == ("the recording is silent",)
    several = Soundtrack.of([PlacedSpeech(each) for each in (silent, speech(), silent)])
    assert several.warnings == ("speakers.0, speakers.2: the recording is silent",)
