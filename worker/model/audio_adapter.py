"""Speech into the video tokens: audio windows to audio tokens, and cross-attention to them.

Shape letters: B batch, V voices, F video frames, T latent frames (F = 4(T - 1) + 1), S video tokens
a latent frame, A audio tokens a latent frame, D width of the transformer, E width of the attention.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention


class AudioProjection(nn.Module):
    """Audio tokens for each latent frame from one window of speech states for each video frame.

    Source: Tencent-Hunyuan/HunyuanVideo-Avatar@fd59436, the audio projection.
    """

    def __init__(
        self,
        window_shape: tuple[int, int, int],  # (50 Hz frames, encoder states, channels)
        intermediate_dim: int,
        output_dim: int,
        tokens_per_frame: int,
    ) -> None:
        super().__init__()
        frames, states, channels = window_shape
        self.tokens_per_frame = tokens_per_frame
        self.proj1 = nn.Linear(frames * states * channels, intermediate_dim)
        self.proj2 = nn.Linear(intermediate_dim, intermediate_dim)
        self.proj3 = nn.Linear(intermediate_dim, tokens_per_frame * output_dim)
        self.norm = nn.LayerNorm(output_dim)

    def forward(
        self,
        audio_embeds: Tensor,  # (B, F, 10, 5, 384)
    ) -> Tensor:  # (B, T, A, D)
        """Audio tokens by latent frame: of frame 0 those of video frame 0 four times, of frame k
        those of video frames 4k - 3 to 4k."""
        hidden = relu(self.proj1(audio_embeds.flatten(2)))
        hidden = relu(self.proj2(hidden))
        tokens = self.norm(self.proj3(hidden).unflatten(2, (self.tokens_per_frame, -1)))
        first_frame = tokens[:, :1].expand(-1, 3, -1, -1)
        tokens = torch.cat([first_frame, tokens], dim=1)  # (B, 4T, A/4, D)
        return tokens.unflatten(1, (-1, 4)).flatten(2, 3)  # (B, T, A, D)


class AudioAdapter(nn.Module):
    """Audio cross-attention: the video tokens of each latent frame attend to that frame's audio.

    One attention head of the full width E, no residual, no biases in its projections.

    Source: Tencent-Hunyuan/HunyuanVideo-Avatar@fd59436; arXiv 2505.20156, Face-Aware Audio Adapter.
    """

    def __init__(self, dim: int, attention_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, attention_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * attention_dim, bias=False)
        self.to_out = nn.Linear(attention_dim, dim, bias=False)

    def forward(
        self,
        tokens: Tensor,  # (B, S, T, D)
        audio_tokens: Tensor,  # (B, V, T, A, D)
        shares: Tensor | None = None,  # (B, S, T, V), how much each voice counts; None: one alone
    ) -> Tensor:  # (B, S, T, D)
        """The audio delta: what to add to the tokens, before the face mask.

        The voices are added up before the last projection, which is linear, so that each takes
        its own attention and nothing else.
        """
        query = self.to_q(self.norm2(tokens)).transpose(1, 2)  # (B, T, S, E)
        if shares is None:
            [voice] = audio_tokens.unbind(1)
            attended = self._attend(query, voice)
        else:
            attended = torch.zeros_like(query)
            weights = shares.transpose(1, 2).split(1, dim=-1)  # V x (B, T, S, 1)
            for weight, voice in zip(weights, audio_tokens.unbind(1), strict=True):
                attended = torch.addcmul(attended, weight, self._attend(query, voice))
        return self.to_out(attended.transpose(1, 2))  # (B, S, T, D)

    def _attend(
        self,
        query: Tensor,  # (B, T, S, E)
        voice: Tensor,  # (B, T, A, D)
    ) -> Tensor:  # (B, T, S, E)
        key, value = self.to_kv(self.norm1(voice)).chunk(2, dim=-1)  # 2 x (B, T, A, E)
        # Latent frames stand where heads usually do. Not through the attention backend that the
        # user chooses: flash kernels do not take heads this wide.
        return scaled_dot_product_attention(query, key, value)
