"""One denoising step: what the transformer predicts for each window, CFG, and the latents after it.

Shape letters: C channels, T latent frames of the circular latents, h and w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from worker.generation import cfg, sampling
from worker.generation.conditioning import POSITIVE, Conditioning
from worker.generation.options import DenoiseOptions
from worker.generation.preview import FramePreview
from worker.model.sparse_attention import SparseAttention
from worker.model.transformer import CachedTokens, HunyuanVideoAvatarTransformer3DModel
from worker.multi_gpu.parallel import BranchParallel
from worker.shapes import WINDOW_LATENTS, resolve_computed_steps

DENSE_STEPS = 2  # that see all keys; in the last of them sparse attention learns what it may skip


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step."""

    index: int
    timestep: Tensor  # (1,)
    sigma: float  # the noise level
    sigma_change: float  # of the noise level, below 0
    guidance_weight: float
    reads_cache: bool  # a cached step
    writes_cache: bool  # a computed step before a cached one

    @property
    def is_prompt_guided(self) -> bool:
        """Whether the prompt guides; later both branches have it and only the audio guides."""
        return self.index < cfg.PROMPT_GUIDED_STEPS


def denoising_steps(
    options: DenoiseOptions, scheduler: FlowMatchEulerDiscreteScheduler, device: torch.device
) -> list[Step]:
    """The steps of a run, in order.

    Raises:
        ValueError: unusable steps, or a first one that needs what one before it has computed.
    """
    count = options.num_inference_steps
    cached = set(range(count)) - resolve_computed_steps(options.computed_steps, count)
    sigmas, timesteps = sampling.noise_levels(scheduler, count, options.flow_shift)
    timesteps = timesteps.to(device)
    steps = [
        Step(
            index=index,
            timestep=timesteps[index : index + 1],
            sigma=sigmas[index].item(),
            sigma_change=(sigmas[index + 1] - sigmas[index]).item(),
            guidance_weight=cfg.guidance_weight(index, count, options.guidance_scale),
            reads_cache=index in cached,
            writes_cache=index not in cached and index + 1 in cached,
        )
        for index in range(count)
    ]
    if not can_begin_at(steps, options.first_step):
        raise ValueError(f"first_step must be a computed step or {count}, not {options.first_step}")
    return steps


def can_begin_at(steps: Sequence[Step], index: int) -> bool:
    """Whether the steps from this one on need latents alone; none need nothing."""
    return index == len(steps) or (0 <= index < len(steps) and not steps[index].reads_cache)


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """The transformer with all that it is told about one video."""

    transformer: HunyuanVideoAvatarTransformer3DModel
    conditioning: Conditioning
    reference_latents: Tensor  # (1, C, 33, h, w)
    branches: Sequence[cfg.CFGBranch]  # that this process computes
    options: DenoiseOptions
    parallel: BranchParallel  # with the ranks that compute the other branches
    sparsity: SparseAttention | None = None  # after the first steps
    preview: FramePreview | None = None  # sees what each step predicts

    def step(self, latents: Tensor, step: Step) -> Tensor:  # 2 x (1, C, T, h, w) float32
        """The latents after the step; where windows overlap, their mean."""
        if not step.reads_cache:
            for branch in self.branches:
                branch.step_cache.clear()  # gigabytes that nothing reads any more
        total = torch.zeros_like(latents)
        count = torch.zeros_like(latents[:1, :1, :, :1, :1])  # (1, 1, T, 1, 1)
        for start in sampling.window_starts(self.conditioning.plan, step.index):
            window = sampling.gather_circular(latents, 2, start, WINDOW_LATENTS)
            velocities = self.parallel.all_gather(self.velocities(window, start, step))
            velocity = cfg.apply_cfg(velocities, step.guidance_weight)
            if self.preview is not None:
                self.preview.see(window, velocity, step.sigma, self._frames(start))
            window = window + velocity * step.sigma_change
            window = window.to(self.options.latents_dtype or torch.bfloat16).float()
            sampling.add_circular(total, 2, start, window)
            sampling.add_circular(count, 2, start, torch.ones_like(window[:1, :1, :, :1, :1]))
        return total / count

    def velocities(
        self,
        window: Tensor,  # (1, C, 33, h, w)
        start: int,  # of the window on the circular latents
        step: Step,
    ) -> list[Tensor]:  # (1, C, 33, h, w) float32, one a branch
        """What the transformer predicts for one window, for each of this process's branches.

        Once the prompt no longer guides, the branches differ in their audio alone: they are one
        sample with several recordings.
        """
        told = self.conditioning
        early = step.is_prompt_guided
        prompts = [branch.early_prompt for branch in self.branches] if early else [POSITIVE]
        batch = len(prompts)
        frames = self._frames(start)
        face_mask = told.face_mask * (cfg.EARLY_FACE_MASK_SCALE if early else 1.0)
        motion = window.new_ones(batch, 4)
        output = self.transformer(
            hidden_states=window.expand(batch, -1, -1, -1, -1),
            timestep=step.timestep.expand(batch),
            encoder_hidden_states=_rows(told.prompt_embeds, prompts),
            encoder_attention_mask=_rows(told.prompt_mask, prompts),
            pooled_projections=_rows(told.pooled_prompt_embeds, prompts),
            reference_latents=self.reference_latents.expand(batch, -1, -1, -1, -1),
            audio_embeds=torch.cat(
                [
                    sampling.window_audio(branch.audio_embeds, start, told.plan.sampled_latents)
                    for branch in self.branches
                ]
            ),
            face_mask=face_mask.expand(batch, -1, -1, -1, -1),
            motion_expression=motion * told.motion_expression,
            motion_pose=motion * told.motion_pose,
            fps=motion[:, 0] * told.fps,
            cached_tokens=self._read_cache(frames) if step.reads_cache else None,
            return_cached_tokens=step.writes_cache,
            float8=self.options.float8,
            sparsity=self.sparsity if step.index >= DENSE_STEPS - 1 else None,
        )
        if step.writes_cache:
            tokens = output.cached_tokens
            for branch, image, text in zip(self.branches, tokens.image, tokens.text, strict=True):
                branch.step_cache.write(frames, image, text)
        return list(output.sample.float().split(1))

    def _frames(self, start: int) -> list[int]:
        """The latent frames of the video that the window from `start` on covers."""
        size = self.conditioning.plan.sampled_latents
        return sampling.circular_indices(start, WINDOW_LATENTS, size)

    def _read_cache(self, frames: Sequence[int]) -> CachedTokens:
        tokens = [branch.step_cache.read(frames) for branch in self.branches]
        images, texts = zip(*tokens, strict=True)
        return CachedTokens(images, texts)


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Those rows. Indexed by their numbers a GPU would have to be sent these, and waited for."""
    return torch.stack([tensor[row] for row in rows])
