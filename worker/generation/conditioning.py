"""What steers one video, and the checks of what it is made from."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from worker.shapes import SIZE_MULTIPLE, Box, FrameSize, VideoPlan, fit_size

NEGATIVE, POSITIVE = 0, 1  # rows of the pairs
KEPT_PROMPTS = 4  # with their portraits, 14 MB each


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What steers one video, ready for the sampling loop. Pairs are [negative, positive].

    Of V voices; the last may be the silence of the bystanders' faces.
    """

    prompt_embeds: Tensor  # (2, L, D_text)
    prompt_mask: Tensor  # (2, L), 1 = keep, in the reference's positions; on the CPU
    pooled_prompt_embeds: Tensor  # (2, D_pooled)
    audio_embeds: Tensor  # (V, num_frames, 10, 5, 384), whose windows share their states
    face_mask: Tensor  # (1, V, 1, h, w), 1 inside the face of each voice
    reference_mean: Tensor  # (1, C, 1, h, w): the portrait's latent distribution
    reference_std: Tensor  # (1, C, 1, h, w)
    motion_pose: float
    motion_expression: float
    height: int  # px of a frame, as is width
    width: int
    num_frames: int  # frames of video to keep
    fps: float
    face_boxes: tuple[Box, ...]  # that speak, in pixels of the image; none: the whole frame does
    warnings: tuple[str, ...]  # for the user: what was cut or not found

    @property
    def plan(self) -> VideoPlan:
        """What the number of frames decides."""
        return VideoPlan(self.num_frames)


class PromptCache:
    """The embeddings of the last prompts with their portraits: a repeated one costs nothing."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Mapping[str, Tensor]] = {}

    def clear(self) -> None:
        """Forgets all of them."""
        self._kept.clear()

    def get(
        self,
        prompts: Sequence[str],
        portrait: Image.Image,
        encode: Callable[[], Mapping[str, Tensor]],
    ) -> Mapping[str, Tensor]:
        """What `encode` gave for these prompts and this portrait, now or before."""
        digest = hashlib.sha256(json.dumps([*prompts, portrait.size]).encode())
        digest.update(portrait.tobytes())
        key = digest.digest()
        if key not in self._kept:
            self._kept[key] = encode()
            if len(self._kept) > KEPT_PROMPTS:
                del self._kept[next(iter(self._kept))]
        return self._kept[key]


def frame_size(
    image: Image.Image, resolution: int, height: int | None, width: int | None
) -> FrameSize:
    """The size asked for, or the one that fits the picture.

    Raises:
        ValueError: one side alone, or a side that the model has not.
    """
    if height is None and width is None:
        return fit_size(image.height, image.width, resolution)
    if height is None or width is None:
        raise ValueError("height and width must be given together")
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
        raise ValueError(f"height and width must be multiples of {SIZE_MULTIPLE}")
    return FrameSize(height, width)
