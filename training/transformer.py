"""Trains the denoiser: from noise to the latents of a person who speaks the recording.

Flow matching as the published model's: with noise e and latents x, at sigma s the model sees
(1 - s) x + s e and predicts the velocity e - x. What classifier-free guidance (CFG) needs is
trained with it: the unconditional branch, without audio and under either prompt, and that it agrees
with the conditional one where no speech is seen, since guidance multiplies what differs. So is what
the step cache needs: the last block alone, on tokens of a higher sigma. The last phase puts the
guided velocity itself into the loss, with the weights that the worker's steps have.
"""

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from avatar_client.contract.request import GenerationParams
from training import architecture, world
from training.loop import (
    LossGradients,
    mixed_precision,
    progress_of,
    sent,
    steps_done,
    time_for,
    train,
)
from training.processes import prefetched
from training.scenes import (
    EYES_CROP,
    FACE_CROP,
    DrawnScene,
    FaceCrop,
    Scene,
    SceneBuffer,
    SceneEncoder,
    Shot,
    draw_scene,
)
from worker.generation.cfg import EARLY_FACE_MASK_SCALE, PROMPT_GUIDED_STEPS, guidance_weight
from worker.model.transformer import CachedTokens, HunyuanVideoAvatarTransformer3DModel
from worker.shapes import WINDOW_LATENTS, FrameSize

logger = logging.getLogger(__name__)

SHOTS = (
    Shot(FrameSize(256, 256), 1),
    Shot(FrameSize(256, 384), 2),
    Shot(FrameSize(256, 256), 1),
    Shot(FrameSize(256, 384), 3),
    Shot(FrameSize(320, 256), 1),
    Shot(FrameSize(256, 320), 2),
    Shot(FrameSize(256, 320), 1),
    Shot(FrameSize(192, 448), 3),
    Shot(FrameSize(256, 256), 2),
    Shot(FrameSize(192, 448), 2),
)
SCENE_LATENTS = WINDOW_LATENTS + 12
SCENES_PER_SHOT = 200  # scenes that are kept for each entry of SHOTS
FIRST_SCENES = 100  # before the first step
FIRST_SCENES_SHARE = 0.1  # of the time, at most; then fewer have to do

UNCOND_SHARE = 0.25  # of a batch's windows, which have an unconditional row too
CACHED_SHARE = 0.12  # of them, put through the last block again at a later step
MIN_CACHED_SIGMA = 0.75  # of the sigma at which the tokens were computed
CIRCULAR_SHARE = 0.1  # of the windows, from a scene's end into its beginning
EARLY_STEP_SHARE = 0.3  # of the windows, with the face mask scaled as in the first steps
UNCOND_WEIGHT = 0.5
CACHED_WEIGHT = 0.5
AGREEMENT_WEIGHT = 5.0
SIGMA_SHIFT = 4.0
MIN_SIGMA = 0.02  # before the shift; no step of the worker begins lower
# Scale of the audio adapters' output at the start of the CFG phase: guidance multiplies it by 3.5
# to 6.5.
AUDIO_SCALE = 0.3
NUM_STEPS = (20, 50)  # of the worker's runs, least and most
PARAMS = GenerationParams()  # of a request that asks for nothing else


@dataclass(frozen=True)
class Windows:
    """The windows of one training step."""

    count: int
    length: int  # latent frames of each
    crop: FaceCrop | None = None  # of the face; None: the whole picture
    sigma_shift: float = SIGMA_SHIFT


@dataclass(frozen=True)
class Phase:
    """A part of the training."""

    name: str
    windows: tuple[Windows, ...]  # of the steps, in turn
    steps: int
    learning_rate: float
    decay_share: float
    steps_a_scene: int  # for how many steps no new scene comes in
    time_share: float  # of the training's, where that is limited
    has_cfg_loss: bool = False


# Whether the eyes blink is open at a sigma of 0.99 and decided at 0.8.
EYES = Windows(256, 17, EYES_CROP, sigma_shift=10.0)

PHASES = (
    Phase("short", (Windows(64, 9),), 1000, 1.5e-3, 0.2, 3, 0.07),
    Phase(
        "whole",
        (Windows(16, WINDOW_LATENTS), Windows(16, WINDOW_LATENTS), EYES),
        6000,
        1.2e-3,
        0.7,
        5,
        0.35,
    ),
    # what eyes and mouth do depends on a few frames around them
    Phase(
        "cfg",
        (
            Windows(8, WINDOW_LATENTS),
            EYES,
            Windows(96, 9, FACE_CROP),
            Windows(96, 9, FACE_CROP),
            Windows(8, WINDOW_LATENTS),
            Windows(96, 9, FACE_CROP),
            Windows(96, 9, FACE_CROP),
        ),
        14000,
        1.2e-3,
        0.8,
        5,
        0.58,
        has_cfg_loss=True,
    ),
)


class Chances(NamedTuple):
    """What a step's loss leaves to chance, but for the noise: of each window, (B,) float32."""

    sigmas: Tensor
    later_sigmas: Tensor  # of the step that uses the step cache
    cfg_weight: Tensor  # 1 without guidance
    is_early: Tensor  # 1: the face mask is scaled down
    is_negative: Tensor  # 1: the unconditional branch has the negative prompt

    @classmethod
    def draw(
        cls,
        count: int,
        rng: np.random.Generator,
        *,
        has_cfg_loss: bool = False,
        sigma_shift: float = SIGMA_SHIFT,
    ) -> Self:
        """Those of so many windows.

        Args:
            has_cfg_loss: each at a step of a worker's run; else any.
            sigma_shift: of the sigmas; the larger, the more of them are high.
        """
        sigmas = _sample_sigmas(count, rng, sigma_shift)
        guidance = _random_guidance(sigmas, rng) if has_cfg_loss else _without_guidance(count, rng)
        later = sigmas * torch.from_numpy(rng.uniform(MIN_CACHED_SIGMA, 1, count))
        return cls(sigmas, later.float(), *(torch.tensor(each).float() for each in guidance))

    def to(self, device: torch.device) -> Self:
        """The same on the device, in one copy that nothing waits for."""
        return type(self)(*sent(torch.stack(self), device))


def denoising_loss(
    transformer: HunyuanVideoAvatarTransformer3DModel,
    scenes: Scene,
    chances: Chances,
    *,
    has_cfg_loss: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The squared error of the velocity.

    Nothing in it waits for the device or reads the CPU's memory, so that a CUDA graph can hold it.

    Args:
        scenes: a batch of windows.
        has_cfg_loss: the error is that of the guided velocity, not of the conditional branch.
    """
    count, sigmas = len(scenes.latents), chances.sigmas
    noise = torch.randn_like(scenes.latents)
    velocity = noise - scenes.latents
    batch = _BranchBatch.of(scenes, noise, chances, has_cfg_loss=has_cfg_loss)

    predicted, cached_tokens = batch.predict(transformer, batch.all_rows, 1000 * sigmas)
    cond, uncond = predicted[:count], predicted[count:]
    cached_count = max(1, round(CACHED_SHARE * count))
    kept = [*range(cached_count)]
    chosen = batch.all_rows[:cached_count]
    if has_cfg_loss:
        kept += range(count, count + cached_count)
        chosen = torch.cat([chosen, count + chosen])
    later = 1000 * chances.later_sigmas
    cached, _ = batch.predict(transformer, chosen, later, _rows_of(cached_tokens, kept))

    weight = (scenes.weight / scenes.weight.mean((1, 2), keepdim=True))[:, None, None]
    # 0 in a crop of the eyes
    outside_share = scenes.outside.mean((1, 2), keepdim=True).clamp(min=1e-6)
    outside = (scenes.outside / outside_share)[:, None, None]
    cond_errors = _errors(batch.guided_velocity(predicted, count), velocity, weight)
    losses = {
        "cond": cond_errors.mean(),
        "uncond": _errors(uncond, velocity, weight).mean(),
        "cached": _errors(batch.guided_velocity(cached, cached_count), velocity, weight).mean(),
        "agreement": _errors(uncond, cond, outside).mean(),
    }
    loss = (
        losses["cond"]
        + UNCOND_WEIGHT * losses["uncond"]
        + CACHED_WEIGHT * losses["cached"]
        + AGREEMENT_WEIGHT * losses["agreement"]
    )
    with torch.no_grad():
        metrics = {name: value.detach() for name, value in losses.items()}
        metrics["outside"] = _errors(cond, velocity, outside).mean()
        for name, band in (("low", sigmas < 0.5), ("high", sigmas >= 0.5)):
            metrics[name] = (cond_errors * band).sum() / band.sum().clamp(min=1)
    return loss, metrics


@dataclass(frozen=True)
class _BranchBatch:
    """The model's input rows: all windows as the conditional branch, then some as the other one."""

    scenes: Scene
    noisy: Tensor  # (B, C, T, h, w)
    reference: Tensor  # (B, C, 1, h, w)
    mask: Tensor  # (B, V, 1, h, w)
    cfg_weight: Tensor | None  # (B, 1, 1, 1, 1)
    windows: Tensor  # (R,), the window of each row
    is_cond: Tensor  # (R,)
    prompts: Tensor  # (R,), 0: the negative prompt

    @classmethod
    def of(cls, scenes: Scene, noise: Tensor, chances: Chances, *, has_cfg_loss: bool) -> Self:
        """The windows noised at the sigmas."""
        latents = scenes.latents
        count, device = len(latents), latents.device
        sigma = _over_latents(chances.sigmas)
        is_early = _over_latents(chances.is_early) > 0
        num_uncond = count if has_cfg_loss else max(1, round(UNCOND_SHARE * count))
        windows = torch.arange(count, device=device)
        windows = torch.cat([windows, windows[:num_uncond]])
        is_cond = torch.arange(len(windows), device=device) < count
        return cls(
            scenes=scenes,
            noisy=(1 - sigma) * latents + sigma * noise,
            reference=scenes.reference_mean + scenes.reference_std * torch.randn_like(latents),
            mask=torch.where(is_early, EARLY_FACE_MASK_SCALE * scenes.face_mask, scenes.face_mask),
            cfg_weight=_over_latents(chances.cfg_weight) if has_cfg_loss else None,
            windows=windows,
            is_cond=is_cond,
            prompts=torch.where(is_cond, 1, 1 - chances.is_negative[windows].long()),
        )

    @property
    def all_rows(self) -> Tensor:
        """The index of each row (R,)."""
        return torch.arange(len(self.windows), device=self.windows.device)

    def predict(
        self,
        transformer: HunyuanVideoAvatarTransformer3DModel,
        rows: Tensor,
        timesteps: Tensor,
        cached_tokens: CachedTokens | None = None,
    ) -> tuple[Tensor, CachedTokens]:
        """The velocity of these rows, and their tokens for the step cache."""
        scenes, windows = self.scenes, self.windows[rows]
        embeds = scenes.prompt_embeds[windows, self.prompts[rows]].float()
        audio = scenes.audio_embeds[windows] * self.is_cond[rows, None, None, None, None, None]
        # each weight is used once, so that nothing is gained by keeping what it is cast to
        with mixed_precision(embeds.device, cache_enabled=False):
            predicted, cached_tokens = transformer(
                hidden_states=self.noisy[windows],
                timestep=timesteps[windows],
                encoder_hidden_states=embeds,
                encoder_attention_mask=_whole_texts(*embeds.shape[:2], is_pinned=embeds.is_cuda),
                pooled_projections=scenes.pooled_prompt_embeds[windows, self.prompts[rows]],
                reference_latents=self.reference[windows],
                audio_embeds=audio.flatten(0, 1),
                face_mask=self.mask[windows],
                motion_expression=scenes.expression[windows, None].expand(-1, 4),
                motion_pose=scenes.pose[windows, None].expand(-1, 4),
                fps=torch.full((len(windows),), float(world.FPS), device=embeds.device),
                cached_tokens=cached_tokens,
                return_cached_tokens=True,
                return_dict=False,
            )
        assert cached_tokens is not None
        return predicted.float(), cached_tokens

    def guided_velocity(self, predicted: Tensor, count: int) -> Tensor:
        """The velocity of the first windows as the worker's scheduler gets it."""
        if self.cfg_weight is None:
            return predicted[:count]
        cond, uncond = predicted[:count], predicted[count:]
        return uncond + self.cfg_weight[:count] * (cond - uncond)


@functools.cache
def _whole_texts(rows: int, length: int, *, is_pinned: bool) -> Tensor:
    """The mask (rows, length) of texts without pads, kept where a CUDA graph finds it again."""
    return torch.ones(rows, length, dtype=torch.long, pin_memory=is_pinned)


def _sample_sigmas(count: int, rng: np.random.Generator, shift: float) -> Tensor:
    """Sigmas (B,), evenly spread before the shift."""
    share = (rng.permutation(count) + rng.random(count)) / count
    evenly = MIN_SIGMA + (1 - MIN_SIGMA) * share
    shifted = shift * evenly / (1 + (shift - 1) * evenly)
    return torch.tensor(shifted, dtype=torch.float32)


def _over_latents(values: Tensor) -> Tensor:
    """One value a sample, for (B, C, T, h, w)."""
    return values.view(-1, 1, 1, 1, 1)


def _rows_of(cached_tokens: CachedTokens, rows: Sequence[int]) -> CachedTokens:
    return CachedTokens(
        image=tuple(cached_tokens.image[row] for row in rows),
        text=tuple(cached_tokens.text[row] for row in rows),
    )


def _errors(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The weighted squared error (N,) of the first N windows."""
    count = len(predicted)
    return ((predicted - target[:count]).square() * weight[:count]).mean((1, 2, 3, 4))


class _Guidance(NamedTuple):
    """The worker's CFG settings for each window at its sigma."""

    weight: list[float]
    is_early: list[bool]  # the face mask is scaled down
    has_negative_prompt: list[bool]  # of the unconditional branch


def _random_guidance(sigmas: Tensor, rng: np.random.Generator) -> _Guidance:
    """That of runs with random numbers of steps."""
    shift = PARAMS.flow_shift
    remaining = sigmas / (shift - (shift - 1) * sigmas)  # of the run: 1 at its start
    lengths = rng.integers(*NUM_STEPS, len(sigmas), endpoint=True).tolist()
    steps = [
        min(int((1 - part) * length), length - 1)
        for part, length in zip(remaining.tolist(), lengths, strict=True)
    ]
    early = [step < PROMPT_GUIDED_STEPS for step in steps]
    weights = [
        guidance_weight(step, length, PARAMS.guidance_scale)
        for step, length in zip(steps, lengths, strict=True)
    ]
    return _Guidance(weights, early, early)


def _without_guidance(count: int, rng: np.random.Generator) -> _Guidance:
    """Random early and late steps; one random prompt for the unconditional rows of all."""
    early = (rng.random(count) < EARLY_STEP_SHARE).tolist()
    return _Guidance([1.0] * count, early, [bool(rng.integers(2))] * count)


def drawn_scenes(
    directory: Path,
    work: Path,
    seed: int,
    num_processes: int,
    shots: Sequence[Shot] = SHOTS,
    phases: Sequence[Phase] = PHASES,
) -> AbstractContextManager[Iterator[DrawnScene]]:
    """What the denoiser of this directory is trained on, other than in an earlier run."""
    draw = partial(draw_scene, work, seed, tuple(shots), SCENE_LATENTS)
    return prefetched(draw, num_processes, first=1000 * _steps_done(directory, phases))


def _steps_done(directory: Path, phases: Sequence[Phase]) -> int:
    return sum(steps_done(directory / phase.name) for phase in phases)


def train_transformer(
    directory: Path,
    work: Path,
    drawn: Iterator[DrawnScene],
    seed: int,
    device: torch.device,
    phases: Sequence[Phase] = PHASES,
    num_shots: int = len(SHOTS),
    first_scenes: int = FIRST_SCENES,
    deadline: float | None = None,
) -> HunyuanVideoAvatarTransformer3DModel:
    """The denoiser, trained phase by phase.

    Resumes an earlier run in the directory. The other two models are read from `work`. With a
    deadline, by `time.monotonic()`, the phases that are not over share the time until then. One
    that is over leaves the denoiser as the earlier run left it.

    Args:
        drawn: scenes of so many shots, by turns.
    """
    torch.manual_seed(seed)
    transformer = architecture.transformer().train()
    for parameter in transformer.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    transformer.to(device)
    _keep_tables(transformer)
    done = _steps_done(directory, phases)
    is_over = all(progress_of(directory / phase.name) == 1 for phase in phases)
    if done and time_for(deadline, 1.0, 0.0) == 0:
        phases = [phase for phase in phases if steps_done(directory / phase.name)]
        is_over = True
    scenes = map(SceneEncoder.load(work, device).encode, drawn)
    rng = np.random.default_rng((seed, done))
    torch.manual_seed(seed + done)
    buffer = SceneBuffer(scenes, num_shots, SCENES_PER_SHOT, rng)
    if not is_over:
        _make_first_scenes(buffer, max(first_scenes, num_shots), num_shots, deadline)
    for index, phase in enumerate(phases):
        later = sum(each.time_share for each in phases[index + 1 :])
        seconds = time_for(deadline, phase.time_share, later)
        logger.info("phase %s, step %d", phase.name, steps_done(directory / phase.name))
        train_phase(transformer, buffer, phase, rng, directory / phase.name, seconds)
    return transformer


def _keep_tables(transformer: HunyuanVideoAvatarTransformer3DModel) -> None:
    """Lets it copy its tables of positions to the device once: no CUDA graph holds such copies."""
    for module, name in ((transformer.rope, "forward"), (transformer.sinusoid, "frequencies")):
        setattr(module, name, functools.cache(getattr(module, name)))


def _make_first_scenes(
    buffer: SceneBuffer, count: int, fewest: int, deadline: float | None
) -> None:
    """So many scenes, or as many as come in time."""
    begun = time.monotonic()
    seconds = time_for(deadline, FIRST_SCENES_SHARE, 1 - FIRST_SCENES_SHARE)
    for made in range(count):
        if seconds is not None and made >= fewest and time.monotonic() - begun > seconds:
            count = made
            break
        buffer.add()
    logger.info("%d scenes in %.0f s", count, time.monotonic() - begun)


def train_phase(
    transformer: HunyuanVideoAvatarTransformer3DModel,
    buffer: SceneBuffer,
    phase: Phase,
    rng: np.random.Generator,
    directory: Path,
    seconds: float | None = None,
) -> None:
    """Trains the denoiser in place, or loads what an earlier run of the phase left."""
    steps = itertools.count()
    if phase.has_cfg_loss and not steps_done(directory):
        with torch.no_grad():
            for name, weight in transformer.named_parameters():
                if name.endswith("audio_adapter.to_out.weight"):
                    weight *= AUDIO_SCALE
    names = [field.name for field in dataclasses.fields(Scene) if field.name != "places"]
    num_chances = len(Chances._fields)

    def loss(*inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        chances, values = inputs[:num_chances], inputs[num_chances:]
        # a crop is made of the places, and nothing afterwards
        scenes = Scene(**dict(zip(names, values, strict=True)), places=torch.empty(0))
        return denoising_loss(
            transformer, scenes, Chances(*chances), has_cfg_loss=phase.has_cfg_loss
        )

    gradients = LossGradients(transformer, loss)

    def backward() -> dict[str, Tensor]:
        step = next(steps)
        if (step + 1) % phase.steps_a_scene == 0:
            buffer.add()
        windows = phase.windows[step % len(phase.windows)]
        circular_share = CIRCULAR_SHARE if windows.length == WINDOW_LATENTS else 0.0
        scenes = buffer.sample(windows.count, windows.length, circular_share, windows.crop)
        chances = Chances.draw(
            windows.count,
            rng,
            has_cfg_loss=phase.has_cfg_loss,
            sigma_shift=windows.sigma_shift,
        )
        values = (getattr(scenes, name) for name in names)
        return gradients(*chances.to(scenes.latents.device), *values)

    train(
        transformer.train(),
        backward,
        directory=directory,
        steps=phase.steps,
        learning_rate=phase.learning_rate,
        decay_share=phase.decay_share,
        seconds=seconds,
    )
