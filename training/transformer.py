"""Trains the denoiser: from noise to the latents of a person who speaks the recording.

Flow matching as the published model's: with noise e and latents x, at noise level s the model sees
(1 - s) x + s e and answers e - x. What the worker's guidance needs is trained beside it: the
velocity without audio and under either prompt, and that it is the same as the one with audio where
no speech is seen, since guidance multiplies what differs. So is what its cached steps need: the
last block alone, on tokens of a higher noise level. At last it is the guided velocity itself that
is held to the truth, with the weights that the worker's steps have.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from avatar_client.contract.request import GenerationParams
from training import architecture, world
from training.loop import steps_done, train
from training.processes import made_ahead
from training.scenes import EYES, WHOLE_FACE, Part, Pool, Scene, make_scene
from worker.generation.cfg import EARLY_FACE_MASK_SCALE, PROMPT_GUIDED_STEPS, guidance_weight
from worker.model.transformer import CachedTokens, HunyuanVideoAvatarTransformer3DModel
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
# What the audio adds when guidance, which multiplies it by 3.5 to 6.5, is begun to be trained.
AUDIO_STRENGTH = 0.3
GUIDED_STEPS = (20, 50)  # of the worker's runs
PARAMS = GenerationParams()  # of a request that asks for nothing else


@dataclass(frozen=True)
class Windows:
    """What a step sees."""

    count: int
    length: int  # latent frames of each
    part: Part | None = None  # of the face; None: the whole picture


@dataclass(frozen=True)
class Phase:
    """A part of the training."""

    name: str
    windows: tuple[Windows, ...]  # of the steps, in turn
    steps: int
    learning_rate: float
    decay_share: float
    steps_a_scene: int  # for how many steps no new scene comes in
    is_guided: bool = False


PHASES = (
    Phase("short", (Windows(64, 9),), 300, 1.5e-3, 0.2, 4),
    Phase("whole", (Windows(16, WINDOW_LATENTS),), 1000, 1.2e-3, 0.8, 4),
    # what eyes and mouth do is decided within a few frames of them
    Phase(
        "guided",
        (
            *(*(Windows(64, 9, EYES),) * 5, *(Windows(16, 9, WHOLE_FACE),) * 2, Windows(4, 9)) * 2,
            Windows(1, WINDOW_LATENTS),
        ),
        500,
        1.2e-3,
        0.8,
        16,
        is_guided=True,
    ),
)


def loss_of(
    transformer: HunyuanVideoAvatarTransformer3DModel,
    scenes: Scene,
    rng: np.random.Generator,
    *,
    is_guided: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The squared error of the velocity at noise levels drawn by chance.

    Args:
        scenes: a batch of windows.
        is_guided: the velocity with audio is the one that the worker follows, from the two sides.
    """
    count = len(scenes.latents)
    levels = _draw_levels(count, rng).to(scenes.latents.device)
    noise = torch.randn_like(scenes.latents)
    velocity = noise - scenes.latents
    sides = _Sides.draw(scenes, noise, levels, rng, is_guided=is_guided)

    predicted, cached_tokens = sides.predict(transformer, sides.every, 1000 * levels)
    heard, silent = predicted[:count], predicted[count:]
    earlier = rng.uniform(EARLIEST_CACHED, 1, count)
    later = levels * torch.tensor(earlier, dtype=torch.float32, device=levels.device)
    cached_count = max(1, round(CACHED_SHARE * count))
    chosen = sides.every[:cached_count]
    if is_guided:
        chosen = torch.cat([chosen, chosen + count])
    cached, _ = sides.predict(transformer, chosen, 1000 * later, _rows_of(cached_tokens, chosen))

    weight = (scenes.weight / scenes.weight.mean((1, 2), keepdim=True))[:, None, None]
    share_beside = scenes.beside.mean((1, 2), keepdim=True).clamp(min=1e-6)  # around the eyes: none
    beside = (scenes.beside / share_beside)[:, None, None]
    heard_errors = _errors(sides.followed(predicted, count), velocity, weight)
    losses = {
        "heard": heard_errors.mean(),
        "silent": _errors(silent, velocity, weight).mean(),
        "cached": _errors(sides.followed(cached, cached_count), velocity, weight).mean(),
        "apart": _errors(silent, heard, beside).mean(),
    }
    loss = (
        losses["heard"]
        + SILENT_WEIGHT * losses["silent"]
        + CACHED_WEIGHT * losses["cached"]
        + AGREEMENT_WEIGHT * losses["apart"]
    )
    with torch.no_grad():
        figures = {name: value.detach() for name, value in losses.items()}
        figures["beside"] = _errors(heard, velocity, beside).mean()
        for name, band in (("low", levels < 0.5), ("high", levels >= 0.5)):
            figures[name] = (heard_errors * band).sum() / band.sum().clamp(min=1)
    return loss, figures


@dataclass(frozen=True)
class _Sides:
    """The rows that a step puts through the model: all windows, then some of them without audio."""

    scenes: Scene
    noisy: Tensor  # (B, C, T, h, w)
    reference: Tensor  # (B, C, 1, h, w)
    mask: Tensor  # (B, 1, 1, h, w)
    guided_by: Tensor | None  # (B, 1, 1, 1, 1)
    windows: Tensor  # (R,), of each row
    is_heard: Tensor  # (R,)
    prompts: Tensor  # (R,), 0: the negative one

    @classmethod
    def draw(
        cls,
        scenes: Scene,
        noise: Tensor,
        levels: Tensor,
        rng: np.random.Generator,
        *,
        is_guided: bool,
    ) -> Self:
        """Those of the noise at its levels, under guidance drawn by chance."""
        latents = scenes.latents
        device, count = latents.device, len(latents)
        level = _over_latents(levels)
        noisy = (1 - level) * latents + level * noise
        reference = scenes.reference_mean + scenes.reference_std * torch.randn_like(latents)
        guidance = _draw_guidance(levels, rng) if is_guided else _no_guidance(count, rng)
        is_early = _over_latents(torch.tensor(guidance.is_early, device=device))
        guided_by = None
        if guidance.weight is not None:
            weight = torch.tensor(guidance.weight, dtype=torch.float32, device=device)
            guided_by = _over_latents(weight)
        silent_count = count if is_guided else max(1, round(SILENT_SHARE * count))
        windows = torch.cat([torch.arange(count), torch.arange(silent_count)]).to(device)
        is_heard = torch.arange(len(windows), device=device) < count
        negative = torch.tensor(guidance.has_negative_prompt, device=device)
        return cls(
            scenes=scenes,
            noisy=noisy,
            reference=reference,
            mask=torch.where(is_early, EARLY_FACE_MASK_SCALE * scenes.face_mask, scenes.face_mask),
            guided_by=guided_by,
            windows=windows,
            is_heard=is_heard,
            prompts=torch.where(is_heard, 1, 1 - negative[windows].long()),
        )

    @property
    def every(self) -> Tensor:
        """The number of each row."""
        return torch.arange(len(self.windows), device=self.windows.device)

    def predict(
        self,
        transformer: HunyuanVideoAvatarTransformer3DModel,
        rows: Tensor,
        timesteps: Tensor,
        cached_tokens: CachedTokens | None = None,
    ) -> tuple[Tensor, CachedTokens]:
        """The velocity of these rows, and the tokens for the step cache."""
        scenes, seen = self.scenes, self.windows[rows]
        embeds = scenes.prompt_embeds[seen, self.prompts[rows]].float()
        with torch.autocast(embeds.device.type, torch.bfloat16):
            predicted, cached_tokens = transformer(
                hidden_states=self.noisy[seen],
                timestep=timesteps[seen],
                encoder_hidden_states=embeds,
                encoder_attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                pooled_projections=scenes.pooled_prompt_embeds[seen, self.prompts[rows]],
                reference_latents=self.reference[seen],
                audio_embeds=scenes.audio_embeds[seen] * _over_latents(self.is_heard[rows]),
                face_mask=self.mask[seen],
                motion_expression=scenes.expression[seen, None].expand(-1, 4),
                motion_pose=scenes.pose[seen, None].expand(-1, 4),
                fps=torch.full((len(seen),), float(world.FPS), device=embeds.device),
                cached_tokens=cached_tokens,
                return_cached_tokens=True,
                return_dict=False,
            )
        assert cached_tokens is not None
        return predicted.float(), cached_tokens

    def followed(self, predicted: Tensor, count: int) -> Tensor:
        """The velocity that the worker would follow in the first windows, from both sides of it."""
        if self.guided_by is None:
            return predicted[:count]
        heard, silent = predicted[:count], predicted[count:]
        return silent + self.guided_by[:count] * (heard - silent)


def _draw_levels(count: int, rng: np.random.Generator) -> Tensor:
    """Noise levels (B,), evenly spread before the shift."""
    share = (rng.permutation(count) + rng.random(count)) / count
    evenly = LOWEST_NOISE + (1 - LOWEST_NOISE) * share
    shifted = NOISE_SHIFT * evenly / (1 + (NOISE_SHIFT - 1) * evenly)
    return torch.tensor(shifted, dtype=torch.float32)


def _over_latents(values: Tensor) -> Tensor:
    """One value a sample, for (B, C, T, h, w)."""
    return values.view(-1, 1, 1, 1, 1)


def _rows_of(cached_tokens: CachedTokens, rows: Tensor) -> CachedTokens:
    return CachedTokens(
        image=tuple(cached_tokens.image[row] for row in rows),
        text=tuple(cached_tokens.text[row] for row in rows),
    )


def _errors(predicted: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """The weighted squared error (N,) of the first N windows."""
    count = len(predicted)
    return ((predicted - wanted[:count]).square() * weight[:count]).mean((1, 2, 3, 4))


@dataclass(frozen=True)
class _Guidance:
    """What the worker does with each window at its noise level."""

    weight: list[float] | None  # None: the side with audio is followed alone
    is_early: list[bool]  # the face hears less
    has_negative_prompt: list[bool]  # on the side without audio


def _draw_guidance(levels: Tensor, rng: np.random.Generator) -> _Guidance:
    """That of runs of several lengths."""
    shift = PARAMS.flow_shift
    left = levels / (shift - (shift - 1) * levels)  # of the run: 1 at its start
    lengths = rng.integers(*GUIDED_STEPS, len(levels), endpoint=True).tolist()
    steps = [
        min(int((1 - part) * length), length - 1)
        for part, length in zip(left.tolist(), lengths, strict=True)
    ]
    early = [step < PROMPT_GUIDED_STEPS for step in steps]
    weights = [
        guidance_weight(step, length, PARAMS.guidance_scale)
        for step, length in zip(steps, lengths, strict=True)
    ]
    return _Guidance(weights, early, early)


def _no_guidance(count: int, rng: np.random.Generator) -> _Guidance:
    """Early and late steps by chance, either prompt for all."""
    early = (rng.random(count) < QUIET_MASK_SHARE).tolist()
    return _Guidance(None, early, [bool(rng.integers(2))] * count)


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
    """The denoiser, trained phase by phase.

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
    drawn = itertools.count()
    if phase.is_guided and not steps_done(directory):
        with torch.no_grad():
            for name, weight in transformer.named_parameters():
                if name.endswith("audio_adapter.to_out.weight"):
                    weight *= AUDIO_STRENGTH

    def descend() -> dict[str, Tensor]:
        step = next(drawn)
        if (step + 1) % phase.steps_a_scene == 0:
            pool.grow()
        windows = phase.windows[step % len(phase.windows)]
        ring_share = RING_SHARE if windows.length == WINDOW_LATENTS else 0.0
        seen = pool.draw(windows.count, windows.length, ring_share, windows.part)
        loss, figures = loss_of(transformer, seen, rng, is_guided=phase.is_guided)
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
