"""How a video is computed: one value from the request to the sampling loop."""

from dataclasses import dataclass
from typing import Self

import torch

from avatar_client.contract.presets import PRESETS
from avatar_client.contract.request import GenerationParams
from worker.shapes import ComputedSteps, uses_cfg


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiseOptions:
    """How the latents of one video are computed, whatever it shows."""

    num_inference_steps: int = 50  # from noise to video
    guidance_scale: float = 7.5  # weight of the prompt in the first steps; 1 or less: no CFG
    flow_shift: float = 5.0  # how much of the steps is spent at high noise
    # The steps that run all blocks, as `worker.shapes.resolve_computed_steps` takes them; the
    # others read the step cache.
    computed_steps: ComputedSteps = None
    float8: bool = False  # the transformer's linear layers in 8 bits; compute capability 8.9
    # Relative norm by which sparse attention may be off; None: all is computed.
    attention_tolerance: float | None = None
    # What the latents are rounded to after each step; None: bfloat16, as in the reference.
    latents_dtype: torch.dtype | None = None
    first_step: int = 0  # the steps before it were done in an earlier run

    @classmethod
    def from_params(
        cls, params: GenerationParams, *, has_float8: bool, has_sparse_attention: bool = False
    ) -> Self:
        """What the request and its preset ask for, on a device that can do this or cannot."""
        preset = PRESETS[params.preset]
        return cls(
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            flow_shift=params.flow_shift,
            computed_steps=preset.step_cache_schedule.computed_steps(params.num_inference_steps),
            float8=preset.float8 and has_float8,
            attention_tolerance=preset.attention_tolerance if has_sparse_attention else None,
        )

    @property
    def uses_cfg(self) -> bool:
        """Whether each step has an unconditional branch."""
        return uses_cfg(self.guidance_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions:
    """How the latents of one video become frames."""

    num_frames: int  # of the video
    scratch_bytes: int  # of the chunk that is decoded
