"""The published arithmetic, rebuilt from diffusers' parts, to be measured beside the worker's.

Both CFG branches in one batch, operator after operator, FlashAttention 2, the autoencoder
on 129 copies of the portrait twice, and diffusers' own tiled decode. Where the published code does
more (float32 parts, padded text, a wait for the GPU in each step) it is given less to do here.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from torch import Tensor

from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

FLASH_ATTENTION = "_native_flash"
FRAMES = 129


def forward(
    model: HunyuanVideoAvatarTransformer3DModel,
    inputs: dict[str, Tensor],  # as its own forward takes them, a batch of two
    cached_tokens: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Velocity (2, C, T, H, W) and cached tokens, by the published arithmetic."""
    latents = inputs["hidden_states"]
    num_frames, height, width = latents.shape[2:]
    grid = (num_frames, height // 2, width // 2)
    rotary = model.rope(*grid, latents.device)
    scalars = ("timestep", "pooled_projections", "motion_expression", "motion_pose", "fps")
    temb = model.embed_conditions(*(inputs[name] for name in scalars))
    image = model.embed_latents(latents, inputs["reference_latents"])
    mask = inputs["encoder_attention_mask"]
    text = torch.cat(
        model.embed_text(inputs["encoder_hidden_states"], inputs["timestep"], mask)
    )  # equally long
    audio_tokens = model.audio_proj(inputs["audio_embeds"].to(image.dtype))  # (2, T, A, D)
    if cached_tokens is None:
        gate, _ = model.gate_audio(inputs["face_mask"], num_frames)
        gate = gate[:, :, 1:]  # (2, S, T, 1)
        block: Any
        for block in model.transformer_blocks:
            image, text = HunyuanVideoTransformerBlock.forward(
                block, image, text, temb, None, rotary
            )
            if block.audio_adapter is not None:
                columns = image.unflatten(1, (-1, 1 + num_frames))
                audio_delta = gate * block.audio_adapter(columns[:, :, 1:], audio_tokens[:, None])
                columns = torch.cat([columns[:, :, :1], columns[:, :, 1:] + audio_delta], dim=2)
                image = columns.flatten(1, 2)
        for block in model.single_transformer_blocks[:-1]:
            image, text = HunyuanVideoSingleTransformerBlock.forward(
                block, image, text, temb, None, rotary
            )
        cached_tokens = (image, text)
    image, _ = HunyuanVideoSingleTransformerBlock.forward(
        model.single_transformer_blocks[-1], *cached_tokens, temb, None, rotary
    )
    patches = model.proj_out(model.norm_out(image, temb))
    return model.unpatchify(patches, grid), cached_tokens


def encode(vae: AutoencoderKLHunyuanVideo, portrait: Tensor) -> None:  # (1, 3, 1, H, W)
    """Both encodings of the portrait; the second is never used."""
    for _ in range(2):
        vae.encode(portrait.expand(-1, -1, FRAMES, -1, -1))


def decode(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:  # (1, 3, F, H, W)
    """diffusers' decode in the reference's tiles."""
    vae.use_framewise_decoding = True
    return vae.decode(latents).sample
