"""A whole video as the pipeline returns it, in the forms that diffusers has."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from worker.shapes import Box

OutputType = Literal["pt", "np", "pil", "latent"]


@dataclass
class HunyuanVideoAvatarPipelineOutput(BaseOutput):
    """The frames, and what the user should know about them."""

    frames: Any  # as output_type says
    fps: float
    face_box: Box | None
    warnings: tuple[str, ...]


def require_output_type(output_type: str) -> None:
    """Returns if there is such a form.

    Raises:
        ValueError: there is not.
    """
    types = get_args(OutputType)
    if output_type not in types:
        raise ValueError(f"output_type must be one of {types}, not {output_type!r}")


def as_output(frames: Tensor, output_type: str) -> Any:
    """Frames (F, 3, H, W) as diffusers lays them out, a batch of one."""
    if output_type == "pt":
        return frames[None]
    pixels = frames.permute(0, 2, 3, 1)  # (F, H, W, 3)
    if output_type == "np":
        return pixels[None].numpy()
    return [[Image.fromarray(frame) for frame in (pixels * 255).byte().numpy()]]
