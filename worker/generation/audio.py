"""Speech into the model's audio windows: waveform → log-mel → encoder states → one window a frame.

Shape letters: V voices, N states (50 a second), E encoder states of one moment (the embedding and
each layer), C channels, F video frames.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import WhisperFeatureExtractor, WhisperModel

from worker.shapes import AUDIO_STATES_HZ, SAMPLE_RATE_HZ, VideoPlan, count_frames

CHUNK_SECONDS = 30  # what the encoder takes at once
CHUNK_SAMPLES = CHUNK_SECONDS * SAMPLE_RATE_HZ
WINDOW_STATES = 10
WINDOW_LEAD = 4  # states that a window reaches back before its frame


def log_mel(
    waveform: np.ndarray,  # (samples,) float32, mono, 16 kHz
    feature_extractor: WhisperFeatureExtractor,
) -> Tensor:  # (chunks, 80, 3000)
    """Log-mel of each 30 s of speech, the last filled up with silence.

    Rounded to float16 and back, as the reference does before its encoder.
    """
    chunks = _chunks(waveform)
    features = feature_extractor(chunks, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")
    mel: Tensor = features.input_features
    return mel.half().float()


def encode_speech(
    mel: Tensor,  # (chunks, 80, 3000)
    audio_encoder: WhisperModel,
) -> Tensor:  # (N, E, C)
    """All hidden states of the speech encoder, the chunks joined to one run of 50 a second.

    Differs from upstream: it encodes the first 30 s only. A chunk here is exactly such 30 s.
    """
    encoder = audio_encoder.encoder
    states = []
    for chunk in mel.to(encoder.device, encoder.dtype):
        hidden = encoder(chunk[None], output_hidden_states=True).hidden_states
        states.append(torch.cat(hidden).transpose(0, 1))  # (1500, E, C)
    return torch.cat(states)


def audio_windows(
    states: Tensor,  # (V, N, E, C)
    num_frames: int,
    fps: float,
) -> Tensor:  # (V, F, 10, E, C)
    """For each video frame the ten states around it, in float16 as the reference keeps them.

    A window reaches from 4 states before its frame to 5 after; outside the recording are zeros.
    The windows are a view: each state lies in memory once, and not in the five that overlap.
    """
    stride = int(AUDIO_STATES_HZ / fps)
    padded = pad(states.half(), (0, 0, 0, 0, WINDOW_LEAD, WINDOW_STATES))
    windows = padded.unfold(1, WINDOW_STATES, stride)  # (V, F', E, C, 10)
    return windows.movedim(4, 2)[:, :num_frames]


def encode_audio(
    waveforms: Sequence[np.ndarray],  # V x (samples,) float32 in [-1, 1], mono, 16 kHz
    fps: float,
    feature_extractor: WhisperFeatureExtractor,
    audio_encoder: WhisperModel,
) -> Tensor:  # (V, F, 10, E, C) float16
    """The audio windows of all video frames, for each of several equally long voices.

    Raises:
        ValueError: less than one frame of audio.
    """
    plan = VideoPlan(count_frames(len(waveforms[0]), fps))

    def states(waveform: np.ndarray) -> Tensor:  # (N, E, C)
        chunks = _chunks(waveform)  # one by one, to bound the memory
        encoded = (
            encode_speech(log_mel(each, feature_extractor), audio_encoder) for each in chunks
        )
        return torch.cat([each.half() for each in encoded])

    return audio_windows(torch.stack(list(map(states, waveforms))), plan.num_frames, fps)


def _chunks(waveform: np.ndarray) -> list[np.ndarray]:
    return [
        waveform[start : start + CHUNK_SAMPLES] for start in range(0, len(waveform), CHUNK_SAMPLES)
    ]
