"""A model of random weights: the real architecture, as narrow as it gets.

Its pictures are coloured noise. It stands in for the demo model where a test is about all else that
a job does, and is ten times as quick.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from training.architecture import (
    POOLED_DIM,
    TEXT_DIM,
    pooled_text_encoder,
    pooled_tokenizer,
    prompt_tokenizer,
    text_encoder,
)
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.loading import preview
from worker.model.latent_to_rgb import LatentToRGB
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

SEED = 20250526
LATENT_CHANNELS = 4


def write(model_dir: Path) -> None:
    """Writes the model directory; the same weights on every machine."""
    tokenizer = prompt_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        pipeline = HunyuanVideoAvatarPipeline(
            transformer=_transformer().eval(),
            vae=_vae().eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            text_encoder=text_encoder(tokenizer).eval(),
            tokenizer=tokenizer,
            text_encoder_2=pooled_text_encoder().eval(),
            tokenizer_2=pooled_tokenizer(),
            audio_encoder=_audio_encoder().eval(),
            feature_extractor=WhisperFeatureExtractor(feature_size=80),
        )
        weight = torch.randn(12, LATENT_CHANNELS, 3, 3) / 10
    pipeline.save_pretrained(model_dir)
    preview.save(LatentToRGB(weight, torch.full((12,), 0.5)), model_dir)


def _transformer() -> HunyuanVideoAvatarTransformer3DModel:
    return HunyuanVideoAvatarTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=1,
        attention_head_dim=32,  # the narrowest for which attention is quick on a CPU
        num_layers=2,  # the second has audio: there the branches of guidance part
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(8, 12, 12),
        audio_intermediate_dim=16,
        audio_attention_dim=16,
    )


def _vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(2, 2, 2, 2),
        layers_per_block=0,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )


def _audio_encoder() -> WhisperModel:
    return WhisperModel(
        WhisperConfig(  # the width and depth of whisper-tiny are part of the avatar's interface
            d_model=384,
            encoder_layers=4,
            encoder_attention_heads=6,
            encoder_ffn_dim=32,
            decoder_layers=0,
            decoder_attention_heads=6,
            decoder_ffn_dim=16,
            vocab_size=32,
            num_mel_bins=80,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )
