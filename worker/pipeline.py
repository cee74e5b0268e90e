"""HunyuanVideo-Avatar from end to end: one portrait and one speech recording in, frames out.

Owns the order of things and no maths: encode, denoise, decode. `__call__` is these three in a row;
a job calls them one by one, to time them and to write frames while later ones are decoded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    LlavaModel,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
    WhisperModel,
)

from worker.shapes import FullSteps, VideoPlan

Box = tuple[float, float, float, float]  # x, y, width, height in pixels
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What steers one video, ready for the sampling loop. Pairs are [negative, positive]."""

    prompt_embeds: Tensor  # (2, L, D_text)
    prompt_mask: Tensor  # (2, L), 1 = keep, in the reference's positions
    pooled_prompt_embeds: Tensor  # (2, D_pooled)
    audio_embeds: Tensor  # (1, plan.padded_audio_frames, 10, 5, 384)
    face_mask: Tensor  # (1, 1, 1, h, w), 1 inside the speaking face
    reference_mean: Tensor  # (1, C, 1, h, w): the portrait's latent distribution
    reference_std: Tensor  # (1, C, 1, h, w)
    motion_pose: float
    motion_expression: float
    height: int  # px of a frame, as is width
    width: int
    num_frames: int  # frames of video to keep
    fps: float
    face_box: Box | None  # in pixels of the given image; None: the whole frame speaks
    warnings: tuple[str, ...]  # for the user: what was cut or not found

    @property
    def plan(self) -> VideoPlan:
        """What the number of frames decides."""
        return VideoPlan(self.num_frames)


@dataclass
class HunyuanVideoAvatarPipelineOutput(BaseOutput):
    """The frames, and what the user should know about them."""

    frames: Any  # as output_type says
    fps: float
    face_box: Box | None
    warnings: tuple[str, ...]


class HunyuanVideoAvatarPipeline(DiffusionPipeline):
    """Talking-avatar video from a portrait, speech and a prompt.

    The default arguments and the bfloat16 latent state are the reference's; `docs/reference.md`
    names each deviation.
    """

    model_cpu_offload_seq = "audio_encoder->text_encoder->text_encoder_2->transformer->vae"
    _optional_components = ["face_detector"]  # noqa: RUF012 (read by diffusers)

    def __init__(
        self,
        transformer: Any,
        vae: AutoencoderKLHunyuanVideo,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: LlavaModel,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder_2: CLIPTextModel,
        tokenizer_2: CLIPTokenizer,
        audio_encoder: WhisperModel,
        feature_extractor: WhisperFeatureExtractor,
        face_detector: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            audio_encoder=audio_encoder,
            feature_extractor=feature_extractor,
            face_detector=face_detector,
        )

    def __call__(
        self,
        image: Image.Image,
        audio: np.ndarray | Tensor,
        prompt: str,
        negative_prompt: str | None = None,
        face_box: Box | None = None,
        resolution: int = 704,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        flow_shift: float = 5.0,
        fps: float = 25,
        motion_pose: float = 25,
        motion_expression: float = 30,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        reference_noise: Tensor | None = None,
        latents_dtype: torch.dtype | None = None,
        full_steps: FullSteps = None,
        output_type: Literal["pt", "np", "pil", "latent"] = "pt",
        on_step: OnStep | None = None,
    ) -> HunyuanVideoAvatarPipelineOutput:
        """A video of the pictured person speaking the recording."""
        raise NotImplementedError

    def encode(
        self,
        image: Image.Image,
        audio: np.ndarray | Tensor,
        prompt: str,
        negative_prompt: str | None = None,
        face_box: Box | None = None,
        resolution: int = 704,
        height: int | None = None,
        width: int | None = None,
        fps: float = 25,
        motion_pose: float = 25,
        motion_expression: float = 30,
    ) -> Conditioning:
        """Everything that the sampling loop needs, from the portrait, the speech and the prompt."""
        raise NotImplementedError

    def denoise(
        self,
        conditioning: Conditioning,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        flow_shift: float = 5.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        reference_noise: Tensor | None = None,
        latents_dtype: torch.dtype | None = None,
        full_steps: FullSteps = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Latents of the video (1, C, kept latents, h, w), still scaled, from noise.

        `on_step(step, num_inference_steps)` is called after each finished step, with step counted
        from 1; what it raises ends the loop and reaches the caller.
        """
        raise NotImplementedError

    def decode_frames(self, latents: Tensor, num_frames: int | None = None) -> Iterator[Tensor]:
        """Frames (F, 3, H, W) float32 in [0, 1], chunk by chunk in order, `num_frames` in all.

        Each chunk leaves as soon as the temporal tile that it comes from is decoded.
        """
        raise NotImplementedError
