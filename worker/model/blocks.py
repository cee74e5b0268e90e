"""The transformer's blocks: HunyuanVideo's two kinds, some of them with audio cross-attention.

The modules and their names are diffusers'; the forward passes are our own, in fewer passes over
memory. Adaptive layer norm (adaLN; arXiv 2212.09748) modulates each block: shifts, scales and gates
of its normalised tokens are projections of one vector a sample. Queries and keys of image tokens
are rotated by their positions (RoPE; arXiv 2104.09864).

Shape letters: B batch, R recordings a sample, V voices a recording, S tokens a frame, T latent
frames, N tokens, L valid text tokens, A audio tokens a latent frame, D width, h heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from torch import Tensor, nn

from worker.model.attention import attend
from worker.model.audio_adapter import AudioAdapter
from worker.model.context_parallel import ALL_HERE, Exchange, Swap, TokenShares
from worker.model.kernels import (
    adaln_modulate,
    gated_residual,
    gated_residual_adaln,
    gelu_in_place,
    joined,
    norm_and_rotate,
)
from worker.model.linear import Rows, feed_forward, is_plain, project
from worker.model.sparse_attention import LayerSparsity

NORM_EPS = 1e-6


class AvatarTransformerBlock(HunyuanVideoTransformerBlock):
    """A double-stream block, with an adapter followed by audio cross-attention.

    The adapter is part of the block, so that a cache of diffusers that skips the block skips the
    audio too.
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
        audio_tokens: Tensor,  # (B R, V, 1 + T, A, D)
        audio_gate: Tensor,  # (B, S, 1 + T, 1)
        audio_shares: Tensor | None,  # (B, S, 1 + T, V)
        float8: bool = False,
        sparsity: LayerSparsity | None = None,
        shares: TokenShares | None = None,
    ) -> tuple[Tensor, Tensor]:  # (B, S(1 + T), D), of a block with an adapter B R; (B, L, D)
        image, text, attn = hidden_states, encoder_hidden_states, self.attn
        image_rows, image_gate, *image_later = _adaln(image, temb, self.norm1, float8)
        text_rows, text_gate, *text_later = _adaln(text, temb, self.norm1_context, float8)

        num_image, heads = image.shape[1], (attn.heads, -1)
        exchange = shares or ALL_HERE
        # Each of the three is on its way between the ranks while the next one is computed.
        value = exchange.swap_for_heads(
            project(attn.to_v, image_rows).unflatten(2, heads),
            project(attn.add_v_proj, text_rows).unflatten(2, heads),
        )
        query, key = (
            _swap_normed(
                exchange,
                project(of_image, image_rows).unflatten(2, heads),
                project(of_text, text_rows).unflatten(2, heads),
                norms,
                image_rotary_emb,
            )
            for of_image, of_text, *norms in (
                (attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q),
                (attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k),
            )
        )
        del image_rows, text_rows
        attended = attend(query.wait(), key.wait(), value.wait(), attn.processor, sparsity)
        del query, key, value
        attended = exchange.swap_back(attended, attn.heads).wait().flatten(2)

        rows = Rows.of(attended[:, :num_image], float8=float8)
        image_update = project(attn.to_out[0], rows)
        rows = Rows.of(attended[:, num_image:], float8=float8)
        text_update = project(attn.to_add_out, rows)
        del attended, rows
        image = _fed_forward(image, image_update, image_gate, image_later, self.ff, float8)
        text = _fed_forward(text, text_update, text_gate, text_later, self.ff_context, float8)
        return self._attend_to_audio(image, audio_tokens, audio_gate, audio_shares), text

    def _attend_to_audio(
        self, image: Tensor, audio_tokens: Tensor, audio_gate: Tensor, audio_shares: Tensor | None
    ) -> Tensor:
        """The image tokens with each recording's audio, (B R, S(1 + T), D); else the same."""
        if self.audio_adapter is None:
            return image
        columns = image.unflatten(1, (-1, audio_tokens.shape[2]))  # (B, S, 1 + T, D)
        after = [  # several recordings are of one sample
            torch.addcmul(columns, audio_gate, self.audio_adapter(columns, tokens, audio_shares))
            for tokens in audio_tokens.split(len(columns))
        ]
        return (after[0] if len(after) == 1 else torch.cat(after)).flatten(1, 2)


class AvatarSingleTransformerBlock(HunyuanVideoSingleTransformerBlock):
    """A single-stream block: attention and feed-forward side by side on image and text."""

    def forward(
        self,
        hidden_states: Tensor,  # (B, S(1 + T), D)
        encoder_hidden_states: Tensor,  # (B, L, D)
        temb: Tensor,  # (B, D)
        image_rotary_emb: tuple[Tensor, Tensor],  # 2 x (S(1 + T), head dim)
        float8: bool = False,
        sparsity: LayerSparsity | None = None,
        shares: TokenShares | None = None,
    ) -> tuple[Tensor, Tensor]:  # (B, S(1 + T), D), (B, L, D)
        attn, num_image = self.attn, hidden_states.shape[1]
        tokens = joined(hidden_states, encoder_hidden_states)
        rows, gate = _adaln(tokens, temb, self.norm, float8)

        exchange = shares or ALL_HERE

        def projected(layer: nn.Module) -> tuple[Tensor, Tensor]:
            x = project(layer, rows).unflatten(2, (attn.heads, -1))
            return x[:, :num_image], x[:, num_image:]

        value = exchange.swap_for_heads(*projected(attn.to_v))
        query, key = (
            _swap_normed(exchange, *projected(layer), (norm, norm), image_rotary_emb)
            for layer, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
        )
        # Half of the feed-forward fills the time that keys are on their way between the ranks, the
        # rest that of what is attended. One process has none to fill, and saves the memory.
        is_apart = is_plain(self.proj_out) and len(tokens) == 1 and not torch.is_grad_enabled()
        more, half = None, 0
        if is_apart and shares is not None:
            more, half = torch.empty_like(tokens), tokens.shape[1] // 2
            self._feed(rows, slice(half), more)
        attended = attend(query.wait(), key.wait(), value.wait(), attn.processor, sparsity)
        del query, key, value
        swapped_back = exchange.swap_back(attended, attn.heads)
        del attended

        # The last layer sees both side by side; where it can, they are never put together.
        if is_apart:
            if more is None:
                more = torch.empty_like(tokens)
            self._feed(rows, slice(half, None), more)
            del rows
            attended_rows = Rows.of(swapped_back.wait().flatten(2), float8=float8)
            del swapped_back
            update = project(self.proj_out, attended_rows, slice(tokens.shape[2]))
            del attended_rows
        else:
            wide = gelu_in_place(project(self.proj_mlp, rows))
            update = self.proj_out(torch.cat([swapped_back.wait().flatten(2), wide], dim=2))
        tokens = gated_residual(tokens, update, gate, more)
        return tokens[:, :num_image], tokens[:, num_image:]

    def _feed(self, rows: Rows, some: slice, out: Tensor) -> None:
        """What the feed-forward network adds to some of the tokens, in their places in `out`."""
        columns = slice(out.shape[2], None)  # of the last layer; the first are of what is attended
        rows, out = rows.part(some), out[:, some]
        feed_forward(self.proj_mlp, self.proj_out, rows, columns, bias=False, out=out)


for block_class in (AvatarTransformerBlock, AvatarSingleTransformerBlock):
    TransformerBlockRegistry.register(block_class, TransformerBlockMetadata(0, 1))


def _adaln(
    x: Tensor,  # (B, N, D)
    temb: Tensor,  # (B, D)
    norm: Any,  # diffusers' adaptive norm, of which three or six parts are one projection
    float8: bool,
) -> tuple[Any, ...]:
    """The rows after adaLN, and what is left of the modulation, each (B, D)."""
    times = norm.linear.out_features // x.shape[-1]
    shift, scale, *later = norm.linear(norm.silu(temb)).chunk(times, dim=1)
    return Rows.of(adaln_modulate(x, shift, scale, norm.norm.eps), float8=float8), *later


def _swap_normed(
    exchange: Exchange,
    image: Tensor,  # (B, N of them, h, D/h), as is text
    text: Tensor,
    norms: Sequence[nn.Module],  # of both
    rotary: tuple[Tensor, Tensor],  # of the image
) -> Swap:
    """Queries or keys, as attention takes them, on their way there."""
    outgoing = exchange.outgoing(image, text)
    for place in outgoing.places:
        norm_and_rotate(image[:, :, place.heads], norms[0], rotary, place.image)
        norm_and_rotate(text[:, :, place.heads], norms[1], None, place.text)
    return outgoing.send()


def _fed_forward(
    x: Tensor,  # (B, N, D), as is update
    update: Tensor,
    gate: Tensor,  # (B, D)
    later: list[Tensor],  # shift, scale and gate of the feed-forward, (B, D)
    network: Any,  # diffusers' FeedForward
    float8: bool,
) -> Tensor:  # (B, N, D)
    """The tokens with the update, after the feed-forward network."""
    shift, scale, later_gate = later
    x, normed = gated_residual_adaln(x, update, gate, shift, scale, NORM_EPS)
    up, _, down = network.net
    return gated_residual(
        x, feed_forward(up.proj, down, Rows.of(normed, float8=float8)), later_gate
    )
