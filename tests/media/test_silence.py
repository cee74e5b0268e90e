"""Long silence at both ends of a recording is found, in quiet and in noisy ones."""

from pathlib import Path

import numpy as np
import pytest

from worker.media import recording, silence

RATE_HZ = 16_000
TALKING = Path(__file__).parents[1] / "data" / "talking"
PAUSE = 2 * RATE_HZ


def speech() -> np.ndarray:
    with (TALKING / "english.ogg").open("rb") as file:
        sound = recording.decode(file, 0.0, 6.0)
    return recording.resample(sound.samples.mean(axis=0), sound.rate_hz, RATE_HZ)


@pytest.mark.parametrize("snr_db", [None, 20.0, 5.0], ids=["clean", "noisy", "loud noise"])
@pytest.mark.parametrize("gain", [1.0, 0.01], ids=["loud", "quiet"])
def test_what_lies_around_the_speech_is_cut_and_none_of_the_speech(
    snr_db: float | None, gain: float
) -> None:
    spoken = speech()
    samples = np.pad(spoken, PAUSE)
    if snr_db is not None:
        noise = np.random.default_rng(0).standard_normal(len(samples))
        samples = samples + noise * spoken.std() * 10 ** (-snr_db / 20)
    first, last = silence.spoken_part((gain * samples)[None].astype(np.float32), RATE_HZ)
    # no more than the lead and the tail, and what is soft in the recording itself
    assert PAUSE - 0.3 * RATE_HZ <= first <= PAUSE + 0.15 * RATE_HZ
    assert PAUSE + len(spoken) - 0.5 * RATE_HZ <= last <= PAUSE + len(spoken) + 0.45 * RATE_HZ


def test_a_pause_inside_stays() -> None:
    half = speech()[: 2 * RATE_HZ]
    samples = np.concatenate([half, np.zeros(3 * RATE_HZ, np.float32), half])
    first, last = silence.spoken_part(samples[None], RATE_HZ)
    assert last - first > len(samples) - RATE_HZ


@pytest.mark.parametrize("level", [0.0, 0.1], ids=["silence", "noise"])
def test_where_nobody_speaks_nothing_is_cut(level: float) -> None:
    noise = np.random.default_rng(0).standard_normal((2, 3 * RATE_HZ)).astype(np.float32)
    assert silence.spoken_part(level * noise, RATE_HZ) == (0, 3 * RATE_HZ)


def test_a_click_is_no_voice_and_a_moment_is_kept_whole() -> None:
    samples = np.pad(speech()[: 2 * RATE_HZ], PAUSE)
    samples[RATE_HZ // 2 : RATE_HZ // 2 + 80] = 0.9
    first, _ = silence.spoken_part(samples[None], RATE_HZ)
    assert first > RATE_HZ
    assert silence.spoken_part(samples[None, :1600], RATE_HZ) == (0, 1600)
