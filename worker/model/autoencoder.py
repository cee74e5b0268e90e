"""Latents to frames as a stream: the reference's tiles in time, each given away once it is final.

Owns the tile sizes of HunyuanVideo's autoencoder, which decide the numbers: its normalisation sees
a whole tile, so other tiles are other frames. Tiles overlap by a quarter and are blended there.
"""

from collections.abc import Iterator

from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from worker.shapes import TEMPORAL_COMPRESSION

TILE_PIXELS, STRIDE_PIXELS = 256, 192
TILE_FRAMES, STRIDE_FRAMES = 64, 48
TILE_LATENTS = TILE_FRAMES // TEMPORAL_COMPRESSION
STRIDE_LATENTS = STRIDE_FRAMES // TEMPORAL_COMPRESSION


def set_tiles(vae: AutoencoderKLHunyuanVideo) -> None:
    """Gives the autoencoder the reference's tiles; those in time `decode_frames` walks itself."""
    vae.enable_tiling(
        tile_sample_min_height=TILE_PIXELS,
        tile_sample_min_width=TILE_PIXELS,
        tile_sample_min_num_frames=TILE_FRAMES,
        tile_sample_stride_height=STRIDE_PIXELS,
        tile_sample_stride_width=STRIDE_PIXELS,
        tile_sample_stride_num_frames=STRIDE_FRAMES,
    )
    vae.use_framewise_decoding = False


def decode_frames(
    vae: AutoencoderKLHunyuanVideo,
    latents: Tensor,  # (1, C, T, h, w), unscaled
) -> Iterator[Tensor]:  # (F, 3, H, W) float32 in [0, 1]
    """All frames in order, in chunks of 48 (the first of 49), with at most two tiles in memory.

    Source: Tencent-Hunyuan/HunyuanVideo-Avatar@fd59436, its tiled decode, measured.
    """
    latents = latents.to(vae.dtype)
    num_latents = latents.shape[2]
    if num_latents <= TILE_LATENTS:
        yield _to_frames(vae.decode(latents).sample)
        return
    overlap = None  # the frames of the last tile that this one begins with
    for start in range(0, num_latents - 1, STRIDE_LATENTS):  # the last latent alone adds no frame
        tile = vae.decode(latents[:, :, start : start + TILE_LATENTS + 1]).sample
        stride = STRIDE_FRAMES + 1  # the first latent is one frame, every other one is four
        if overlap is not None:
            tile = vae.blend_t(overlap, tile[:, :, 1:], TILE_FRAMES - STRIDE_FRAMES)
            stride = STRIDE_FRAMES
        overlap = tile[:, :, stride:]
        yield _to_frames(tile[:, :, :stride])


def _to_frames(sample: Tensor) -> Tensor:
    """(1, 3, F, H, W) in [-1, 1] to (F, 3, H, W) in [0, 1]."""
    return (sample[0].transpose(0, 1).float() / 2 + 0.5).clamp(0, 1)
