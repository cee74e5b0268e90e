"""The denoiser: HunyuanVideo-Avatar's transformer, composed from diffusers' HunyuanVideo blocks.

The reference reuses, on some denoising steps, what the early blocks computed on an earlier step,
and runs the last single-stream block only. Here that is two arguments of `forward`, and the module
keeps nothing between calls:

    output = transformer(latents, ..., return_tail=True)
    output.tail.image  # (B, 1 + T, S, D): [:, 0] the reference frame, [:, 1:] the latent frames
    output.tail.text   # B tensors (L, D): the text, cut to the valid length of each sample
    cached = transformer(later_latents, ..., tail=Tail(image, text)).sample

A tail is the input of the last single-stream block. It may be put together from the tails of
several calls: any frames of the same size in any order (the last block gives the k-th one the
position of latent frame k). With `tail` only `timestep`, `pooled_projections`, `motion_expression`,
`motion_pose` and `fps` are read beside it, and of `hidden_states` only the shape.

Tokens run over the rows and columns of a frame first and over its frames last ("spatial-major":
all frames of one patch, reference frame first, then the next patch), so that a contiguous share of
them holds whole columns in time and context parallel leaves the audio adapter local to each rank.

Shape letters: B batch, C latent channels, T latent frames, H and W latent height and width,
S = (H/2)(W/2) tokens a frame, L valid text tokens, D width, A audio tokens a latent frame.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import TransformerBlockRegistry
from diffusers.hooks._helpers import TransformerBlockMetadata
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_1d_rotary_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoConditionEmbedding,
    HunyuanVideoPatchEmbed,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTokenRefiner,
    HunyuanVideoTransformerBlock,
)
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import Tensor, nn

from worker.model.audio_adapter import AudioAdapter, AudioProjection
from worker.model.float8 import replace_linears


@dataclass(frozen=True)
class Tail:
    """The tokens that enter the last single-stream block.

    Under context parallel each rank holds its own share of S and of L.
    """

    image: Tensor  # (B, 1 + T, S, D), the reference frame first
    text: tuple[Tensor, ...]  # B tensors (L, D); L differs where the samples' masks differ


@dataclass
class AvatarTransformerOutput(BaseOutput):
    """The velocity `sample` (B, C, T, H, W), and the tail if it was asked for."""

    sample: Tensor
    tail: Tail | None = None


class AvatarTransformerBlock(HunyuanVideoTransformerBlock):
    """A double-stream block; one with an adapter hears the audio after its feed-forward.

    The adapter is part of the block, so that a cache that skips the block skips the audio too.
    """

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        audio_adapter: AudioAdapter | None,
    ) -> None:
        super().__init__(num_attention_heads, attention_head_dim, mlp_ratio)
        self.audio_adapter = audio_adapter

    def forward(
        self,
        hidden_states: Tensor,  # (B, S(1 + T), D)
        encoder_hidden_states: Tensor,  # (B, L, D)
        temb: Tensor,  # (B, D)
        image_rotary_emb: tuple[Tensor, Tensor],  # 2 x (S(1 + T), head dim)
        audio_tokens: Tensor,  # (B, T, A, D)
        audio_gate: Tensor,  # (B, S, T, 1)
    ) -> tuple[Tensor, Tensor]:
        hidden_states, encoder_hidden_states = super().forward(
            hidden_states, encoder_hidden_states, temb, None, image_rotary_emb
        )
        if self.audio_adapter is not None:
            columns = hidden_states.unflatten(1, (-1, 1 + audio_tokens.shape[1]))
            reference, frames = columns[:, :, :1], columns[:, :, 1:]  # (B, S, 1 and T, D)
            frames = frames + audio_gate * self.audio_adapter(frames, audio_tokens)
            hidden_states = torch.cat([reference, frames], dim=2).flatten(1, 2)
        return hidden_states, encoder_hidden_states


TransformerBlockRegistry.register(AvatarTransformerBlock, TransformerBlockMetadata(0, 1))


class AvatarRotaryPosEmbed(nn.Module):
    """Rotary tables of all image tokens; the reference frame stands at -1, before frame 0."""

    def __init__(self, axes_dim: tuple[int, int, int], theta: float) -> None:
        super().__init__()
        self.axes_dim = axes_dim
        self.theta = theta

    def forward(
        self, num_frames: int, height: int, width: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (height * width * (1 + num_frames), head dim), float32.

        The table of each axis is small and is made on the CPU, so that every device gets the same
        bits; the device only spreads them over the grid.
        """
        frame_axis = torch.arange(-1, num_frames, dtype=torch.float32)
        grid = (height, width, 1 + num_frames)
        axes = [(frame_axis, (1, 1, -1)), (height, (-1, 1, 1)), (width, (1, -1, 1))]
        cosines, sines = [], []
        for (axis, view), dim in zip(axes, self.axes_dim, strict=True):
            positions = torch.arange(axis).float() if isinstance(axis, int) else axis
            tables = get_1d_rotary_pos_embed(dim, positions, self.theta, use_real=True)
            cosine, sine = (table.to(device).view(*view, dim) for table in tables)
            cosines.append(cosine.expand(*grid, dim))
            sines.append(sine.expand(*grid, dim))
        return torch.cat(cosines, dim=-1).flatten(0, 2), torch.cat(sines, dim=-1).flatten(0, 2)


class HunyuanVideoAvatarTransformer3DModel(
    ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin, CacheMixin
):
    """The velocity of noisy video latents, given a portrait, a prompt and speech.

    The modules that HunyuanVideo has too carry the names of diffusers'
    `HunyuanVideoTransformer3DModel`, so its LoRAs load. The defaults are the published model, of
    13 billion parameters. With `float8_blocks` the linear layers of the blocks are `Float8Linear`.

    Source: Tencent-Hunyuan/HunyuanVideo-Avatar@fd59436; arXiv 2505.20156.
    """

    _supports_gradient_checkpointing = False
    _skip_layerwise_casting_patterns = ["x_embedder", "ref_embedder", "context_embedder", "norm"]  # noqa: RUF012
    _no_split_modules = [  # noqa: RUF012
        "AvatarTransformerBlock",
        "HunyuanVideoSingleTransformerBlock",
        "HunyuanVideoPatchEmbed",
        "HunyuanVideoTokenRefiner",
    ]
    _repeated_blocks = ["AvatarTransformerBlock", "HunyuanVideoSingleTransformerBlock"]  # noqa: RUF012
    _cp_plan = {  # noqa: RUF012
        "transformer_blocks.0": {
            "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
        },
        "transformer_blocks.*": {
            "audio_gate": ContextParallelInput(split_dim=1, expected_dims=4),
        },
        "rope": {
            0: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        num_layers: int = 20,
        num_single_layers: int = 40,
        num_refiner_layers: int = 2,
        mlp_ratio: float = 4.0,
        patch_size: int = 2,
        text_embed_dim: int = 4096,
        pooled_projection_dim: int = 768,
        rope_theta: float = 256.0,
        rope_axes_dim: tuple[int, int, int] = (16, 56, 56),
        audio_window_shape: tuple[int, int, int] = (10, 5, 384),
        audio_intermediate_dim: int = 1024,
        audio_attention_dim: int = 1024,
        audio_tokens_per_frame: int = 4,
        float8_blocks: bool = False,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim

        self.x_embedder = HunyuanVideoPatchEmbed((1, patch_size, patch_size), in_channels, dim)
        self.ref_embedder = HunyuanVideoPatchEmbed((1, patch_size, patch_size), in_channels, dim)
        self.ref_proj = nn.Linear(dim, dim)
        self.context_embedder = HunyuanVideoTokenRefiner(
            text_embed_dim, num_attention_heads, attention_head_dim, num_layers=num_refiner_layers
        )
        self.audio_proj = AudioProjection(
            audio_window_shape, audio_intermediate_dim, dim, audio_tokens_per_frame
        )

        self.time_text_embed = HunyuanVideoConditionEmbedding(
            dim, pooled_projection_dim, guidance_embeds=False
        )
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.motion_exp_embedder = TimestepEmbedding(256, dim // 4)
        self.motion_pose_embedder = TimestepEmbedding(256, dim // 4)
        self.fps_embedder = TimestepEmbedding(256, dim)

        self.rope = AvatarRotaryPosEmbed(tuple(rope_axes_dim), rope_theta)
        self.transformer_blocks = nn.ModuleList(
            AvatarTransformerBlock(
                num_attention_heads,
                attention_head_dim,
                mlp_ratio,
                audio_adapter=AudioAdapter(dim, audio_attention_dim) if index % 2 else None,
            )
            for index in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            HunyuanVideoSingleTransformerBlock(num_attention_heads, attention_head_dim, mlp_ratio)
            for _ in range(num_single_layers)
        )
        if float8_blocks:
            replace_linears([*self.transformer_blocks, *self.single_transformer_blocks])

        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * out_channels)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        reference_latents: Tensor | None = None,
        audio_embeds: Tensor | None = None,
        face_mask: Tensor | None = None,
        motion_expression: Tensor | None = None,
        motion_pose: Tensor | None = None,
        fps: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        tail: Tail | None = None,
        return_tail: bool = False,
    ) -> AvatarTransformerOutput | tuple[Tensor] | tuple[Tensor, Tail | None]:
        """The velocity (B, C, T, H, W); with `return_tail` also the tail, see the module.

        Args:
            hidden_states: (B, C, T, H, W), the noisy latents.
            timestep: (B,) float32 in [0, 1000], never rounded: half a percent of it matters.
            encoder_hidden_states: (B, text positions, text dim).
            encoder_attention_mask: (B, text positions), 1 = keep; its sum is the text's length.
                On the CPU it costs no wait for the GPU.
            pooled_projections: (B, pooled dim).
            reference_latents: (B, C, T, H, W), the portrait's latents.
            audio_embeds: (B, 4(T - 1) + 1, 10, 5, 384), a window of speech states a video frame.
            face_mask: (B, 1, 1 or T, H, W), how much of the audio each latent pixel hears.
            motion_expression, motion_pose: (B, 4).
            fps: (B,), frames a second.
            attention_kwargs: `{"scale": ...}` is the strength of the LoRAs.
            tail: runs the last single-stream block on these tokens, and nothing before it.

        Raises:
            ValueError: a half-precision timestep or fps; a tail or texts of unequal length while a
                cache is enabled (call once a sample, each in its own `cache_context`).
        """
        raise NotImplementedError
