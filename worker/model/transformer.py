"""The denoiser: HunyuanVideo-Avatar's transformer, composed from diffusers' HunyuanVideo blocks.

The reference has a step cache: some denoising steps reuse what the early blocks computed on an
earlier step, and run the last single-stream block only. Here that is two arguments of `forward`,
and the module keeps nothing between calls:

    output = transformer(latents, ..., return_cached_tokens=True)
    tokens = output.cached_tokens
    tokens.image  # B tensors (1 + T, S, D): [0] the reference frame, [1:] the latent frames
    tokens.text   # B tensors (L, D): the text, cut to the valid length of each sample
    cached = transformer(later_latents, ..., cached_tokens=CachedTokens(image, text)).sample

Cached tokens are the input of the last single-stream block. They may be put together from those of
several calls: any frames of the same size in any order (the last block gives the k-th one the
position of latent frame k). Beside them only `timestep`, `pooled_projections`,
`motion_expression`, `motion_pose` and `fps` are read, and of `hidden_states` only the shape.

Tokens run over the rows and columns of a frame first and over its frames last ("spatial-major":
all frames of one patch, reference frame first, then the next patch), so that a contiguous share of
them holds whole columns in time, and context parallelism (`worker.model.context_parallel`) leaves
the audio cross-attention local to each rank.

The blocks take one sample at a time: on a GPU a batch gains nothing, and takes memory. Only where a
gradient is wanted do they take all at once, for the sake of small models. Samples that differ in
nothing but their audio, as the branches of classifier-free guidance do, are given once, with
several recordings; they part at the first audio cross-attention. A recording is of one voice or of
several, each of which has a face mask of its own.

Shape letters: B batch, R recordings a sample, V voices a recording, C latent channels, T latent
frames, H and W latent height and width, S = (H/2)(W/2) tokens a frame, L valid text tokens,
D width, A audio tokens a latent frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoConditionEmbedding,
    HunyuanVideoPatchEmbed,
    HunyuanVideoTokenRefiner,
)
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from worker.model import flash_attention_4
from worker.model.audio_adapter import AudioAdapter, AudioProjection
from worker.model.blocks import NORM_EPS, AvatarSingleTransformerBlock, AvatarTransformerBlock
from worker.model.context_parallel import ContextParallel, TokenShares
from worker.model.embeddings import SINUSOID_DIM, AvatarRotaryPosEmbed, Sinusoid
from worker.model.kernels import adaln_modulate
from worker.model.linear import Float8Linear, Float32Linear, replace_linears
from worker.model.sparse_attention import LayerSparsity, SparseAttention, TokenBlocks


@dataclass(frozen=True)
class CachedTokens:
    """The tokens that enter the last single-stream block.

    Under context parallel each rank holds its own share of S and of L.
    """

    image: tuple[Tensor, ...]  # B tensors (1 + T, S, D), the reference frame first
    text: tuple[Tensor, ...]  # B tensors (L, D); L differs where the samples' masks differ


@dataclass
class AvatarTransformerOutput(BaseOutput):
    """The velocity `sample` (B, C, T, H, W), and the tokens for the step cache if asked for."""

    sample: Tensor
    cached_tokens: CachedTokens | None = None


class HunyuanVideoAvatarTransformer3DModel(ModelMixin, AttentionMixin, ConfigMixin, CacheMixin):
    """The velocity of noisy video latents, given a portrait, a prompt and speech.

    The modules that HunyuanVideo has too carry the names of diffusers'
    `HunyuanVideoTransformer3DModel`. The defaults are the published model, of 13 billion
    parameters. With `float8_blocks` the linear layers of the blocks are `Float8Linear`,
    those of the audio adapters left out.

    Source: Tencent-Hunyuan/HunyuanVideo-Avatar@fd59436; arXiv 2505.20156.
    """

    _supports_gradient_checkpointing = False
    _skip_layerwise_casting_patterns = ["x_embedder", "ref_embedder", "context_embedder", "norm"]  # noqa: RUF012
    _no_split_modules = [  # noqa: RUF012
        "AvatarTransformerBlock",
        "AvatarSingleTransformerBlock",
        "HunyuanVideoPatchEmbed",
        "HunyuanVideoTokenRefiner",
    ]
    _repeated_blocks = ["AvatarTransformerBlock", "AvatarSingleTransformerBlock"]  # noqa: RUF012

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
        self.context_parallel: ContextParallel | None = None  # None: each pass is of one rank
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
            AvatarSingleTransformerBlock(num_attention_heads, attention_head_dim, mlp_ratio)
            for _ in range(num_single_layers)
        )
        if float8_blocks:
            replace_linears(self.transformer_blocks, Float8Linear, kept=(AudioAdapter,))
            replace_linears(self.single_transformer_blocks, Float8Linear)

        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * out_channels)

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
        return_dict: bool = True,
        cached_tokens: CachedTokens | None = None,
        return_cached_tokens: bool = False,
        float8: bool = False,
        sparsity: SparseAttention | None = None,
    ) -> AvatarTransformerOutput | tuple[Tensor] | tuple[Tensor, CachedTokens | None]:
        """The velocity (B R, C, T, H, W); if asked for also the cached tokens, see the module.

        Inputs are cast to the model's dtype; the scalars only after their embedders.

        Args:
            hidden_states: (B, C, T, H, W), the noisy latents.
            timestep: (B,) in [0, 1000], float32: in bfloat16 the output would be a fifth off.
            encoder_hidden_states: (B, text positions, text dim).
            encoder_attention_mask: (B, text positions), 1 = keep; its sum is the text's length,
                so on the CPU it costs no wait for the GPU.
            pooled_projections: (B, pooled dim).
            reference_latents: (B, C, T, H, W), the portrait's latents.
            audio_embeds: (B R V, 4(T - 1) + 1, 10, 5, 384), a window of speech states a video
                frame; the R recordings of a sample one after the other, in each its V voices.
            face_mask: (B, V, 1 or T, H, W), how much of each voice each latent pixel gets.
            motion_expression, motion_pose: (B, 4).
            fps: (B,), frames a second.
            cached_tokens: of B R samples; runs the last single-stream block on them and nothing
                before it. The inputs that may be None are then not read.
            return_cached_tokens: whether the tokens that enter the last block are returned too.
            float8: computes the blocks' linear layers in 8 bits, see `worker.model.linear.project`.
            sparsity: computes the attention of all blocks but the last within its tolerance;
                without gradients.

        Raises:
            ValueError: a half-precision timestep; a missing input; cached tokens, or several
                samples, while a cache of diffusers is enabled.
        """
        if timestep.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"timestep must be float32, not {timestep.dtype}")
        if self.is_cache_enabled and (cached_tokens is not None or return_cached_tokens):
            raise ValueError("a cache of diffusers may skip blocks; use it or the cached tokens")
        num_frames, height, width = hidden_states.shape[2:]
        patch_size = self.config.patch_size
        grid = (num_frames, height // patch_size, width // patch_size)
        rotary = self.rope(*grid, hidden_states.device)
        if self.context_parallel is not None:
            cosines, sines = rotary
            share = self.context_parallel.share_columns
            rotary = share(cosines, 0, 1 + num_frames), share(sines, 0, 1 + num_frames)
        temb = self.embed_conditions(
            timestep, pooled_projections, motion_expression, motion_pose, fps
        )
        if cached_tokens is not None:
            streams = self._streams_of(cached_tokens, temb)
            if self.context_parallel is not None:
                _tell_token_shares(streams, grid, self.context_parallel)
        else:
            streams = self._embed_streams(
                hidden_states,
                timestep,
                encoder_hidden_states,
                encoder_attention_mask,
                reference_latents,
                audio_embeds,
                face_mask,
                temb,
            )
            self._run_early_blocks(streams, rotary, float8, sparsity)
        tokens = self._run_last_block(streams, rotary, float8)
        sample = self.unpatchify(tokens, grid)
        returned = _tokens_to_cache(streams, num_frames) if return_cached_tokens else None
        if return_dict:
            return AvatarTransformerOutput(sample=sample, cached_tokens=returned)
        return (sample, returned) if return_cached_tokens else (sample,)

    def set_attention_backend(self, backend: str) -> None:
        """As diffusers' method, which knows no `flash_attn_4`."""
        if backend != flash_attention_4.NAME:
            super().set_attention_backend(backend)
            return
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            block.attn.processor._attention_backend = backend

    @property
    def _compute_dtype(self) -> torch.dtype:
        """The dtype to work in: that of a layer which no storage in 8 bits touches."""
        return self.x_embedder.proj.weight.dtype

    def embed_conditions(
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

    def embed_latents(self, latents: Tensor, reference_latents: Tensor) -> Tensor:
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

    def embed_text(self, embeds: Tensor, timestep: Tensor, mask: Tensor) -> list[Tensor]:
        """The refined text, (1, L, D) for each sample.

        Cutting the text is exact, since no token that is kept attends to one that is not; and it
        leaves the blocks without an attention mask, which the fast kernels do not take.
        """
        lengths = mask.sum(dim=1).tolist()
        mask = mask.to(embeds.device, non_blocking=True)
        text = self.context_embedder(embeds.to(self._compute_dtype), timestep, mask)
        return [sample[:, :length] for sample, length in zip(text.split(1), lengths, strict=True)]

    def embed_audio(self, audio_embeds: Tensor, batch: int, voices: int) -> Tensor:
        """Audio tokens (B, R, V, 1 + T, A, D); the gate leaves the reference frame's out."""
        tokens = self.audio_proj(audio_embeds.to(self._compute_dtype))
        tokens = torch.cat([tokens[:, :1], tokens], dim=1)
        return tokens.unflatten(0, (batch, -1, voices))

    def gate_audio(self, face_mask: Tensor, num_frames: int) -> tuple[Tensor, Tensor | None]:
        """How much of the audio each token gets, (B, S, 1 + T, 1), and each voice's share of it.

        The shares (B, S, 1 + T, V) are None where there is one voice alone.
        """
        patch_size = self.config.patch_size
        # Nearest-neighbour to the size of the tokens: the first row and column of each patch.
        gates = face_mask[..., ::patch_size, ::patch_size].expand(-1, -1, num_frames, -1, -1)
        gates = torch.cat([torch.zeros_like(gates[:, :, :1]), gates], dim=2)  # the reference: none
        gates = gates.flatten(3).permute(0, 3, 2, 1)  # (B, S, 1 + T, V)
        if gates.shape[-1] == 1:
            return gates.to(self._compute_dtype), None
        gate = gates.sum(dim=-1, keepdim=True)
        shares = gates / gate.where(gate > 0, 1.0)  # 1 or 0 where the masks do not overlap
        return gate.to(self._compute_dtype), shares.to(self._compute_dtype)

    def _embed_streams(
        self,
        latents: Tensor,  # (B, C, T, H, W)
        timestep: Tensor,
        text_embeds: Tensor | None,
        text_mask: Tensor | None,
        reference_latents: Tensor | None,
        audio_embeds: Tensor | None,
        face_mask: Tensor | None,
        temb: Tensor,  # (B, D)
    ) -> list["_Stream"]:
        """What enters the first block, for each of B samples."""
        if (
            text_embeds is None
            or text_mask is None
            or reference_latents is None
            or audio_embeds is None
            or face_mask is None
        ):
            raise ValueError("only a call with cached_tokens may leave an input out")
        size = len(latents) if torch.is_grad_enabled() else 1
        pairs = zip(latents.split(size), reference_latents.split(size), strict=True)
        images = [image for pair in pairs for image in self.embed_latents(*pair).split(1)]
        texts = self.embed_text(text_embeds, timestep, text_mask)
        audio_tokens = self.embed_audio(audio_embeds, len(latents), face_mask.shape[1])
        gate, shares = self.gate_audio(face_mask, latents.shape[2])
        audio_shares = [None] * len(latents) if shares is None else shares.split(1)
        if self.is_cache_enabled and audio_tokens.shape[:2].numel() > 1:
            raise ValueError("with a cache, give one sample a call, each in its own cache_context")
        parts = (images, texts, temb.split(1), audio_tokens, gate.split(1), audio_shares)
        return _as_few([_Stream(*each) for each in zip(*parts, strict=True)])

    def _run_early_blocks(
        self,
        streams: list["_Stream"],
        rotary: tuple[Tensor, Tensor],
        float8: bool,
        sparsity: SparseAttention | None,
    ) -> None:
        """Takes B samples to the last block, in place; there they are B R.

        Each block runs for all samples before the next one does, so that weights which are not on
        the GPU have to come only once.
        """
        tokens: list[TokenBlocks] = []
        if sparsity is not None:
            tokens = [stream.blocks_of_tokens() for stream in streams]
        if self.context_parallel is not None:
            streams[:] = [stream.share_of(self.context_parallel) for stream in streams]

        def sparsity_of(layer: int, sample: int) -> LayerSparsity | None:
            if sparsity is None:
                return None
            return sparsity.layer(layer, sample, tokens[min(sample, len(tokens) - 1)])

        for layer, block in enumerate(self.transformer_blocks):
            for sample, stream in enumerate(streams):
                stream.image, stream.text = block(
                    stream.image,
                    stream.text,
                    stream.temb,
                    rotary,
                    stream.audio_tokens,
                    stream.audio_gate,
                    stream.audio_shares,
                    float8,
                    sparsity_of(layer, sample),
                    stream.token_shares,
                )
            streams[:] = [part for stream in streams for part in stream.by_recording()]
        singles = self.single_transformer_blocks[:-1]
        for layer, block in enumerate(singles, len(self.transformer_blocks)):
            for sample, stream in enumerate(streams):
                stream.image, stream.text = block(
                    stream.image,
                    stream.text,
                    stream.temb,
                    rotary,
                    float8,
                    sparsity_of(layer, sample),
                    stream.token_shares,
                )

    def _streams_of(self, cached_tokens: CachedTokens, temb: Tensor) -> list["_Stream"]:
        """The samples of the cached tokens, for the last block."""
        recordings = len(cached_tokens.image) // len(temb)
        samples = zip(
            cached_tokens.image,
            cached_tokens.text,
            temb.repeat_interleave(recordings, 0).split(1),
            strict=True,
        )
        return _as_few(
            [
                _Stream(image.transpose(0, 1).flatten(0, 1)[None], text[None], temb)
                for image, text, temb in samples
            ]
        )

    def _run_last_block(
        self, streams: list["_Stream"], rotary: tuple[Tensor, Tensor], float8: bool
    ) -> Tensor:
        """Patches of velocity (B R, S(1 + T), C p p) from the tokens that enter the last block."""
        norm, patches = self.norm_out, []
        for stream in streams:
            shares = stream.token_shares
            image, _ = self.single_transformer_blocks[-1](
                stream.image, stream.text, stream.temb, rotary, float8, shares=shares
            )
            scale, shift = norm.linear(norm.silu(stream.temb)).chunk(2, dim=1)
            patch = self.proj_out(adaln_modulate(image, shift, scale, NORM_EPS))
            patches.append(patch if shares is None else shares.gather_image(patch))
        return torch.cat(patches)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, S(1 + T), C p p) -> (B, C, T, H, W), without the reference frame."""
        num_frames, rows, columns = grid
        patch_size = self.config.patch_size
        patches = patches.unflatten(1, (rows, columns, 1 + num_frames))[:, :, :, 1:]
        patches = patches.unflatten(-1, (-1, patch_size, patch_size))  # (B, h, w, T, C, p, p)
        return patches.permute(0, 4, 3, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4)


@dataclass
class _Stream:
    """A sample on its way through the blocks, or several that go together or still are one."""

    image: Tensor  # (B, S(1 + T), D), of one sample R after the first adapter
    text: Tensor  # (B, L, D)
    temb: Tensor  # (B, D)
    audio_tokens: Tensor | None = None  # (B R, V, 1 + T, A, D)
    audio_gate: Tensor | None = None  # (B, S, 1 + T, 1)
    audio_shares: Tensor | None = None  # (B, S, 1 + T, V); None: one voice alone
    token_shares: TokenShares | None = None  # None: all its tokens are here

    def share_of(self, parallel: ContextParallel) -> "_Stream":
        """This rank's share of it."""
        assert self.audio_gate is not None
        num_columns, num_frames = self.audio_gate.shape[1:3]
        shares = self.audio_shares
        return replace(
            self,
            image=parallel.share_columns(self.image, 1, num_frames),
            text=parallel.share(self.text, 1),
            audio_gate=parallel.share(self.audio_gate, 1),
            audio_shares=None if shares is None else parallel.share(shares, 1),
            token_shares=parallel.token_shares(num_columns, num_frames, self.text.shape[1]),
        )

    def blocks_of_tokens(self) -> TokenBlocks:
        """The blocks of its tokens, for sparse attention."""
        assert self.audio_gate is not None
        return TokenBlocks(self.audio_gate, self.text.shape[1])

    def by_recording(self) -> list["_Stream"]:
        """One for each recording, once they differ."""
        if len(self.image) == len(self.text) or self.audio_tokens is None:
            return [self]
        pairs = zip(self.image.split(1), self.audio_tokens.split(1), strict=True)
        return [replace(self, image=image, audio_tokens=tokens) for image, tokens in pairs]


def _as_few(streams: list[_Stream]) -> list[_Stream]:
    """The samples as one stream where a gradient is wanted and their sizes agree."""
    sizes = {(stream.image.shape, stream.text.shape) for stream in streams}
    recordings = {len(stream.audio_tokens) for stream in streams if stream.audio_tokens is not None}
    if not torch.is_grad_enabled() or len(sizes) > 1 or recordings - {1}:
        return streams
    joined: dict[str, Any] = {}
    for name in vars(streams[0]):
        parts = [getattr(stream, name) for stream in streams]
        joined[name] = None if parts[0] is None else torch.cat(parts)
    return [_Stream(**joined)]


def _tell_token_shares(
    streams: Sequence[_Stream], grid: tuple[int, int, int], parallel: ContextParallel
) -> None:
    """Gives the samples of cached tokens the shares in which they lie on the ranks."""
    num_frames, rows, columns = grid
    num_texts = [stream.text.shape[1] for stream in streams]
    shares = parallel.token_shares_of_cached(
        rows * columns, 1 + num_frames, num_texts, streams[0].text.device
    )
    for stream, each in zip(streams, shares, strict=True):
        stream.token_shares = each


def _tokens_to_cache(streams: Sequence[_Stream], num_frames: int) -> CachedTokens:
    images = (image for stream in streams for image in stream.image)
    return CachedTokens(
        image=tuple(image.unflatten(0, (-1, 1 + num_frames)).transpose(0, 1) for image in images),
        text=tuple(text for stream in streams for text in stream.text),
    )
