"""The parts of the trained demo model: the published architecture at toy width."""

import torch
from diffusers import AutoencoderKLHunyuanVideo
from transformers import CLIPTextModel, LlavaModel

from worker.demo import (
    POOLED_DIM,
    TEXT_DIM,
    pooled_text_encoder,
    prompt_tokenizer,
    text_encoder,
)
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

LATENT_CHANNELS = 16
AUDIO_STATES = (10, 5, 64)  # a window of the audio encoder's states


def transformer() -> HunyuanVideoAvatarTransformer3DModel:
    """The denoiser."""
    return HunyuanVideoAvatarTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=3,
        attention_head_dim=64,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=0,
        mlp_ratio=2.0,  # wide and shallow: a token has to carry 64 values and 64 of the portrait's
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(16, 24, 24),
        audio_window_shape=AUDIO_STATES,
        audio_intermediate_dim=96,
        audio_attention_dim=128,
    )


def autoencoder() -> AutoencoderKLHunyuanVideo:
    """The autoencoder: 8 x 8 pixels x 4 frames to a latent."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 32, 48),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,  # over all tokens of a tile: slow, and nothing here is far
    )


def text_encoders() -> tuple[LlavaModel, CLIPTextModel]:
    """The two text encoders, with random weights that are always the same: no prompt matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20250526)
        return text_encoder(prompt_tokenizer()).eval(), pooled_text_encoder().eval()
