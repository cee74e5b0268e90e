"""Latents to frames as a stream, tile by tile, in little memory.

Owns the tile sizes of HunyuanVideo's autoencoder, which decide the numbers: its normalisation sees
a whole tile, so other tiles are other frames. Tiles overlap by a quarter and are blended there.

Owns too how a tile passes through the decoder's modules. Its activations are a queue of chunks in
order of time. A convolution takes chunks from one queue as it adds chunks to the next, and what
normalisation, SiLU, upsampling and padding make of a chunk lies in memory for that chunk alone. So
a tile takes the room of its largest activation and a little more (`tile_bytes`).

No tile needs another one to be decoded, so several processes may share them: whoever decodes, the
tiles are blended in one order, and the frames are the same to the last bit.

Shape letters: C channels, f frames of a chunk, F frames, H and W pixels, T, h and w latents.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoResnetBlockCausal3D,
    HunyuanVideoUpsampleCausal3D,
)
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from worker.model import kernels

TILE_PIXELS, STRIDE_PIXELS = 256, 192
TILE_FRAMES, STRIDE_FRAMES = 64, 48

SCRATCH_BYTES = 2**30
MEMORY_FORMAT = torch.channels_last_3d  # a chunk's frames one after the other, a pixel's values too
CARRIED = 2  # frames before its own that a convolution of three frames sees

Chunks = deque[Tensor]  # (1, C, f, H, W) each


def set_tiles(vae: AutoencoderKLHunyuanVideo) -> None:
    """Gives the autoencoder the reference's tiles, to encode and to decode."""
    vae.enable_tiling(
        tile_sample_min_height=TILE_PIXELS,
        tile_sample_min_width=TILE_PIXELS,
        tile_sample_min_num_frames=TILE_FRAMES,
        tile_sample_stride_height=STRIDE_PIXELS,
        tile_sample_stride_width=STRIDE_PIXELS,
        tile_sample_stride_num_frames=STRIDE_FRAMES,
    )


@dataclass(frozen=True)
class Tile:
    """A part of the latents that is decoded by itself."""

    latents: Tensor  # (1, C, T, h, w)
    decoded_shape: tuple[int, ...]  # (1, 3, F, H, W)


TileMap = Callable[[Callable[[Tile], Tensor], list[Tile]], Iterable[Tensor]]  # as `map` is one


def decode_frames(
    vae: AutoencoderKLHunyuanVideo,
    latents: Tensor,  # (1, C, T, h, w), unscaled
    scratch_bytes: int = SCRATCH_BYTES,
    num_frames: int | None = None,
    tile_map: TileMap = map,
) -> Iterator[Tensor]:  # (F, 3, H, W) float32 in [0, 1]
    """The frames in order, in chunks of 48 (the first of 49).

    Args:
        scratch_bytes: what the chunk in work may take; more makes fewer and larger kernels of the
            same arithmetic. `tile_bytes` says what all of it takes.
        num_frames: how many frames to give; None is all. What lies beyond is not decoded.
        tile_map: gives the decoded tiles in order, each when it is asked for.

    Source: Tencent-Hunyuan/HunyuanVideo-Avatar@fd59436, its tiled decode, measured.
    """
    steps = _steps_in_time(vae, latents, num_frames)
    decoded = iter(tile_map(partial(_decode_tile, vae, scratch_bytes), _tiles(vae, steps)))
    missing = num_frames
    stride = vae.tile_sample_stride_num_frames
    overlap = None  # the frames of the last step that this one begins with
    for step_latents in steps:
        step = _joined(vae, step_latents, decoded)
        if overlap is None:
            # the first latent is one frame, every other one is four
            end = stride + 1 if len(steps) > 1 else step.shape[2]
        else:
            step = _blend(overlap, step[:, :, 1:], 2, vae.tile_sample_min_num_frames - stride)
            end = stride
        frames, overlap = _to_frames(step[:, :, :end][:, :, :missing]), step[:, :, end:].clone()
        del step
        if missing is not None:
            missing -= len(frames)
        yield frames
        del frames  # or they would lie there while the next are decoded


def decode_tiles(
    vae: AutoencoderKLHunyuanVideo,
    latents: Tensor,  # (1, C, T, h, w), unscaled
    scratch_bytes: int,
    num_frames: int | None,
    tile_map: TileMap,
) -> None:
    """Has `tile_map` decode what it wants of the same tiles, and do with it what it likes."""
    for _ in tile_map(partial(_decode_tile, vae, scratch_bytes), tiles(vae, latents, num_frames)):
        pass


def tiles(
    vae: AutoencoderKLHunyuanVideo,
    latents: Tensor,  # (1, C, T, h, w)
    num_frames: int | None = None,
) -> list[Tile]:
    """What so many frames are decoded from, in the order in which it is blended."""
    return _tiles(vae, _steps_in_time(vae, latents, num_frames))


def tile_bytes(vae: AutoencoderKLHunyuanVideo, scratch_bytes: int = SCRATCH_BYTES) -> int:
    """Most memory that the decoder's activations take in one tile, beside weights and frames."""
    frames = vae.tile_sample_min_num_frames // vae.temporal_compression_ratio + 1
    height = vae.tile_sample_min_height // vae.spatial_compression_ratio
    width = vae.tile_sample_min_width // vae.spatial_compression_ratio
    most = 0
    for block in vae.decoder.up_blocks:
        for resnet in block.resnets:
            conv = resnet.conv1.conv
            values = frames * height * width * max(conv.in_channels, 2 * conv.out_channels)
            least = 2 * _frame_bytes(conv, (1, 1, 1), height, width)
            most = max(most, values * conv.weight.itemsize + max(scratch_bytes, least))
        for upsampler in block.upsamplers or ():
            conv, factor = upsampler.conv.conv, upsampler.upsample_factor
            values = frames * height * width * conv.in_channels
            least = (factor[0] + 1) * _frame_bytes(conv, factor, height, width)
            frames = factor[0] * (frames - 1) + 1
            height, width = factor[1] * height, factor[2] * width
            values += frames * height * width * conv.out_channels
            most = max(most, values * conv.weight.itemsize + max(scratch_bytes, least))
    return most


def _to_frames(sample: Tensor) -> Tensor:
    """(1, 3, F, H, W) in [-1, 1] to (F, 3, H, W) in [0, 1]."""
    frames = sample[0].transpose(0, 1).to(torch.float32, copy=True)
    return frames.div_(2).add_(0.5).clamp_(0, 1)


@apply_forward_hook  # an offloaded autoencoder comes to its device, as for its own `decode`
@torch.no_grad()
def _decode_tile(vae: AutoencoderKLHunyuanVideo, scratch_bytes: int, tile: Tile) -> Tensor:
    """The tile's frames (1, 3, F, H, W), not blended with any other's."""
    return _TileDecoder(vae, scratch_bytes)(tile.latents)


def _steps_in_time(
    vae: AutoencoderKLHunyuanVideo, latents: Tensor, num_frames: int | None
) -> list[Tensor]:  # (1, C, T, h, w), T no more than a tile has
    """The latents in overlapping steps of a tile's length, as many as so many frames need."""
    latents = latents.to(vae.dtype)
    num_latents, ratio = latents.shape[2], vae.temporal_compression_ratio
    tile_latents = vae.tile_sample_min_num_frames // ratio
    if num_latents <= tile_latents:
        return [latents]
    stride_latents = vae.tile_sample_stride_num_frames // ratio
    return [
        latents[:, :, start : start + tile_latents + 1]
        for start in range(0, num_latents - 1, stride_latents)  # the last alone adds no frame
        if start == 0 or num_frames is None or start * ratio + 1 < num_frames
    ]


def _tiles(vae: AutoencoderKLHunyuanVideo, steps: Sequence[Tensor]) -> list[Tile]:
    """The tiles in space of all steps in time, of each row by row."""
    ratio = vae.spatial_compression_ratio
    height, width = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
    return [
        _tile(vae, step[..., top // ratio :, left // ratio :][..., :height, :width])
        for step in steps
        for top, left in product(*_corners(vae, step))
    ]


def _tile(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tile:
    num_latents, height, width = latents.shape[2:]
    num_frames = vae.temporal_compression_ratio * (num_latents - 1) + 1
    ratio = vae.spatial_compression_ratio
    shape = (1, vae.config.out_channels, num_frames, height * ratio, width * ratio)
    return Tile(latents, shape)


def _corners(vae: AutoencoderKLHunyuanVideo, step: Tensor) -> tuple[range, range]:
    """Where the tiles of a step begin, from above and from the left, in pixels."""
    height, width = (side * vae.spatial_compression_ratio for side in step.shape[3:])
    if height <= vae.tile_sample_min_height and width <= vae.tile_sample_min_width:
        return range(1), range(1)
    return (
        range(0, height, vae.tile_sample_stride_height),
        range(0, width, vae.tile_sample_stride_width),
    )


def _joined(
    vae: AutoencoderKLHunyuanVideo,
    latents: Tensor,  # (1, C, T, h, w), no longer than a tile
    decoded: Iterator[Tensor],
) -> Tensor:  # (1, 3, F, H, W)
    """The frames of one step in time, from one tile in space or from several, blended.

    Of a tile that is done only what a later one is blended with is kept.
    """
    tops, lefts = _corners(vae, latents)
    if len(tops) == len(lefts) == 1:
        return next(decoded)
    stride_height, stride_width = vae.tile_sample_stride_height, vae.tile_sample_stride_width
    overlap_height = vae.tile_sample_min_height - stride_height
    overlap_width = vae.tile_sample_min_width - stride_width
    step = latents.new_empty(_tile(vae, latents).decoded_shape)
    above: list[Tensor] = []  # the last rows of each tile of the row before
    for top in tops:
        below = []
        before = None  # the last columns of the tile to the left
        for index, left in enumerate(lefts):
            tile = next(decoded)
            if above:
                tile = _blend(above[index], tile, 3, overlap_height)
            if before is not None:
                tile = _blend(before, tile, 4, overlap_width)
            before = tile[..., -overlap_width:].clone()
            below.append(tile[..., -overlap_height:, :].clone())
            kept = tile[..., :stride_height, :stride_width]
            step[..., top : top + kept.shape[3], left : left + kept.shape[4]] = kept
        above = below
    return step


def _blend(before: Tensor, tile: Tensor, dim: int, overlap: int) -> Tensor:
    """The tile itself; where it begins, `before` ends and fades out along the dimension."""
    overlap = min(before.shape[dim], tile.shape[dim], overlap)
    share = torch.arange(overlap, dtype=torch.float64, device=tile.device) / overlap
    share = share.view([-1 if axis == dim else 1 for axis in range(tile.ndim)])
    precise = torch.promote_types(tile.dtype, torch.float32)
    start = tile.narrow(dim, 0, overlap)
    ended = before.narrow(dim, before.shape[dim] - overlap, overlap)
    start.copy_(ended * (1 - share).to(precise) + start * share.to(precise))
    return tile


@dataclass(frozen=True)
class _TileDecoder:
    """The autoencoder's decoder, as it passes one tile through."""

    vae: AutoencoderKLHunyuanVideo
    scratch_bytes: int

    def __call__(self, latents: Tensor) -> Tensor:  # (1, C, T, h, w) -> (1, 3, F, H, W)
        """What the decoder makes of the latents."""
        decoder = self.vae.decoder
        chunks: Chunks = deque([self.vae.post_quant_conv(latents)])
        chunks = deque(self._convolution(decoder.conv_in.conv).over(chunks))
        first, *others = decoder.mid_block.resnets
        chunks = self._resnet(first, chunks)
        for attention, resnet in zip(decoder.mid_block.attentions, others, strict=True):
            if attention is not None:
                chunks = _attend(attention, chunks)
            chunks = self._resnet(resnet, chunks)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                chunks = self._resnet(resnet, chunks)
            for upsampler in block.upsamplers or ():
                chunks = self._upsample(upsampler, chunks)
        affine = group_norm_affine(decoder.conv_norm_out, chunks)
        last = self._convolution(decoder.conv_out.conv, affine)
        return torch.cat(list(last.over(chunks)), 2)

    def _resnet(self, block: HunyuanVideoResnetBlockCausal3D, chunks: Chunks) -> Chunks:
        """Two convolutions of the normalised input, added to it; takes the chunks."""
        affine = group_norm_affine(block.norm1, chunks)
        convolution = self._convolution(block.conv1.conv, affine)
        hidden: Chunks = deque()
        residual: Chunks = deque()
        for piece in convolution.pieces(chunks):
            hidden.append(convolution(piece))
            shortcut = block.conv_shortcut
            residual.append(piece if shortcut is None else shortcut.conv(piece))
            del piece
        affine = group_norm_affine(block.norm2, hidden)
        convolution = self._convolution(block.conv2.conv, affine)
        return deque(output.add_(residual.popleft()) for output in convolution.over(hidden))

    def _upsample(self, upsampler: HunyuanVideoUpsampleCausal3D, chunks: Chunks) -> Chunks:
        """A convolution of the input enlarged; takes the chunks."""
        convolution = self._convolution(upsampler.conv.conv, factor=upsampler.upsample_factor)
        return deque(convolution.over(chunks))

    def _convolution(
        self,
        conv: nn.Conv3d,
        affine: "GroupNormAffine | None" = None,
        factor: tuple[int, int, int] = (1, 1, 1),
    ) -> "_Convolution":
        return _Convolution(conv, self.scratch_bytes, affine, factor)


def _attend(attention: Attention, chunks: Chunks) -> Chunks:
    """Attention of each frame's pixels to those of this frame and of those before it, added.

    One frame's queries at a time: what it must not see is left out, so there is no mask.
    """
    hidden = torch.cat(list(chunks), 2)
    num_frames, height, width = hidden.shape[2:]
    shift, scale = group_norm_affine(attention.group_norm, [hidden])
    tokens = torch.addcmul(shift, hidden, scale).to(hidden.dtype)
    tokens = tokens.permute(0, 2, 3, 4, 1).flatten(1, 3)  # (1, F*H*W, C)
    query, key, value = (
        projection(tokens).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        for projection in (attention.to_q, attention.to_k, attention.to_v)
    )  # (1, heads, F*H*W, C / heads)
    attended = []
    for end in range(height * width, tokens.shape[1] + 1, height * width):
        frame, seen = slice(end - height * width, end), slice(end)
        attended.append(
            F.scaled_dot_product_attention(query[:, :, frame], key[:, :, seen], value[:, :, seen])
        )
    joined = torch.cat(attended, 2).transpose(1, 2).flatten(2)  # (1, F*H*W, C)
    joined = attention.to_out[0](joined).unflatten(1, (num_frames, height, width))
    return deque([hidden.add_(joined.permute(0, 4, 1, 2, 3))])


class GroupNormAffine(NamedTuple):
    """What a group normalisation does to each channel: its `shift` plus its `scale` times it."""

    shift: Tensor  # (1, C, 1, 1, 1), float32 or the model's own precision if that is higher
    scale: Tensor


def group_norm_affine(norm: nn.GroupNorm, chunks: Sequence[Tensor] | Chunks) -> GroupNormAffine:
    """The normalisation by the statistics of all chunks together.

    Sums are per frame and channel, so that they do not depend on where the chunks end.
    """
    precise = torch.promote_types(chunks[0].dtype, torch.float32)
    per_chunk = zip(*map(kernels.channel_sums, chunks), strict=True)
    sums, squares = (torch.cat(list(values), 1) for values in per_chunk)  # (C, F) each
    count = norm.num_channels // norm.num_groups * sums.shape[1] * chunks[0][0, 0, 0].numel()

    def mean(values: Tensor) -> Tensor:  # (C, F) -> (C,), that of the channel's group
        groups = values.unflatten(0, (norm.num_groups, -1)).sum((1, 2)) / count
        return groups.repeat_interleave(norm.num_channels // norm.num_groups)

    center = mean(sums.double())
    variance = mean(squares.double()) - center.square()
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shift = norm.bias - center * scale
    return GroupNormAffine(*(values.to(precise).view(1, -1, 1, 1, 1) for values in (shift, scale)))


class _Convolution:
    """One of the decoder's 3 x 3 x 3 convolutions over a tile, chunk by chunk.

    Its buffer holds a chunk as the convolution sees it, with a border of repeated pixels, after
    the last two frames of the chunk before. Before the first frame that frame is repeated; where
    time is doubled one of its repetitions is the one that doubling would have added.
    """

    def __init__(
        self,
        conv: nn.Conv3d,
        scratch_bytes: int,
        affine: GroupNormAffine | None = None,
        factor: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        self._conv = conv
        # stored as PyTorch saves it, wanted as the activations lie; else converted at each chunk
        self._weight = conv.weight.to(memory_format=MEMORY_FORMAT)
        self._scratch_bytes = scratch_bytes
        self._affine = affine
        self._factor = factor
        self._buffer: Tensor | None = None  # (1, C, frames, H + 2, W + 2)
        self._seen: Tensor | None = None  # the frames of it that the last convolution saw

    def over(self, chunks: Chunks) -> Iterator[Tensor]:
        """The output's chunks; takes the input's."""
        for piece in self.pieces(chunks):
            yield self(piece)
            del piece

    def pieces(self, chunks: Chunks) -> Iterator[Tensor]:
        """The chunks, taken, and cut where they are too long for the scratch memory."""
        while chunks:
            chunk = chunks.popleft()
            frame_bytes = _frame_bytes(self._conv, self._factor, *chunk.shape[3:])
            frames = max(1, (self._scratch_bytes // frame_bytes - 1) // self._factor[0])
            pieces = deque(chunk.chunk(math.ceil(chunk.shape[2] / frames), 2))
            del chunk
            while pieces:
                yield pieces.popleft()

    def __call__(self, piece: Tensor) -> Tensor:
        """The convolution of the next chunk (1, C, f, H, W)."""
        time = self._factor[0]
        is_first = self._buffer is None
        start = CARRIED + 1 - time if is_first else CARRIED
        seen = self._room(piece, start + time * piece.shape[2])  # (1, C, ..., H + 2, W + 2)
        new = seen[:, :, start:]
        kernels.padded_chunk(piece, new, self._factor, self._affine)
        if is_first:
            seen[:, :, :start] = new[:, :, :1]
        return F.conv3d(seen, self._weight, self._conv.bias)

    def _room(self, piece: Tensor, num_frames: int) -> Tensor:
        """So many frames of the buffer, which begin with the last two of the chunk before."""
        before = self._seen
        if self._buffer is None or self._buffer.shape[2] < num_frames:
            channels, _, height, width = piece.shape[1:]
            _, vertical, horizontal = self._factor
            size = (1, channels, num_frames, vertical * height + 2, horizontal * width + 2)
            self._buffer = torch.empty(
                size, dtype=piece.dtype, device=piece.device, memory_format=MEMORY_FORMAT
            )
        self._seen = self._buffer[:, :, :num_frames]
        if before is not None:
            for index in range(CARRIED):  # one by one, as they may lie where they are copied to
                self._seen[:, :, index] = before[:, :, index - CARRIED]
        return self._seen


def _frame_bytes(conv: nn.Conv3d, factor: tuple[int, int, int], height: int, width: int) -> int:
    """What a frame takes before and after a convolution of frames of this size, enlarged."""
    channels = max(conv.in_channels, conv.out_channels)
    pixels = (factor[1] * height + 2) * (factor[2] * width + 2)
    return 2 * channels * pixels * conv.weight.itemsize
