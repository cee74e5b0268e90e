"""The published networks with random weights, what they take, and how benchmarks report."""

import json
import math
import sys
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn

from worker.model import autoencoder
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

TEXT_POSITIONS, TEXT_LENGTH = 831, 400  # that a prompt is padded to, and its own


def build_transformer(
    device: torch.device, dtype: torch.dtype, **config: int
) -> HunyuanVideoAvatarTransformer3DModel:
    """The model with random weights that keep activations in a trained model's range."""
    with torch.device("meta"):
        model = HunyuanVideoAvatarTransformer3DModel(
            **config, rope_axes_dim=(16, 56, 56), attention_head_dim=128
        )
    model = model.to(dtype).to_empty(device=device)
    _draw_weights(model, device)
    return model.eval()


def build_autoencoder(
    device: torch.device, dtype: torch.dtype, **config: Any
) -> AutoencoderKLHunyuanVideo:
    """The same of the autoencoder, with the worker's tiles."""
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo(**config)
    vae = vae.to(dtype).to_empty(device=device)
    _draw_weights(vae, device)
    autoencoder.set_tiles(vae)
    return vae.eval()


def _draw_weights(model: nn.Module, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            spread = 1 / math.sqrt(parameter[0].numel())
            parameter.data.normal_(std=spread, generator=generator)
        else:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)


def random_inputs(
    model: HunyuanVideoAvatarTransformer3DModel,
    batch: int,
    grid: tuple[int, int, int],
    text_positions: int,
    text_length: int,
) -> dict[str, Tensor]:
    """What one forward takes; the mask stays on the CPU."""
    device, config = model.device, model.config
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, generator=generator)

    def constant(value: float, *shape: int) -> Tensor:
        return torch.full((batch, *shape), value, device=device)

    mask = (torch.arange(text_positions) < text_length).long()
    return {
        "hidden_states": normal(config.in_channels, *grid),
        "timestep": constant(937.5),
        "encoder_hidden_states": normal(text_positions, config.text_embed_dim),
        "encoder_attention_mask": mask.expand(batch, -1),
        "pooled_projections": normal(config.pooled_projection_dim),
        "reference_latents": normal(config.in_channels, *grid),
        "audio_embeds": normal(4 * grid[0] - 3, *config.audio_window_shape),
        "face_mask": constant(1.0, 1, 1, *grid[1:]),
        "motion_expression": constant(30.0, 4),
        "motion_pose": constant(25.0, 4),
        "fps": constant(25.0),
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_difference(value: Tensor, expected: Tensor) -> float:
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm()).item()


def report(**measurement: Any) -> None:
    sys.stdout.write(json.dumps(measurement) + "\n")
    sys.stdout.flush()
