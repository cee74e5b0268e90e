"""Where in a recording somebody speaks: without the long silence at its ends.

A rule on energy, whose threshold lies between the noise and the voice of the recording itself, so
that neither a quiet voice nor a noisy room moves it. docs/decisions/silence.md has how it compares
with a trained detector.
"""

import numpy as np
from numpy.typing import NDArray

FRAME_SECONDS = 0.02
BAND_HZ = (100.0, 4000.0)  # where voices have their energy, without hum and hiss
FLOOR_PERCENTILE = 10.0  # of the frames: what the pauses sound like
LOUD_FRAMES = 10  # the loudest tell the voice's level
SHARE = 0.4  # of the way from the pauses up to the voice
DEEPEST_DB = 45.0  # below the voice, nothing counts
LEAST_CONTRAST_DB = 6.0  # with less, nobody can tell a pause from speech: nothing is cut
LEAST_FRAMES = 3  # in a row: what is shorter is a click
LEAD_SECONDS, TAIL_SECONDS = 0.25, 0.4  # that stay: soft consonants, and a breath
SILENT_DB = -100.0  # of full scale


def spoken_part(samples: NDArray[np.float32], rate_hz: int) -> tuple[int, int]:
    """First and last sample (exclusive) of (channels, num_samples) that are kept.

    All of them where there is no silence to tell, or no voice.
    """
    num_samples = samples.shape[1]
    frame = round(FRAME_SECONDS * rate_hz)
    levels = _levels_db(samples, rate_hz, frame)
    if len(levels) <= LOUD_FRAMES:
        return 0, num_samples
    floor = max(float(np.percentile(levels, FLOOR_PERCENTILE)), SILENT_DB)
    voice = float(np.sort(levels)[-LOUD_FRAMES])
    if voice - floor < LEAST_CONTRAST_DB:
        return 0, num_samples
    threshold = max(floor + SHARE * (voice - floor), voice - DEEPEST_DB)
    is_loud = np.lib.stride_tricks.sliding_window_view(levels > threshold, LEAST_FRAMES).all(axis=1)
    runs = np.flatnonzero(is_loud)
    if not len(runs):
        return 0, num_samples
    first = runs[0] * frame - round(LEAD_SECONDS * rate_hz)
    last = (runs[-1] + LEAST_FRAMES) * frame + round(TAIL_SECONDS * rate_hz)
    return max(int(first), 0), min(int(last), num_samples)


def _levels_db(samples: NDArray[np.float32], rate_hz: int, frame: int) -> NDArray[np.float64]:
    """Of each frame, in the band of voices, of the loudest channel."""
    num_frames = samples.shape[1] // frame
    framed = samples[:, : num_frames * frame].reshape(len(samples), num_frames, frame)
    spectrum = np.fft.rfft(framed * np.hanning(frame).astype(np.float32), axis=2)
    frequencies = np.fft.rfftfreq(frame, 1 / rate_hz)
    in_band = (frequencies >= BAND_HZ[0]) & (frequencies <= BAND_HZ[1])
    energies = np.square(np.abs(spectrum[:, :, in_band])).sum(axis=2).max(axis=0) / frame**2
    levels: NDArray[np.float64] = 10 * np.log10(energies + 10 ** (SILENT_DB / 10))
    return levels
