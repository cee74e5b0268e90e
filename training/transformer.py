"""Trains the denoiser: from noise to the latents of a person who speaks the recording.

Flow matching as the published model's: with noise e and latents x, at noise level s the model sees
(1 - s) x + s e and answers e - x. What the worker's guidance needs is trained beside it: the
velocity without audio and under either prompt, and that it is the same as the one with audio where
no speech is seen, since guidance multiplies what differs. So is what its cached steps need: the
last block alone, on tokens of a higher noise level.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training import architecture, world
from training.loop import steps_done, train
from training.processes import made_ahead
from training.scenes import Pool, Scene, make_scene
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel, Tail
from worker.sampling import EARLY_FACE_MASK
from worker.shapes import WINDOW_LATENTS, FrameSize

SIZES = (  # a wide and a tall one for three square ones
    FrameSize(256, 256),
    FrameSize(256, 320),
    FrameSize(256, 256),
    FrameSize(320, 256),
    FrameSize(256, 256),
)
SCENE_LATENTS = WINDOW_LATENTS + 12
POOL = 300  # scenes that are kept for each entry of SIZES
FIRST_SCENES = 195  # before the first step

SILENT_SHARE = 0.25  # of a batch's windows, seen without audio too
CACHED_SHARE = 0.12  # of them, put through the last block again at a later step
EARLIEST_CACHED = 0.75  # of the noise level at which the tokens were made
RING_SHARE = 0.1
QUIET_MASK_SHARE = 0.3
SILENT_WEIGHT = 0.5
CACHED_WEIGHT = 0.5
AGREEMENT_WEIGHT = 5.0
NOISE_SHIFT = 4.0
LOWEST_NOISE = 0.02  # before the shift; no step begins lower


@dataclass(frozen=True)
class Phase:
    """A part of the training."""

    name: str
    count: int  # windows a step
    length: int  # latent frames of a window
    steps: int
    learning_rate: float
    decay_share: float
    steps_a_scene: int  # for how many steps no new scene comes in


PHASES = (
    Phase("short", 64, 9, 300, 1.5e-3, 0.2, 4),
    Phase("whole", 16, WINDOW_LATENTS, 1000, 1.2e-3, 0.8, 4),
)


def loss_of(
    transformer: HunyuanVideoAvatarTransformer3DModel, scenes: Scene, rng: np.random.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """The squared error of the velocity at noise levels drawn by chance.

    Args:
        scenes: a batch of windows.
    """
    latents = scenes.latents
    device, count = latents.device, len(latents)
    evenly = (
        LOWEST_NOISE + (1 - LOWEST_NOISE) * (rng.permutation(count) + rng.random(count)) / count
    )
    levels = torch.tensor(
        NOISE_SHIFT * evenly / (1 + (NOISE_SHIFT - 1) * evenly), dtype=torch.float32, device=device
    )
    noise = torch.randn_like(latents)
    level = levels.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = noise - latents
    reference = scenes.reference_mean + scenes.reference_std * torch.randn_like(latents)
    quiet = torch.tensor(rng.random(count) < QUIET_MASK_SHARE, device=device).view(-1, 1, 1, 1, 1)
    mask = torch.where(quiet, EARLY_FACE_MASK * scenes.face_mask, scenes.face_mask)
    silent_count = max(1, round(SILENT_SHARE * count))
    cached_count = max(1, round(CACHED_SHARE * count))
    # the windows, and some of them again without audio
    rows = torch.cat([torch.arange(count), torch.arange(silent_count)]).to(device)
    is_heard = torch.arange(len(rows), device=device) < count
    prompts = torch.where(is_heard, 1, int(rng.integers(2)))

    def predict(
        rows: Tensor, is_heard: Tensor, timesteps: Tensor, tail: Tail | None = None
    ) -> tuple[Tensor, Tail | None]:
        """The velocity of the windows of these rows, and the tail."""
        embeds = scenes.prompt_embeds[rows, prompts[: len(rows)]].float()
        with torch.autocast(device.type, torch.bfloat16):
            predicted, tail = transformer(
                hidden_states=noisy[rows],
                timestep=timesteps[rows],
                encoder_hidden_states=embeds,
                encoder_attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                pooled_projections=scenes.pooled_prompt_embeds[rows, prompts[: len(rows)]],
                reference_latents=reference[rows],
                audio_embeds=scenes.audio_embeds[rows] * is_heard.view(-1, 1, 1, 1, 1),
                face_mask=mask[rows],
                motion_expression=scenes.expression[rows, None].expand(-1, 4),
                motion_pose=scenes.pose[rows, None].expand(-1, 4),
                fps=torch.full((len(rows),), float(world.FPS), device=device),
                tail=tail,
                return_tail=True,
                return_dict=False,
            )
        return predicted.float(), tail

    weight = (scenes.weight / scenes.weight.mean((1, 2), keepdim=True))[:, None, None]
    beside = (scenes.beside / scenes.beside.mean((1, 2), keepdim=True))[:, None, None]

    def error(predicted: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
        windows = len(predicted)
        return ((predicted - wanted[:windows]).square() * weight[:windows]).mean((1, 2, 3, 4))

    predicted, tail = predict(rows, is_heard, 1000 * levels)
    assert tail is not None
    heard, silent = predicted[:count], predicted[count:]
    earlier = rng.uniform(EARLIEST_CACHED, 1, count)
    later = levels * torch.tensor(earlier, dtype=torch.float32, device=device)
    kept = Tail(image=tail.image[:cached_count], text=tail.text[:cached_count])
    cached, _ = predict(rows[:cached_count], is_heard[:cached_count], 1000 * later, kept)

    heard_errors = error(heard, weight, velocity)
    losses = {
        "heard": heard_errors.mean(),
        "silent": error(silent, weight, velocity).mean(),
        "cached": error(cached, weight, velocity).mean(),
        "apart": error(silent, beside, heard).mean(),
    }
    loss = (
        losses["heard"]
        + SILENT_WEIGHT * losses["silent"]
        + CACHED_WEIGHT * losses["cached"]
        + AGREEMENT_WEIGHT * losses["apart"]
    )
    with torch.no_grad():
        figures = {name: value.detach() for name, value in losses.items()}
        figures["beside"] = error(heard, beside, velocity).mean()
        for name, band in (("low", levels < 0.5), ("high", levels >= 0.5)):
            figures[name] = (heard_errors * band).sum() / band.sum().clamp(min=1)
    return loss, figures


def train_transformer(
    directory: Path,
    work: Path,
    seed: int,
    device: torch.device,
    num_processes: int,
    phases: Sequence[Phase] = PHASES,
    sizes: Sequence[FrameSize] = SIZES,
    first_scenes: int = FIRST_SCENES,
) -> HunyuanVideoAvatarTransformer3DModel:
    """The denoiser, trained on short windows and then on whole ones.

    An earlier run in the directory is gone on with. The other two models are read from `work`.
    """
    torch.manual_seed(seed)
    transformer = architecture.transformer().train()
    for parameter in transformer.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    transformer.to(device)
    done = sum(steps_done(directory / phase.name) for phase in phases)
    scene = partial(make_scene, work, device, seed, tuple(sizes), SCENE_LATENTS)
    with made_ahead(scene, num_processes, first=1000 * done) as scenes:
        rng = np.random.default_rng((seed, done))
        torch.manual_seed(seed + done)
        pool = Pool(scenes, len(sizes), POOL, rng, device)
        pool.grow(first_scenes)
        for phase in phases:
            train_phase(transformer, pool, phase, rng, directory / phase.name)
    return transformer


def train_phase(
    transformer: HunyuanVideoAvatarTransformer3DModel,
    pool: Pool,
    phase: Phase,
    rng: np.random.Generator,
    directory: Path,
) -> None:
    """Trains the denoiser in place, or reads what an earlier run of the phase made of it."""
    drawn = itertools.count(1)
    ring_share = RING_SHARE if phase.length == WINDOW_LATENTS else 0.0

    def descend() -> dict[str, Tensor]:
        if next(drawn) % phase.steps_a_scene == 0:
            pool.grow()
        loss, figures = loss_of(transformer, pool.draw(phase.count, phase.length, ring_share), rng)
        loss.backward()
        return {"loss": loss.detach(), **figures}

    train(
        transformer.train(),
        descend,
        directory=directory,
        steps=phase.steps,
        learning_rate=phase.learning_rate,
        decay_share=phase.decay_share,
    )
