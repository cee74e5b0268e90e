"""The parts of the sampling loop: noise levels, noise, windows on the circular latents.

Pure functions on tensors; nothing here waits for the GPU. The latents of a long video are circular:
a window that runs over the end goes on at the start. Shape letters: B batch, C channels, T latent
frames, h and w latents.
"""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from worker.generation.conditioning import Conditioning
from worker.shapes import TEMPORAL_COMPRESSION, WINDOW_FRAMES, WINDOW_LATENTS, VideoPlan


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


def unrepeatable_generator() -> torch.Generator:
    """One that the system has seeded; the global generator stays untouched."""
    generator = torch.Generator()
    generator.seed()
    return generator


def prepare_latents(
    conditioning: Conditioning,
    scaling_factor: float,
    generator: torch.Generator,
    latents: Tensor | None = None,
    reference_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # (1, C, T, h, w), (1, C, 33, h, w)
    """Noise for the circular latents, and the portrait's latents with theirs.

    Args:
        scaling_factor: of the autoencoder's latents.
        generator: draws the noise, then the portrait's.
        latents: the noise instead, (1, C, plan.noise_latents, h, w).
        reference_noise: the noise in the portrait's latents instead, (1, C, 33, h, w).

    Raises:
        ValueError: noise of another shape.
    """
    plan = conditioning.plan
    mean, std = conditioning.reference_mean, conditioning.reference_std
    _, channels, _, *size = mean.shape
    shape = (1, channels, plan.noise_latents, *size)
    latents = _given_or_drawn(latents, "latents", shape, generator, like=mean)
    shape = (1, channels, WINDOW_LATENTS, *size)
    noise = _given_or_drawn(reference_noise, "reference_noise", shape, generator, like=mean)
    reference_latents = (mean + std * noise) * scaling_factor
    return latents[:, :, : plan.sampled_latents], reference_latents


def _given_or_drawn(
    given: Tensor | None, name: str, shape: Sequence[int], generator: torch.Generator, like: Tensor
) -> Tensor:
    """The noise that was given, if it has the right shape, or else drawn; float32."""
    if given is None:
        return draw_noise(shape, generator, like.device)
    if tuple(given.shape) != tuple(shape):
        raise ValueError(f"{name} must be of shape {tuple(shape)}, not {tuple(given.shape)}")
    return given.to(like.device, torch.float32)


def window_starts(plan: VideoPlan, step: int) -> list[int]:
    """First latent frame of each window of this step; a negative one is counted from the end."""
    shift = step * plan.shift % WINDOW_LATENTS
    return [start - shift for start in range(0, plan.sampled_latents, WINDOW_LATENTS)]


def circular_indices(start: int, length: int, size: int) -> list[int]:
    """The indices of `length` frames from `start` on, of `size` that are circular."""
    return [(start + offset) % size for offset in range(length)]


def gather_circular(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
    """`length` entries from `start` on, along a circular dimension."""
    return tensor.index_select(dim, _indices(tensor, dim, start, length))


def add_circular(tensor: Tensor, dim: int, start: int, values: Tensor) -> None:
    """Adds values from `start` on, along a circular dimension, in place."""
    tensor.index_add_(dim, _indices(tensor, dim, start, values.shape[dim]), values)


def _indices(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
    return torch.arange(start, start + length, device=tensor.device) % tensor.shape[dim]


def window_audio(
    audio_embeds: Tensor,  # (B, F, 10, 5, 384)
    start: int,
    num_latents: int,
) -> Tensor:  # (B, 129, 10, 5, 384)
    """The audio frames of the window that starts at latent frame `start` of the circular latents.

    Behind the speech is silence (zeros), up to the end of the latents.
    """
    num_frames = audio_embeds.shape[1]
    frames = torch.arange(WINDOW_FRAMES, device=audio_embeds.device)
    frames = (TEMPORAL_COMPRESSION * start + frames) % (TEMPORAL_COMPRESSION * num_latents)
    window = audio_embeds.index_select(1, frames.clamp(max=num_frames - 1))
    return window.masked_fill_((frames >= num_frames).view(-1, 1, 1, 1), 0)
