from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from transformers import WhisperFeatureExtractor, WhisperModel

from tests.support.golden_transformer import relative_difference
from tests.support.golden_weights import load_case
from worker.generation.audio import audio_windows, encode_audio, encode_speech, log_mel
from worker.shapes import count_frames

MEL_TOLERANCE = 1e-6
# The mel is rounded to float16 before the encoder. CPUs differ by 2e-7 in its Fourier transform,
# which moves some values to the next float16, and the states by up to 3e-6.
STATES_TOLERANCE = 5e-6

DESCRIBED, TENSORS = load_case("audio")
CASES = DESCRIBED["cases"]


@pytest.fixture(scope="module", autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def feature_extractor(toy_model: Path) -> Any:
    return WhisperFeatureExtractor.from_pretrained(toy_model / "feature_extractor")


@pytest.fixture(scope="module")
def audio_encoder(toy_model: Path) -> Any:
    return WhisperModel.from_pretrained(toy_model / "audio_encoder", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def states(feature_extractor: Any, audio_encoder: Any) -> dict[Any, torch.Tensor]:
    """Encoder states of each case."""
    return {
        name: encode_speech(log_mel(waveform(case["samples"]), feature_extractor), audio_encoder)
        for name, case in CASES.items()
    }


def waveform(num_samples: int) -> np.ndarray:
    return TENSORS["waveform"][:num_samples].numpy().astype(np.float32) / 32768


def tone(seconds: float) -> np.ndarray:
    times = np.arange(round(seconds * 16_000)) / 16_000
    return (0.3 * np.sin(2 * np.pi * (200 + 30 * times) * times)).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_log_mel_is_the_reference_s(name: str, feature_extractor: Any) -> None:
    mel = log_mel(waveform(CASES[name]["samples"]), feature_extractor)
    assert mel.shape == (1, 80, 3000)
    assert torch.equal(mel, mel.half().float())
    reference = TENSORS[CASES[name]["mel"]]
    assert relative_difference(mel[0, :, ::25], reference.half().float()) < 2e-5  # a few float16s
    raw = feature_extractor(waveform(CASES[name]["samples"]), 16_000, return_tensors="pt")
    assert relative_difference(raw.input_features[0, :, ::25], reference) < MEL_TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_encoder_states_and_windows_are_the_reference_s(
    name: str, states: dict[Any, torch.Tensor]
) -> None:
    case = CASES[name]
    assert relative_difference(states[name][::75], TENSORS[case["hidden"]]) < STATES_TOLERANCE
    num_frames = case["features"]  # the reference stops at 400
    windows = audio_windows(states[name][None], num_frames, fps=25)
    assert windows.dtype == torch.float16
    assert windows.shape == (1, num_frames, 10, 5, 384)
    some = windows[0, case["window_frames"], ..., ::8].float()
    assert relative_difference(some, TENSORS[case["windows"]]) < 4e-4  # float16
    sums = windows[0].double().abs().sum(dim=(1, 2, 3))
    assert relative_difference(sums, TENSORS[case["frame_abs_sums"]]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_windows_are_exactly_the_states_around_each_frame(
    name: str, states: dict[Any, torch.Tensor]
) -> None:
    windows = audio_windows(states[name][None], 129, fps=25)[0]
    padded = pad(states[name].half(), (0, 0, 0, 0, 4, 0))
    for frame in (0, 1, 64, 128):
        assert torch.equal(windows[frame], padded[2 * frame : 2 * frame + 10])


@pytest.mark.parametrize("name", CASES)
def test_the_length_in_frames_is_the_reference_s(name: str) -> None:
    assert count_frames(CASES[name]["samples"], fps=25) == CASES[name]["audio_len"]


def test_each_frame_has_a_window_and_each_state_lies_in_memory_once(
    feature_extractor: Any, audio_encoder: Any
) -> None:
    embeds = encode_audio([tone(31.0)], 25, feature_extractor, audio_encoder)
    assert embeds.shape == (1, 775, 10, 5, 384)
    num_states = 2 * 1500 + 14  # two chunks of the encoder, and the borders
    assert embeds.untyped_storage().nbytes() == num_states * 5 * 384 * 2


def test_all_of_a_long_recording_is_encoded(feature_extractor: Any, audio_encoder: Any) -> None:
    speech = tone(40.0)
    embeds = encode_audio([speech], 25, feature_extractor, audio_encoder)
    assert embeds.shape[1] == 1000
    first = encode_audio([speech[: 30 * 16_000]], 25, feature_extractor, audio_encoder)
    second = encode_audio([speech[30 * 16_000 :]], 25, feature_extractor, audio_encoder)
    assert torch.equal(embeds[:, :747], first[:, :747])  # the last windows reach into what follows
    assert torch.equal(embeds[:, 752:1000], second[:, 2:250])
    assert torch.equal(embeds[:, 750, 4:], second[:, 0, 4:])
    assert torch.equal(embeds[:, 750, :4], first[:, 749, 2:6])  # the join, where nothing is missing


def test_half_the_frame_rate_takes_every_second_window(
    feature_extractor: Any, audio_encoder: Any
) -> None:
    speech = tone(10.0)
    embeds = encode_audio([speech], 25, feature_extractor, audio_encoder)
    half_rate = encode_audio([speech], 12.5, feature_extractor, audio_encoder)
    assert half_rate.shape[1] == 125
    assert torch.equal(half_rate, embeds[:, ::2])


def test_less_than_a_frame_is_refused(feature_extractor: Any, audio_encoder: Any) -> None:
    with pytest.raises(ValueError, match="shorter than one frame"):
        encode_audio([tone(0.03)], 25, feature_extractor, audio_encoder)
