"""Which channels of a recording the model hears, and whether there is a voice in it at all.

Rules on level and pitch, whose thresholds lie far from the voices, noises and mixes of the tests.
They warn and refuse nothing.
"""

import numpy as np
from numpy.typing import NDArray

from worker.shapes import SAMPLE_RATE_HZ

# Of the loudest channel's level. Two voices that have nothing in common give 0.7, a voice in one
# channel alone 0.5; less than a third means that the channels cancel each other.
MIN_MEAN_LEVEL = 0.35
SILENT_LEVEL = 1e-4  # of full scale: -80 dB, below the noise of any microphone
FRAME_SAMPLES, HOP_SAMPLES = 640, 320  # 40 and 20 ms
BAND_HZ = 4000  # where a voice has its harmonics
PITCH = slice(2 * BAND_HZ // 400, 2 * BAND_HZ // 70)  # of the cepstrum: 70 to 400 Hz
VOICED_PEAK = 0.35  # of the cepstrum there; white to red noise exceeds it in a frame of a hundred
MIN_VOICED_SHARE = 0.03  # of the frames with sound; speech has a half, in as loud noise a twentieth
MAX_FRAMES = 5000  # that are looked at; spread over a longer recording


def mix_for_model(samples: NDArray[np.float32]) -> tuple[NDArray[np.float32], list[str]]:
    """One channel (num_samples,) of one or two (channels, num_samples), and what to tell the user.

    The mean, as the reference takes it, unless the channels cancel each other in it.
    """
    mean = samples.mean(axis=0)
    levels = [_level(channel) for channel in samples]
    loudest = int(np.argmax(levels))
    if _level(mean) >= MIN_MEAN_LEVEL * levels[loudest]:
        return mean, []
    side = ("left", "right")[loudest]
    warning = f"the channels of the recording cancel each other; the {side} one drives the face"
    return samples[loudest], [warning]


def voice_warnings(waveform: NDArray[np.float32]) -> list[str]:
    """What to tell the user of a waveform (num_samples,) at 16 kHz without a voice in it."""
    if _level(waveform) < SILENT_LEVEL:
        return ["the recording is silent"]
    if _voiced_share(waveform) < MIN_VOICED_SHARE:
        return ["no voice was found in the recording, only noise"]
    return []


def _level(samples: NDArray[np.float32]) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0


def _voiced_share(waveform: NDArray[np.float32]) -> float:
    """How many of the frames with sound in them have a pitch, by a peak of their cepstrum."""
    padded = np.pad(waveform, (0, max(FRAME_SAMPLES - len(waveform), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME_SAMPLES)[::HOP_SAMPLES]
    windowed = frames[:: -(-len(frames) // MAX_FRAMES)] * np.hanning(FRAME_SAMPLES)
    energies = np.square(windowed).sum(axis=1)
    sounding = windowed[energies > 1e-4 * energies.max()]
    spectrum = np.square(np.abs(np.fft.rfft(sounding, 2 * FRAME_SAMPLES, axis=1)))
    spectrum = spectrum[:, : 2 * FRAME_SAMPLES * BAND_HZ // SAMPLE_RATE_HZ]
    floor = 1e-12 * spectrum.max(axis=1, keepdims=True)
    cepstrum = np.fft.irfft(np.log(spectrum + floor), axis=1)
    return float(np.mean(cepstrum[:, PITCH].max(axis=1) > VOICED_PEAK))
