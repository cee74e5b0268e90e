"""The parts of the sampling loop: noise levels, guidance, windows on the ring of latents.

Pure functions on tensors, and `TailRing`, which holds the tokens that cached steps reuse. Nothing
here waits for the GPU. The latents of a long video are a ring: a window that runs over the end goes
on at the start. Shape letters: B batch, C channels, T latent frames of the ring, h and w latents.
"""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn.functional import pad

from worker.shapes import TEMPORAL_COMPRESSION, WINDOW_FRAMES, WINDOW_LATENTS, VideoPlan

PROMPT_GUIDED_STEPS = 10  # then both branches have the prompt, and guidance is by the audio alone
EARLY_FACE_MASK = 0.6  # the face hears less in these steps


def noise_levels(
    scheduler: FlowMatchEulerDiscreteScheduler, num_inference_steps: int, flow_shift: float
) -> tuple[Tensor, Tensor]:
    """Sigmas (num_inference_steps + 1) from 1 to 0 and timesteps (num_inference_steps), on the CPU.

    The scheduler itself is left as it is. Its own default spacing is another one, and numpy's
    linspace differs in the last bit.
    """
    levels = type(scheduler).from_config(scheduler.config, shift=flow_shift)
    evenly = torch.linspace(1, 0, num_inference_steps + 1)[:-1]
    levels.set_timesteps(sigmas=evenly.tolist())
    return levels.sigmas, levels.timesteps


def draw_noise(
    shape: Sequence[int], generator: torch.Generator, device: torch.device
) -> Tensor:  # float32
    """Normal noise, drawn where the generator is: in float16 on a GPU, in float32 on a CPU.

    On a GPU the reference draws in float16, so the same seed gives the same video only this way.
    """
    dtype = torch.float16 if generator.device.type == "cuda" else torch.float32
    noise = torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype)
    return noise.to(device, torch.float32)


def guidance_weight(step: int, num_inference_steps: int, guidance_scale: float) -> float:
    """How far to go from the unconditional to the conditional velocity in this step.

    Falls from `guidance_scale` towards 2 while the prompt guides, then from 6.5 to 3.5 whatever
    the scale: the audio's weight is the model's own.
    """
    left = 1 - step / num_inference_steps
    if step < PROMPT_GUIDED_STEPS:
        return left * (guidance_scale - 2) + 2
    return left * 3 + 3.5


def is_guided(guidance_scale: float) -> bool:
    """Whether there is an unconditional side to go away from."""
    return guidance_scale > 1


def guide(velocities: Sequence[Tensor], weight: float) -> Tensor:
    """The velocity to follow, from [unconditional, conditional] or from the conditional alone."""
    if len(velocities) == 1:
        return velocities[0]
    unconditional, conditional = velocities
    return unconditional + weight * (conditional - unconditional)


def window_starts(plan: VideoPlan, step: int) -> list[int]:
    """First latent frame of each window of this step; a negative one is counted from the end."""
    shift = step * plan.shift % WINDOW_LATENTS
    return [start - shift for start in range(0, plan.sampled_latents, WINDOW_LATENTS)]


def ring_frames(start: int, length: int, ring: int) -> list[int]:
    """The places on the ring of `length` frames from `start`."""
    return [(start + offset) % ring for offset in range(length)]


def take(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
    """`length` entries from `start` on, along a dimension that is a ring."""
    return tensor.index_select(dim, _places(tensor, dim, start, length))


def add(tensor: Tensor, dim: int, start: int, values: Tensor) -> None:
    """Adds values from `start` on, along a dimension that is a ring, in place."""
    tensor.index_add_(dim, _places(tensor, dim, start, values.shape[dim]), values)


def _places(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
    return torch.arange(start, start + length, device=tensor.device) % tensor.shape[dim]


def ring_audio(
    audio_embeds: Tensor,  # (B, padded audio frames, 10, 5, 384)
    plan: VideoPlan,
) -> Tensor:  # (B, 4T, 10, 5, 384)
    """The audio with silence (zeros) for the rest of the ring."""
    missing = TEMPORAL_COMPRESSION * plan.sampled_latents - audio_embeds.shape[1]
    return pad(audio_embeds, (0, 0, 0, 0, 0, 0, 0, missing))


def window_audio(audio_embeds: Tensor, start: int) -> Tensor:
    """The 129 audio frames of the window that starts at latent frame `start`."""
    return take(audio_embeds, 1, TEMPORAL_COMPRESSION * start, WINDOW_FRAMES)


class TailRing:
    """The last tokens of every latent frame, each from the window that computed it last.

    They enter the last block again on cached steps. When the windows have moved on, a window is
    put together from frames of several older ones; its reference frame and its text come from the
    older window of its first frame, as in the reference.
    """

    def __init__(self) -> None:
        # of each latent frame: a window's image tokens and text, and the frame's place among them
        self._tokens: dict[int, tuple[Tensor, Tensor, int]] = {}

    def clear(self) -> None:
        """Forgets all tokens."""
        self._tokens.clear()

    def store(self, frames: Sequence[int], image: Tensor, text: Tensor) -> None:
        """Keeps the tokens of a window of these latent frames: (1 + T, S, D) and (L, D)."""
        for place, frame in enumerate(frames):
            self._tokens[frame] = (image, text, 1 + place)

    def gather(self, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The same for a window of these latent frames."""
        first, text, _ = self._tokens[frames[0]]
        parts = [first[0], *(self._frame(frame) for frame in frames)]
        return torch.stack(parts), text

    def _frame(self, frame: int) -> Tensor:  # (S, D)
        image, _, place = self._tokens[frame]
        return image[place]
