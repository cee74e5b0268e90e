"""Where and when a token is: rotary positions (RoPE) of image tokens, sinusoids of scalars.

Both start from small tables that are made on the CPU, so that every device works from the same
bits.
"""

import math

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

SINUSOID_DIM = 256


def _frequencies() -> Tensor:
    """1 / 10000^(i / 128) in float32, as in the reference.

    The exponential is rounded to the nearest float. Two values lie almost half-way between two
    floats, and there the reference, run on a CPU, took the upper one. Libraries and devices
    differ in such last bits, and at timestep 1000 one of them is 3e-6 of the embedding.
    """
    half = SINUSOID_DIM // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu") / half
    nearest = exponents.double().exp().float()
    upper = torch.nextafter(nearest, torch.tensor(torch.inf, device="cpu"))
    almost_half_way = torch.tensor([12, 106], device="cpu")
    return nearest.index_copy(0, almost_half_way, upper[almost_half_way])


FREQUENCIES = _frequencies()


class Sinusoid(nn.Module):
    """Cosines, then sines, of scalars: (N,) -> (N, 256) float32, whatever the dtype of the model.

    In the place of diffusers' `Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)`.
    """

    def forward(self, values: Tensor) -> Tensor:
        angles = values.float()[:, None] * self.frequencies(values.device)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def frequencies(self, device: torch.device) -> Tensor:
        """The table (128,) on the device; nothing is kept between calls."""
        return FREQUENCIES.to(device, non_blocking=True)


class AvatarRotaryPosEmbed(nn.Module):
    """RoPE tables of all image tokens; the reference frame stands at -1, before frame 0.

    Source: arXiv 2104.09864; one axis each for frames, rows and columns as in HunyuanVideo.
    """

    def __init__(self, axes_dim: tuple[int, int, int], theta: float) -> None:
        super().__init__()
        self.axes_dim = axes_dim  # of frames, rows and columns
        self.theta = theta

    def forward(
        self, num_frames: int, height: int, width: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (height * width * (1 + num_frames), head dim) float32.

        The tables of the three axes are small, so nothing is kept between calls.
        """
        positions = (
            torch.arange(-1, num_frames).view(1, 1, -1),
            torch.arange(height).view(-1, 1, 1),
            torch.arange(width).view(1, -1, 1),
        )
        cosines: list[Tensor] = []
        sines: list[Tensor] = []
        for axis, dim in zip(positions, self.axes_dim, strict=True):
            tables = get_1d_rotary_pos_embed(dim, axis.flatten().float(), self.theta, use_real=True)
            for table, parts in zip(tables, (cosines, sines), strict=True):
                table = table.to(device, non_blocking=True).view(*axis.shape, dim)
                parts.append(table.expand(height, width, 1 + num_frames, dim))
        return torch.cat(cosines, dim=-1).flatten(0, 2), torch.cat(sines, dim=-1).flatten(0, 2)
