"""The demo's speech encoder: a narrow Whisper encoder, trained to tell the mouth's movement.

Linear heads predict the opening and the width of the mouth from each layer's states, and are thrown
away; what stays is an encoder whose states carry both.

Shape letters: B batch, P positions (50 a second), C channels, E layers whose states are read.
"""

import functools
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from training.loop import LOG, Clock, Log
from training.muon import Muon
from training.processes import prefetched
from training.speech import (
    GAIN_DB,
    SPEECH_RMS_DB,
    STATE_SAMPLES,
    SpeechCorpus,
    state_track,
)
from worker.generation.audio import encode_speech, log_mel

RUN = "audio_encoder_run"  # the log's directory
BATCH = 8
STEPS = 1600
WHOLE_SHARE = 0.12  # of the steps, the last ones, on all 1500 positions
EXCERPT_POSITIONS = (100, 400)
ALL_POSITIONS = 1500
PADDING_WEIGHT = 0.1  # of the silence after the recording, in the loss
ADAM_RATE = 2e-3
MUON_RATE = 2e-2
MEASURED_CLIPS = 60  # of either split


def build() -> WhisperModel:
    """The encoder before training; it has no decoder."""
    return WhisperModel(
        WhisperConfig(
            d_model=64,
            encoder_layers=4,  # the depth is part of the avatar's interface
            encoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_layers=0,
            decoder_attention_heads=4,
            decoder_ffn_dim=16,
            vocab_size=32,
            num_mel_bins=80,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def train(
    work: Path,
    steps: int,
    seed: int,
    device: torch.device,
    num_processes: int,
    seconds: float | None = None,
) -> WhisperModel:
    """An encoder trained for so many steps on the speech of which `work` has the bank.

    With a number of seconds it is for fewer where the steps take longer.

    Most steps run on the first seconds of shorter clips, because the attention's cost grows with
    the square of the positions; the last ones run as in use, on 30 s filled up with silence.
    """
    torch.manual_seed(seed)
    model = build().to(device)
    heads = nn.ModuleList(nn.Linear(model.config.d_model, 2) for _ in range(4)).to(device)
    optimizers = _optimizers(model, heads)
    (work / RUN).mkdir(parents=True, exist_ok=True)
    log = Log(work / RUN / LOG)
    make = partial(make_batch, work, seed, round((1 - WHOLE_SHARE) * steps))
    clock = Clock(steps, seconds)
    with prefetched(make, num_processes) as batches:
        while clock.progress < 1:
            batch = next(batches)
            rate = min(1.0, (clock.step + 1) / 50, (1 - clock.progress) / 0.6)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * rate
            mel, targets, weights = (
                torch.from_numpy(values).to(device).float()
                for values in (batch.mel, batch.targets, batch.weights)
            )
            states = layer_states(model, mel, batch.first)
            predicted = torch.stack([head(s) for head, s in zip(heads, states, strict=True)])
            errors = ((predicted - targets) ** 2).mean(-1)  # (E, B, P)
            losses = (errors * weights).sum((1, 2)) / weights.sum()
            losses.sum().backward()
            nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            named = {f"layer_{index}": loss for index, loss in enumerate(losses.detach(), 1)}
            clock.tick()
            log.add(named, clock.step, is_last=clock.progress >= 1)
    return model.eval().cpu()


def layer_states(
    model: WhisperModel,
    mel: Tensor,  # (B, 80, 2P)
    first: int,
) -> list[Tensor]:  # E of (B, P, C)
    """The states of each layer, the last one normalised, at P positions from the first one on.

    The encoder's own forward pass takes 1500 positions only.
    """
    encoder = model.encoder
    hidden = gelu(encoder.conv2(gelu(encoder.conv1(mel)))).transpose(1, 2)  # (B, P, C)
    hidden = hidden + encoder.embed_positions.weight[first : first + hidden.shape[1]]
    states = []
    for layer in encoder.layers:
        hidden = layer(hidden, None)
        states.append(hidden)
    return [*states[:-1], encoder.layer_norm(states[-1])]


def _optimizers(model: WhisperModel, heads: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for all else."""
    encoder = [value for value in model.encoder.parameters() if value.requires_grad]
    matrices = [value for value in encoder if value.ndim == 2]
    others = [value for value in encoder if value.ndim != 2]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=MUON_RATE),
        torch.optim.AdamW([*others, *heads.parameters()], lr=ADAM_RATE, weight_decay=0.01),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


@dataclass(frozen=True)
class Batch:
    """Clips of speech, some positions of each, and what is wanted there."""

    first: int  # of the positions
    mel: np.ndarray  # (B, 80, 2P) float16
    targets: np.ndarray  # (B, P, 2)
    weights: np.ndarray  # (B, P)


@functools.cache
def _sources(work: Path) -> tuple[SpeechCorpus, WhisperFeatureExtractor]:
    return SpeechCorpus("train", work), WhisperFeatureExtractor(feature_size=80)


def make_batch(work: Path, seed: int, excerpts: int, number: int) -> Batch:
    """Clips of a second and more; whole windows of the encoder after so many batches of excerpts.

    The same for the same seed and number.
    """
    corpus, feature_extractor = _sources(work)
    rng = np.random.default_rng((seed, number))
    positions, first = ALL_POSITIONS, 0
    if number < excerpts:
        positions = int(rng.integers(*EXCERPT_POSITIONS))
        first = int(rng.integers(ALL_POSITIONS - positions))
    frames = np.exp(rng.uniform(np.log(25), np.log(positions // 2), BATCH)).astype(int)
    clips = [corpus.clip(rng, int(count)) for count in frames]
    mel = torch.cat([log_mel(clip, feature_extractor) for clip in clips])[..., : 2 * positions]
    targets = np.zeros((BATCH, positions, 2), np.float32)
    weights = np.full((BATCH, positions), PADDING_WEIGHT, np.float32)
    for index, clip in enumerate(clips):
        mouth = np.stack(state_track(clip), axis=-1)  # (P', 2)
        targets[index, : len(mouth)] = mouth
        weights[index, : len(mouth)] = 1.0
    return Batch(first, mel.half().numpy(), targets, weights)


@torch.inference_mode()
def measure(model: WhisperModel, train_corpus: SpeechCorpus, held_out: SpeechCorpus) -> str:
    """How well a linear probe of the last states, fitted to training clips, does on others."""
    rng = np.random.default_rng(99)
    fitted = [_states_and_mouth(model, _speech(train_corpus, rng)) for _ in range(MEASURED_CLIPS)]
    states = torch.cat([clip[0][:, -1] for clip in fitted])  # (N, C)
    mouths = torch.cat([clip[1] for clip in fitted])  # (N, 2)
    bias = torch.ones(len(states), 1)
    readout = torch.linalg.lstsq(torch.cat([states, bias], 1), mouths).solution  # (C + 1, 2)

    def read(states: Tensor) -> Tensor:  # (N, E, C) → (N, 2)
        mouth: Tensor = states[:, -1] @ readout[:-1] + readout[-1]
        return mouth

    matches, gain_errors, ratios, largest = list[list[float]](), list[float](), list[float](), 0.0
    for _ in range(MEASURED_CLIPS):
        clip = _speech(held_out, rng)
        states, mouth = _states_and_mouth(model, clip)
        largest = max(largest, states.abs().max().item())
        mouth_read = read(states)
        matches.append([np.corrcoef(mouth_read[:, i], mouth[:, i])[0, 1].item() for i in range(2)])
        rms = np.sqrt((clip[np.abs(clip) > 1e-3] ** 2).mean())
        quiet, loud = (
            read(_states_and_mouth(model, clip * np.float32(10 ** (level_db / 20) / rms))[0])[:, 0]
            for level_db in (SPEECH_RMS_DB - GAIN_DB, SPEECH_RMS_DB + GAIN_DB)
        )
        gain_errors.append((quiet - loud).abs().mean().item())
        ratios.append((quiet.quantile(0.95) / loud.quantile(0.95)).item())
    silent = [np.zeros(80_000, np.float32)]
    silent += [(s * rng.standard_normal(80_000)).astype(np.float32) for s in (0.0003, 0.001, 0.002)]
    opened = [read(_states_and_mouth(model, clip)[0])[:, 0].max().item() for clip in silent]
    low, median = np.percentile(np.array(matches), [5, 50], axis=0)
    return (
        f"opening: median r {median[0]:.4f}, 5th percentile {low[0]:.4f}, "
        f"lowest {np.min(matches, axis=0)[0]:.4f}\n"
        f"width: median r {median[1]:.4f}, 5th percentile {low[1]:.4f}\n"
        f"quiet beside loud: mean difference {np.mean(gain_errors):.4f}, ratio of the openings' "
        f"95th percentiles {np.min(ratios):.3f} to {np.max(ratios):.3f}\n"
        f"opening in silence and faint noise: at most {max(opened):.4f}\n"
        f"largest state: {largest:.1f}"
    )


def _speech(corpus: SpeechCorpus, rng: np.random.Generator) -> np.ndarray:
    """A clip of 2 to 16 s that is not silent."""
    while True:
        clip = corpus.clip(rng, int(rng.integers(50, 400)))
        if state_track(clip).opening.mean() > 0.05:
            return clip


def _states_and_mouth(model: WhisperModel, clip: np.ndarray) -> tuple[Tensor, Tensor]:
    """(N, E, C) states of the clip as the worker computes them, and its mouth (N, 2)."""
    mel = log_mel(clip, WhisperFeatureExtractor(feature_size=80))
    states = encode_speech(mel, model)[: len(clip) // STATE_SAMPLES]
    return states, torch.from_numpy(np.stack(state_track(clip), axis=-1))
