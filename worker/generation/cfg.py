"""Classifier-free guidance (CFG): what its branches are given, and how their velocities become one.

The unconditional branch never gets the audio; in the first steps it gets the negative prompt too,
and later both get the same one, so that only the audio guides.

Source: arXiv 2207.12598; Tencent-Hunyuan/HunyuanVideo-Avatar@fd59436, its weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from worker.generation.conditioning import NEGATIVE, POSITIVE, Conditioning
from worker.generation.step_cache import StepCache

PROMPT_GUIDED_STEPS = 10  # then both branches have the prompt, and guidance is by the audio alone
EARLY_FACE_MASK_SCALE = 0.6  # until then the face gets less of the audio


@dataclass(frozen=True)
class CFGBranch:
    """A branch: its audio, its prompt while the prompt guides, its tokens for cached steps."""

    audio_embeds: Tensor  # (V, F, 10, 5, 384)
    early_prompt: int  # row of the pairs in `Conditioning`
    step_cache: StepCache = field(default_factory=StepCache)


def cfg_branches(conditioning: Conditioning, *, uses_cfg: bool) -> list[CFGBranch]:
    """The unconditional and the conditional branch; without CFG the conditional one alone."""
    audio = conditioning.audio_embeds
    silence = audio.new_zeros(()).expand_as(audio)  # which takes no memory
    on_host = not conditioning.plan.single_window
    cond = CFGBranch(audio, POSITIVE, StepCache(on_host=on_host))
    uncond = CFGBranch(silence, NEGATIVE, StepCache(on_host=on_host))
    return [uncond, cond] if uses_cfg else [cond]


def guidance_weight(step: int, num_inference_steps: int, guidance_scale: float) -> float:
    """How far to go from the unconditional to the conditional velocity in this step.

    Falls from `guidance_scale` towards 2 while the prompt guides, then from 6.5 to 3.5 whatever
    the scale: the audio's weight is the model's own.
    """
    left = 1 - step / num_inference_steps
    if step < PROMPT_GUIDED_STEPS:
        return left * (guidance_scale - 2) + 2
    return left * 3 + 3.5


def apply_cfg(velocities: Sequence[Tensor], weight: float) -> Tensor:
    """The velocity to follow, from [uncond, cond] or from [cond] alone."""
    if len(velocities) == 1:
        return velocities[0]
    uncond, cond = velocities
    return uncond + weight * (cond - uncond)
