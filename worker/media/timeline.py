"""Several recordings on the video's clock: each voice apart for the model, all mixed to hear."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker.media import recording
from worker.media.inputs import AudioSegment, Speech
from worker.shapes import SAMPLE_RATE_HZ

# Of full scale, -1 dB: an encoder's result may be a little louder than what it was given.
LOUDEST = 10 ** (-1 / 20)
FULL_SCALE = 32768


@dataclass(frozen=True, slots=True)
class PlacedSpeech:
    """One recording, and when it begins in the video."""

    speech: Speech
    start_seconds: float = 0.0

    @property
    def end_seconds(self) -> float:
        """When it is over."""
        return self.start_seconds + self.speech.duration_seconds

    def padded(self, num_samples: int) -> NDArray[np.float32]:
        """The waveform at 16 kHz with silence around it, so many samples in all."""
        before = round(self.start_seconds * SAMPLE_RATE_HZ)
        return np.pad(
            self.speech.waveform, (before, num_samples - before - len(self.speech.waveform))
        )


@dataclass(frozen=True, slots=True)
class Soundtrack:
    """What is heard in the video, and whom the model hears."""

    voices: tuple[PlacedSpeech, ...]
    recording: AudioSegment  # all of them together; mono or stereo, 16 bit
    waveforms: tuple[NDArray[np.float32], ...]  # of each at 16 kHz, all equally long

    @classmethod
    def of(cls, voices: Sequence[PlacedSpeech]) -> "Soundtrack":
        """The recordings, each at its own place. One alone sounds as it was recorded."""
        num_samples = max(
            round(each.start_seconds * SAMPLE_RATE_HZ) + len(each.speech.waveform)
            for each in voices
        )
        mix = _mix(voices) if len(voices) > 1 else _alone(voices[0])
        return cls(tuple(voices), mix, tuple(each.padded(num_samples) for each in voices))

    @property
    def duration_seconds(self) -> float:
        """Until the last voice has ended."""
        return float(self.recording.frame_count()) / int(self.recording.frame_rate)

    @property
    def warnings(self) -> tuple[str, ...]:
        """For the client; of several voices, each is named by its place in the request."""
        if len(self.voices) == 1:
            return self.voices[0].speech.warnings
        whose: dict[str, list[str]] = {}
        for index, each in enumerate(self.voices):
            for warning in each.speech.warnings:
                whose.setdefault(warning, []).append(f"speakers.{index}")
        return tuple(f"{', '.join(names)}: {warning}" for warning, names in whose.items())


def _alone(voice: PlacedSpeech) -> AudioSegment:
    original = voice.speech.recording
    before = round(voice.start_seconds * original.frame_rate)
    if not before:
        return original
    silence = bytes(before * original.frame_width)
    return original._spawn(silence + original.raw_data)


def _mix(voices: Sequence[PlacedSpeech]) -> AudioSegment:
    """The sum at the highest rate, stereo if any is, quieter as a whole where it would clip."""
    rate_hz = max(each.speech.recording.frame_rate for each in voices)
    channels = max(each.speech.recording.channels for each in voices)
    parts = [(round(each.start_seconds * rate_hz), _samples(each, rate_hz)) for each in voices]
    mix = np.zeros((max(start + len(part) for start, part in parts), channels), np.float32)
    for start, part in parts:
        mix[start : start + len(part)] += part  # one channel is heard in both
    peak = float(np.abs(mix).max(initial=0.0))
    if peak > LOUDEST:
        mix *= LOUDEST / peak
    quantised = np.rint(mix * FULL_SCALE).astype("<i2")
    return AudioSegment(quantised.tobytes(), sample_width=2, frame_rate=rate_hz, channels=channels)


def _samples(voice: PlacedSpeech, rate_hz: int) -> NDArray[np.float32]:  # (num_samples, channels)
    original = voice.speech.recording
    samples = np.frombuffer(original.raw_data, "<i2").reshape(-1, original.channels)
    scaled = samples.astype(np.float32) / np.float32(FULL_SCALE)
    return recording.resample(scaled, original.frame_rate, rate_hz)
