import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training import audio_encoder, speech
from training.speech import SpeechCorpus, formant_speech, mouth_track, state_track

RATE_HZ = 16_000


def vowel(formants_hz: Any, seconds: float = 1.0) -> Any:
    """A steady vowel of harmonics of 120 Hz, loud where a formant is."""
    times = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    tones_hz = np.arange(120, 6000, 120)
    gains = sum(1 / (1 + ((tones_hz - formant_hz) / 100) ** 2) for formant_hz in formants_hz)
    tones = gains[:, None] * np.sin(2 * np.pi * tones_hz[:, None] * times)
    return (0.1 * tones.sum(0) / gains.max()).astype(np.float32)


def frame_rms(waveform: np.ndarray) -> Any:
    frames = waveform[: len(waveform) // 640 * 640].reshape(-1, 640)
    return np.sqrt((frames**2).mean(1))


def faint_noise() -> np.ndarray:
    return 1e-3 * np.random.default_rng(0).standard_normal(RATE_HZ).astype(np.float32)


@pytest.mark.parametrize("waveform", [np.zeros(RATE_HZ, np.float32), faint_noise()])
def test_silence_keeps_the_mouth_shut(waveform: np.ndarray) -> None:
    track = mouth_track(waveform)

    assert track.opening.shape == track.width.shape == (25,)
    assert track.opening.dtype == track.width.dtype == np.float32
    assert not track.opening.any()
    assert not track.width.any()


@pytest.mark.parametrize("num_samples", [0, 1, 639, 640, 1599, 16_320])
def test_there_is_a_value_for_each_whole_frame(num_samples: int) -> None:
    track = mouth_track(np.full(num_samples, 0.1, np.float32))

    assert len(track.opening) == len(track.width) == num_samples // 640


@pytest.mark.parametrize("frame", [0, 7, 20, 24])
def test_a_burst_opens_the_mouth_in_its_own_frame(frame: int) -> None:
    waveform = np.zeros(RATE_HZ, np.float32)
    waveform[640 * frame : 640 * (frame + 1)] = vowel((730, 1150), 0.04)

    opening = mouth_track(waveform).opening

    assert opening.argmax() == frame
    assert opening[frame] == pytest.approx(1.0)
    far = np.abs(np.arange(25) - frame) > 1
    assert not opening[far].any()


def test_the_opening_follows_the_loudness() -> None:
    waveform = formant_speech(np.random.default_rng(1), 10 * RATE_HZ)

    opening = mouth_track(waveform).opening

    assert np.corrcoef(opening, frame_rms(waveform))[0, 1] > 0.95
    assert opening.max() == 1.0


def test_a_pause_within_speech_closes_the_mouth() -> None:
    waveform = np.concatenate([vowel((730, 1150)), faint_noise(), vowel((730, 1150))])

    opening = mouth_track(waveform).opening

    assert not opening[26:49].any()
    assert opening[5:20].min() > 0.9


@pytest.mark.parametrize("gain_db", [-10, 10])
def test_a_quiet_recording_opens_as_far_as_a_loud_one(gain_db: int) -> None:
    waveform = formant_speech(np.random.default_rng(2), 6 * RATE_HZ)
    track = mouth_track(waveform)

    other = mouth_track(waveform * np.float32(10 ** (gain_db / 20)))

    assert other.opening == pytest.approx(track.opening, abs=0.05)
    assert other.width == pytest.approx(track.width, abs=0.15)


def test_a_bright_vowel_spreads_the_mouth_and_a_dark_one_rounds_it() -> None:
    bright = mouth_track(vowel((290, 2300, 3000))).width
    dark = mouth_track(vowel((320, 780))).width

    assert bright.min() > 0.3
    assert dark.max() < -0.3


def test_a_frame_is_every_other_state() -> None:
    waveform = formant_speech(np.random.default_rng(3), 3 * RATE_HZ + 500)

    frames, states = mouth_track(waveform), state_track(waveform)

    assert len(states.opening) == 151
    assert np.array_equal(frames.opening, states.opening[1::2])
    assert np.array_equal(frames.width, states.width[1::2])


@pytest.mark.parametrize("num_samples", [RATE_HZ, 5 * RATE_HZ + 37])
def test_babble_has_the_length_asked_for_and_the_level_of_speech(num_samples: int) -> None:
    waveform = formant_speech(np.random.default_rng(4), num_samples)

    assert waveform.shape == (num_samples,)
    assert waveform.dtype == np.float32
    rms = frame_rms(waveform)
    audible_db = 20 * np.log10(np.sqrt((rms[rms > 0.1 * rms.max()] ** 2).mean()))
    assert audible_db == pytest.approx(-24, abs=2)
    assert (rms < 1e-3).any()


def test_the_encoder_is_trained_on_the_states_that_it_gives() -> None:
    model = audio_encoder.build().eval()
    mel = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(7))

    with torch.no_grad():
        trained = audio_encoder.layer_states(model, mel, first=0)
        given = model.encoder(mel, output_hidden_states=True).hidden_states

    assert len(trained) == len(given) - 1 == 4
    for ours, theirs in zip(trained, given[1:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpeechCorpus:
    if shutil.which("espeak-ng") is None:
        pytest.skip("needs espeak-ng")
    monkeypatch.setitem(speech.BANK_SECONDS, "train", 20.0)
    return SpeechCorpus("train", tmp_path)


def test_a_clip_has_the_length_asked_for_whatever_it_is(corpus: SpeechCorpus) -> None:
    rng = np.random.default_rng(5)

    clips = [corpus.clip(rng, num_frames) for num_frames in range(1, 200, 3)]

    assert [len(clip) for clip in clips] == [640 * n for n in range(1, 200, 3)]
    assert all(clip.dtype == np.float32 and np.abs(clip).max() < 1 for clip in clips)
    openings = [mouth_track(clip).opening for clip in clips]
    assert any(not opening.any() for opening in openings)
    assert any(opening.max() == 1.0 for opening in openings)


def test_the_bank_is_synthesised_once_and_the_same_anywhere(
    corpus: SpeechCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = SpeechCorpus("train", tmp_path / "elsewhere")
    monkeypatch.setattr(shutil, "which", lambda program: None)

    again = SpeechCorpus("train", tmp_path)

    clips = [bank.clip(np.random.default_rng(6), 100) for bank in (corpus, elsewhere, again)]
    assert np.array_equal(clips[0], clips[1])
    assert np.array_equal(clips[0], clips[2])


def test_without_espeak_the_corpus_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)

    with pytest.raises(RuntimeError, match="espeak-ng"):
        SpeechCorpus("train", tmp_path)


def test_the_splits_share_no_language_and_no_voice() -> None:
    assert not set(speech.WORDS["train"]) & set(speech.WORDS["held_out"])
    assert not set(speech.VOICES["train"]) & set(speech.VOICES["held_out"])
    assert speech.BANK_SEEDS["train"] != speech.BANK_SEEDS["held_out"]
