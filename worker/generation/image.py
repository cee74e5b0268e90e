"""The portrait: resized to the video's size, as the text encoder's pixels, and as face masks."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from worker.shapes import SPATIAL_COMPRESSION, Box, FrameSize

FACE_AREA = 3.0  # the mask is this many times as wide and as high as the face
LLAVA_SIDE = 336  # px
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(image: Image.Image, size: FrameSize) -> Image.Image:
    """The picture at the video's size, squeezed where its aspect ratio is another."""
    return image.convert("RGB").resize((size.width, size.height), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:  # (3, H, W) float32, 0 to 255
    """The picture's bytes as numbers."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def to_pixels(image: Image.Image) -> Tensor:  # (1, 3, 1, H, W) float32 in [-1, 1]
    """The picture as a video of one frame, for the autoencoder."""
    return (to_tensor(image) / 127.5 - 1)[None, :, None]


def to_llava_pixels(image: Image.Image) -> Tensor:  # (1, 3, 336, 336) float16
    """The picture as the text encoder sees it: squeezed to a square, normalised as CLIP is.

    Not by the processor that comes with the encoder, which would crop: the reference does not.
    """
    square = image.resize((LLAVA_SIDE, LLAVA_SIDE), Image.Resampling.BILINEAR)
    mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    return ((to_tensor(square) / 255 - mean) / std).half()[None]


def scale_box(box: Box, old: FrameSize, new: FrameSize) -> Box:
    """The box of the same face in the same picture at another size."""
    x, y, width, height = box
    across, down = new.width / old.width, new.height / old.height
    return (x * across, y * down, width * across, height * down)


def face_mask(box: Box | None, size: FrameSize) -> Tensor:  # (1, 1, 1, h, w) in latents
    """1 in the neighbourhood of the face, 0 elsewhere, in between at its edge; no box: 1.

    `box` is in pixels of a frame of `size`. The edges are truncated and floored just as the
    reference does, for the same mask to the pixel.
    """
    mask = torch.zeros(1, 1, *size)
    left, right, top, bottom = 0, size.width, 0, size.height
    if box is not None:
        x, y, width, height = box
        left, right = _widen(x, x + width, size.width)
        top, bottom = _widen(y, y + height, size.height)
    mask[..., top:bottom, left:right] = 1
    return interpolate(mask, size=size.latent, mode="bilinear")[:, :, None]


def face_masks(boxes: Sequence[Box], size: FrameSize) -> Tensor:  # (1, V, 1, h, w) in latents
    """The mask of each of several faces; what lies in several masks is the nearest face's.

    Near is measured in the size of each face, so that no mask reaches into the box of another face
    while the boxes do not overlap. One face's mask is `face_mask`, and all masks together are
    where any of these is.
    """
    masks = torch.cat([face_mask(box, size) for box in boxes], dim=1)
    if len(boxes) == 1:
        return masks
    down, across = (
        (torch.arange(side, dtype=torch.float64) + 0.5) * SPATIAL_COMPRESSION
        for side in size.latent
    )
    distances = torch.stack(
        [
            torch.maximum(
                ((down - y - height / 2) / height).abs()[:, None],
                ((across - x - width / 2) / width).abs()[None, :],
            )
            for x, y, width, height in boxes
        ]
    )  # (V, h, w)
    places = sorted(range(len(boxes)), key=lambda index: boxes[index])  # for ties: no order counts
    nearest = torch.tensor(places)[distances[places].argmin(dim=0)]  # (h, w)
    owns = nearest == torch.arange(len(boxes))[:, None, None]
    return masks.amax(dim=1, keepdim=True) * owns[None, :, None]


def _widen(start: float, end: float, limit: int) -> tuple[int, int]:
    """The stretch from start to end, `FACE_AREA` times as long around its middle."""
    centre = (end + start) // 2
    half = (end - start) * FACE_AREA // 2
    return int(max(centre - half, 0)), int(min(centre + half, limit))
