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
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding
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
from worker.model.embeddings import SINUSOID_DIM, AvatarRotaryPosEmbed, Sinusoid
from worker.model.linear import Float8Linear, Float32Linear, replace_linears


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


class HunyuanVideoAvatarTransformer3DModel(
    ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin, CacheMixin
):
    """The velocity of noisy video latents, given a portrait, a prompt and speech.

    The modules that HunyuanVideo has too carry the names of diffusers'
    `HunyuanVideoTransformer3DModel`, so its LoRAs load. The defaults are the published model, of
    13 billion parameters. With `float8_blocks` the linear layers of the blocks are `Float8Linear`,
    those of the audio adapters left out.

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
        self.motion_exp_embedder = TimestepEmbedding(SINUSOID_DIM, dim // 4)
        self.motion_pose_embedder = TimestepEmbedding(SINUSOID_DIM, dim // 4)
        self.fps_embedder = TimestepEmbedding(SINUSOID_DIM, dim)
        for embedder in (
            self.time_text_embed,
            self.motion_exp_embedder,
            self.motion_pose_embedder,
            self.fps_embedder,
        ):
            replace_linears(embedder, Float32Linear)  # small, and all blocks depend on them
        self.sinusoid = Sinusoid()
        self.time_text_embed.time_proj = self.sinusoid
        self.context_embedder.time_text_embed.time_proj = self.sinusoid

        self.rope = AvatarRotaryPosEmbed(rope_axes_dim, rope_theta)
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
            replace_linears(self.transformer_blocks, Float8Linear, kept=(AudioAdapter,))
            replace_linears(self.single_transformer_blocks, Float8Linear)

        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * out_channels)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
        pooled_projections: Tensor,
        reference_latents: Tensor | None,
        audio_embeds: Tensor | None,
        face_mask: Tensor | None,
        motion_expression: Tensor,
        motion_pose: Tensor,
        fps: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        tail: Tail | None = None,
        return_tail: bool = False,
    ) -> AvatarTransformerOutput | tuple[Tensor] | tuple[Tensor, Tail | None]:
        """The velocity (B, C, T, H, W); with `return_tail` also the tail, see the module.

        Inputs are cast to the model's dtype; the scalars only after their embedders.

        Args:
            hidden_states: (B, C, T, H, W), the noisy latents.
            timestep: (B,) in [0, 1000], float32: in bfloat16 the output would be a fifth off.
            encoder_hidden_states: (B, text positions, text dim).
            encoder_attention_mask: (B, text positions), 1 = keep; its sum is the text's length,
                so on the CPU it costs no wait for the GPU.
            pooled_projections: (B, pooled dim).
            reference_latents: (B, C, T, H, W), the portrait's latents.
            audio_embeds: (B, 4(T - 1) + 1, 10, 5, 384), a window of speech states a video frame.
            face_mask: (B, 1, 1 or T, H, W), how much of the audio each latent pixel hears.
            motion_expression, motion_pose: (B, 4).
            fps: (B,), frames a second.
            attention_kwargs: `{"scale": ...}` is the strength of the LoRAs.
            tail: runs the last single-stream block on these tokens and nothing before it; the
                inputs that may be None are then not read.

        Raises:
            ValueError: a half-precision timestep; a missing input; a tail, or texts of unequal
                length, while a cache is enabled.
        """
        if timestep.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"timestep must be float32, not {timestep.dtype}")
        if self.is_cache_enabled and (tail is not None or return_tail):
            raise ValueError("a cache may skip the blocks around the tail; use one or the other")
        num_frames, height, width = hidden_states.shape[2:]
        patch_size = self.config.patch_size
        grid = (num_frames, height // patch_size, width // patch_size)
        rotary = self.rope(*grid, hidden_states.device)
        temb = self._embed_conditions(
            timestep, pooled_projections, motion_expression, motion_pose, fps
        )

        if tail is not None:
            image = tail.image.transpose(1, 2).flatten(1, 2)  # (B, S(1 + T), D)
            # One sample at a time: under context parallel two texts may be equally long on one
            # rank only, and all ranks must make the same calls.
            streams = list(zip(image.split(1), [text[None] for text in tail.text], strict=True))
        elif (
            encoder_hidden_states is None
            or encoder_attention_mask is None
            or reference_latents is None
            or audio_embeds is None
            or face_mask is None
        ):
            raise ValueError("only a call with a tail may leave an input out")
        else:
            texts = self._embed_text(encoder_hidden_states, timestep, encoder_attention_mask)
            image = self._embed_latents(hidden_states, reference_latents)
            audio_tokens = self.audio_proj(audio_embeds.to(self._compute_dtype))
            audio_gate = self._gate_audio(face_mask, num_frames)
            streams = self._run_early_blocks(image, texts, temb, rotary, audio_tokens, audio_gate)

        tokens = self._run_last_block(streams, temb, rotary, num_frames)
        sample = self._unpatchify(tokens, grid)
        returned_tail = self._join_tail(streams, num_frames) if return_tail else None
        if return_dict:
            return AvatarTransformerOutput(sample=sample, tail=returned_tail)
        return (sample, returned_tail) if return_tail else (sample,)

    @property
    def _compute_dtype(self) -> torch.dtype:
        """The dtype to work in: that of a layer which no storage in 8 bits touches."""
        return self.x_embedder.proj.weight.dtype

    def _embed_conditions(
        self,
        timestep: Tensor,
        pooled_projections: Tensor,
        motion_expression: Tensor,
        motion_pose: Tensor,
        fps: Tensor,
    ) -> Tensor:
        """The vector (B, D) that modulates every block; float32 up to here."""

        def embed(embedder: nn.Module, values: Tensor) -> Tensor:  # (B,) or (B, 4) -> (B, D)
            return embedder(self.sinusoid(values.flatten())).view(len(values), -1)

        temb, _ = self.time_text_embed(timestep, pooled_projections.float())
        temb = temb + embed(self.motion_exp_embedder, motion_expression)
        temb = temb + embed(self.motion_pose_embedder, motion_pose)
        temb = temb + embed(self.fps_embedder, fps)
        return temb.to(self._compute_dtype)

    def _embed_latents(self, latents: Tensor, reference_latents: Tensor) -> Tensor:
        """Image tokens (B, S(1 + T), D); only the noisy frames pass the reference's projection."""
        latents, reference_latents = (
            x.to(self._compute_dtype) for x in (latents, reference_latents)
        )
        num_frames = latents.shape[2]
        frames = self.x_embedder(latents)  # (B, T S, D)
        frames = frames + self.ref_proj(self.ref_embedder(reference_latents))
        reference = self.x_embedder(reference_latents[:, :, :1])  # (B, S, D)
        columns = frames.unflatten(1, (num_frames, -1)).transpose(1, 2)  # (B, S, T, D)
        return torch.cat([reference[:, :, None], columns], dim=2).flatten(1, 2)

    def _embed_text(self, embeds: Tensor, timestep: Tensor, mask: Tensor) -> list[Tensor]:
        """The refined text in batches (b, L, D) of equal valid length: the whole, or B of one.

        Cutting the text is exact, since no token that is kept attends to one that is not; and it
        leaves the blocks without an attention mask, which the fast kernels do not take.
        """
        lengths = mask.sum(dim=1).tolist()
        mask = mask.to(embeds.device, non_blocking=True)
        text = self.context_embedder(embeds.to(self._compute_dtype), timestep, mask)
        if len(set(lengths)) == 1:
            return [text[:, : lengths[0]]]
        return [sample[:, :length] for sample, length in zip(text.split(1), lengths, strict=True)]

    def _gate_audio(self, face_mask: Tensor, num_frames: int) -> Tensor:
        """How much of the audio each token hears, (B, S, T, 1)."""
        patch_size = self.config.patch_size
        # Nearest-neighbour to the size of the tokens: the first row and column of each patch.
        gate = face_mask[:, 0, :, ::patch_size, ::patch_size].expand(-1, num_frames, -1, -1)
        return gate.to(self._compute_dtype).flatten(2).transpose(1, 2).unsqueeze(-1)

    def _run_early_blocks(
        self,
        image: Tensor,
        texts: list[Tensor],
        temb: Tensor,
        rotary: tuple[Tensor, Tensor],
        audio_tokens: Tensor,
        audio_gate: Tensor,
    ) -> list[tuple[Tensor, Tensor]]:
        """Image and text tokens that enter the last block, in the batches of the texts."""
        if self.is_cache_enabled and len(texts) > 1:
            raise ValueError("with a cache, call once a text length, each in its own cache_context")
        sizes = [len(text) for text in texts]
        batches = zip(
            image.split(sizes),
            texts,
            temb.split(sizes),
            audio_tokens.split(sizes),
            audio_gate.split(sizes),
            strict=True,
        )
        streams = []
        for image, text, temb, audio_tokens, audio_gate in batches:
            for block in self.transformer_blocks:
                image, text = block(image, text, temb, rotary, audio_tokens, audio_gate)
            for block in self.single_transformer_blocks[:-1]:
                image, text = block(image, text, temb, None, rotary)
            streams.append((image, text))
        return streams

    def _run_last_block(
        self,
        streams: list[tuple[Tensor, Tensor]],
        temb: Tensor,
        rotary: tuple[Tensor, Tensor],
        num_frames: int,
    ) -> Tensor:
        """Patches of velocity (B, S T, C p p) from the tokens that enter the last block."""
        patches = []
        temb_batches = temb.split([len(text) for _, text in streams])
        for (image, text), temb in zip(streams, temb_batches, strict=True):
            image, _ = self.single_transformer_blocks[-1](image, text, temb, None, rotary)
            frames = image.unflatten(1, (-1, 1 + num_frames))[:, :, 1:].flatten(1, 2)
            patches.append(self.proj_out(self.norm_out(frames, temb)))
        return torch.cat(patches)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, S T, C p p) -> (B, C, T, H, W)."""
        num_frames, rows, columns = grid
        patch_size = self.config.patch_size
        patches = patches.unflatten(1, (rows, columns, num_frames))
        patches = patches.unflatten(-1, (-1, patch_size, patch_size))  # (B, h, w, T, C, p, p)
        return patches.permute(0, 4, 3, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4)

    def _join_tail(self, streams: list[tuple[Tensor, Tensor]], num_frames: int) -> Tail:
        image = torch.cat([image for image, _ in streams])
        return Tail(
            image=image.unflatten(1, (-1, 1 + num_frames)).transpose(1, 2),
            text=tuple(sample for _, text in streams for sample in text),
        )
