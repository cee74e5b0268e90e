"""HunyuanVideo-Avatar from end to end: one portrait and one speech recording in, frames out.

Owns the order of things and no maths: encode, denoise, decode. `__call__` is these three in a row;
a job calls them one by one, to time them and to write frames while later ones are decoded.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import HunyuanVideoLoraLoaderMixin
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

from worker.generation import sampling
from worker.generation.audio import encode_audio
from worker.generation.face import TorchScriptFaceDetector, largest_face
from worker.generation.image import face_mask, resize, scale_box, to_llava_pixels, to_pixels
from worker.generation.sampling import TailRing
from worker.generation.text import (
    NEGATIVE_PROMPT,
    PROMPT_PREFIX,
    encode_clip,
    encode_llava,
    tokenize,
)
from worker.loading.offload import HostedNetwork
from worker.model import autoencoder
from worker.model import encoders as encoders  # diffusers loads from modules that are there already
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel, Tail
from worker.multi_gpu.process_group import Sharing
from worker.shapes import (
    FRAME_RATES,
    SIZE_MULTIPLE,
    WINDOW_LATENTS,
    Box,
    FrameSize,
    FullSteps,
    VideoPlan,
    count_frames,
    fit_size,
    resolve_full_steps,
)

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What steers one video, ready for the sampling loop. Pairs are [negative, positive]."""

    prompt_embeds: Tensor  # (2, L, D_text)
    prompt_mask: Tensor  # (2, L), 1 = keep, in the reference's positions; on the CPU
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


NEGATIVE, POSITIVE = 0, 1  # rows of the pairs
KEPT_PROMPTS = 4  # with their portraits, 14 MB each: a repeated one costs nothing


@dataclass(frozen=True)
class Branch:
    """One side of the guidance: what it hears and first reads, and its tokens for cached steps."""

    audio_embeds: Tensor  # (1, 4T, 10, 5, 384)
    first_prompt: int
    tails: TailRing = field(default_factory=TailRing)


@dataclass(frozen=True)
class Step:
    """One denoising step."""

    index: int
    timestep: Tensor  # (1,)
    reuses_tails: bool  # a cached step
    keeps_tails: bool  # a full step before a cached one

    @property
    def is_early(self) -> bool:
        """Whether the prompt guides; later both branches read it and only the audio guides."""
        return self.index < sampling.PROMPT_GUIDED_STEPS


class HunyuanVideoAvatarPipeline(DiffusionPipeline, HunyuanVideoLoraLoaderMixin):
    """Talking-avatar video from a portrait, speech and a prompt.

    The default arguments and the bfloat16 latent state are the reference's; `docs/reference.md`
    names each deviation. Each component runs in its own dtype. Without `face_detector` a frontal
    face is found by OpenCV. LoRAs made for HunyuanVideo load with `load_lora_weights`.
    """

    # Networks that lie on the host; they come to the GPU while they are in use.
    hosted: Mapping[str, HostedNetwork] = MappingProxyType({})
    _optional_components = ["face_detector"]  # noqa: RUF012 (read by diffusers)

    def __init__(
        self,
        transformer: HunyuanVideoAvatarTransformer3DModel,
        vae: AutoencoderKLHunyuanVideo,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: LlavaModel,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder_2: CLIPTextModel,
        tokenizer_2: CLIPTokenizer,
        audio_encoder: WhisperModel,
        feature_extractor: WhisperFeatureExtractor,
        face_detector: TorchScriptFaceDetector | None = None,
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
        self._encoded: dict[bytes, dict[str, Tensor]] = {}  # by prompts and portrait
        audio_encoder.float()  # published in float16, meant to run in float32; 33 MB
        autoencoder.set_tiles(vae)

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image,
        audio: np.ndarray | Tensor,
        prompt: str,
        negative_prompt: str | None = None,
        face_box: Sequence[float] | None = None,
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
        float8: bool = False,
        output_type: Literal["pt", "np", "pil", "latent"] = "pt",
        on_step: OnStep | None = None,
    ) -> HunyuanVideoAvatarPipelineOutput:
        """A video of the pictured person speaking the recording: encode, denoise, decode in a row.

        The arguments are those of the three methods, and
            output_type: "pt" a tensor (1, F, 3, H, W) and "np" an array (1, F, H, W, 3), float32
                in [0, 1]; "pil" a list of one list of pictures; "latent" (1, C, kept latents, h, w)
                before decoding, still scaled. Frames are on the CPU.

        Raises:
            ValueError: an argument that the model cannot serve, by name.
        """
        if output_type not in ("pt", "np", "pil", "latent"):
            raise ValueError(
                f'output_type must be "pt", "np", "pil" or "latent", not {output_type!r}'
            )
        conditioning = self.encode(
            image=image,
            audio=audio,
            prompt=prompt,
            negative_prompt=negative_prompt,
            face_box=face_box,
            resolution=resolution,
            height=height,
            width=width,
            fps=fps,
            motion_pose=motion_pose,
            motion_expression=motion_expression,
        )
        result = self.denoise(
            conditioning,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            flow_shift=flow_shift,
            generator=generator,
            latents=latents,
            reference_noise=reference_noise,
            latents_dtype=latents_dtype,
            full_steps=full_steps,
            float8=float8,
            on_step=on_step,
        )
        frames: Any = result
        if output_type != "latent":
            chunks = [chunk.cpu() for chunk in self.decode_frames(result, conditioning.num_frames)]
            frames = _as_output(torch.cat(chunks), output_type)
        return HunyuanVideoAvatarPipelineOutput(
            frames=frames,
            fps=conditioning.fps,
            face_box=conditioning.face_box,
            warnings=conditioning.warnings,
        )

    @torch.no_grad()
    def encode(
        self,
        image: Image.Image,
        audio: np.ndarray | Tensor,
        prompt: str,
        negative_prompt: str | None = None,
        face_box: Sequence[float] | None = None,
        resolution: int = 704,
        height: int | None = None,
        width: int | None = None,
        fps: float = 25,
        motion_pose: float = 25,
        motion_expression: float = 30,
    ) -> Conditioning:
        """Everything that the sampling loop needs, from the portrait, the speech and the prompt.

        Args:
            image: the portrait, upright; it is squeezed to the frame size.
            audio: the speech, (samples,) float32 in [-1, 1], mono, 16 kHz. It sets the length.
            prompt: the user's words; the reference's prefix is put before them.
            negative_prompt: what to avoid; None is the reference's.
            face_box: (x, y, width, height) of the speaking face in pixels of `image`; None
                detects it.
            resolution: the short side, roughly; the size follows from it and the picture's shape.
            height, width: an exact size instead, both or neither, multiples of 16.
            fps: frames a second of the video, 25 or 12.5.
            motion_pose, motion_expression: how much the head and the face move.

        Raises:
            ValueError: an argument that the model cannot serve, by name.
        """
        size = _frame_size(image, resolution, height, width)
        waveform = _checked_waveform(audio, fps)
        portrait = resize(image, size)

        with self._in_use("audio_encoder"):
            audio_embeds = encode_audio(waveform, fps, self.feature_extractor, self.audio_encoder)
        negative_prompt = NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
        prompts, warnings = self._encode_prompts(negative_prompt, PROMPT_PREFIX + prompt, portrait)

        given_size = FrameSize(image.height, image.width)
        if face_box is None:
            box = largest_face(portrait, self.face_detector)
            used_box = scale_box(box, size, given_size) if box else None
        else:
            used_box = _checked_box(face_box, given_size)
            box = scale_box(used_box, given_size, size)
        if box is None:
            warnings.append("no face was found: the whole picture moves; give face_box")

        with self._in_use("vae"):
            pixels = to_pixels(portrait).to(self.vae.device, self.vae.dtype)
            reference = self.vae.encode(pixels).latent_dist

        return Conditioning(
            **prompts,
            audio_embeds=audio_embeds,
            face_mask=face_mask(box, size).to(reference.mean.device),
            reference_mean=reference.mean.float(),
            reference_std=reference.std.float(),
            motion_pose=motion_pose,
            motion_expression=motion_expression,
            height=size.height,
            width=size.width,
            num_frames=count_frames(len(waveform), fps),
            fps=fps,
            face_box=used_box,
            warnings=tuple(warnings),
        )

    def _encode_prompts(
        self, negative_prompt: str, prompt: str, portrait: Image.Image
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The fields of `Conditioning` that come from the prompts, and what to tell the user."""
        texts = {"negative prompt": negative_prompt, "prompt": prompt}
        tokens = [tokenize(text, self.tokenizer) for text in texts.values()]
        warnings = [
            f"the {name} is longer than the model reads: its end was cut off"
            for name, each in zip(texts, tokens, strict=True)
            if each.was_cut
        ]
        key = hashlib.sha256(json.dumps([*texts.values(), portrait.size]).encode())
        key.update(portrait.tobytes())
        if key.digest() not in self._encoded:
            with self._in_use("text_encoder"):
                embeds, mask = encode_llava(tokens, to_llava_pixels(portrait), self.text_encoder)
            with self._in_use("text_encoder_2"):
                pooled = encode_clip(list(texts.values()), self.tokenizer_2, self.text_encoder_2)
            fields = {"prompt_embeds": embeds, "prompt_mask": mask, "pooled_prompt_embeds": pooled}
            self._encoded[key.digest()] = fields
            if len(self._encoded) > KEPT_PROMPTS:
                del self._encoded[next(iter(self._encoded))]
        return self._encoded[key.digest()], warnings

    @torch.no_grad()
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
        float8: bool = False,
        on_step: OnStep | None = None,
        sharing: Sharing | None = None,
    ) -> Tensor:
        """Latents of the video (1, C, kept latents, h, w), still scaled, from noise.

        Args:
            conditioning: what `encode` returned.
            num_inference_steps: steps from noise to video.
            guidance_scale: weight of the prompt in the first ten steps; 1 or less turns guidance
                off, by the audio too, and halves the work.
            flow_shift: how much of the steps is spent at high noise.
            generator: draws the noise, then the reference's; None draws unrepeatable noise.
            latents: the noise instead, (1, C, plan.noise_latents, h, w).
            reference_noise: the noise in the portrait's latents instead, (1, C, 33, h, w).
            latents_dtype: what the latents are rounded to after each step; None is the
                reference's bfloat16, torch.float32 rounds nothing.
            full_steps: the steps (from 0) that run all blocks, the others the last block only;
                None the first 30 %, the last 18 % and every fifth between; "reference" the fixed
                list made for 50 steps.
            float8: computes the transformer's linear layers in 8 bits; needs a GPU of compute
                capability 8.9 or more.
            on_step: called as `on_step(step, num_inference_steps)` after each finished step, with
                step counted from 1; what it raises ends the loop and reaches the caller.
            sharing: with the processes that run this loop too; the first one's noise counts.

        Raises:
            ValueError: noise of another shape; unusable steps.
        """
        plan = conditioning.plan
        cached = set(range(num_inference_steps)) - resolve_full_steps(
            full_steps, num_inference_steps
        )
        sigmas, timesteps = sampling.noise_levels(self.scheduler, num_inference_steps, flow_shift)
        latents, reference_latents = self._prepare_latents(
            conditioning, generator, latents, reference_noise
        )
        sharing = sharing or Sharing()
        latents, reference_latents = sharing.same(latents), sharing.same(reference_latents)
        timesteps = timesteps.to(latents.device)
        is_guided = sampling.is_guided(guidance_scale)
        branches = sharing.own(_branches(conditioning, is_guided=is_guided))

        with self._in_use("transformer"), self.progress_bar(total=num_inference_steps) as progress:
            for index in range(num_inference_steps):
                sharing.begin_step()
                step = Step(
                    index=index,
                    timestep=timesteps[index : index + 1],
                    reuses_tails=index in cached,
                    keeps_tails=index not in cached and index + 1 in cached,
                )
                if not step.reuses_tails:
                    for branch in branches:
                        branch.tails.clear()  # gigabytes that nothing reads any more
                weight = sampling.guidance_weight(index, num_inference_steps, guidance_scale)
                total = torch.zeros_like(latents)
                count = torch.zeros_like(latents[:1, :1, :, :1, :1])  # (1, 1, T, 1, 1)
                for start in sampling.window_starts(plan, index):
                    window = sampling.take(latents, 2, start, WINDOW_LATENTS)
                    velocities = self._velocities(
                        window, start, step, branches, conditioning, reference_latents, float8
                    )
                    velocity = sampling.guide(sharing.exchange(velocities), weight)
                    window = window + velocity * (sigmas[index + 1] - sigmas[index]).item()
                    window = window.to(latents_dtype or torch.bfloat16).float()
                    sampling.add(total, 2, start, window)
                    sampling.add(count, 2, start, torch.ones_like(window[:1, :1, :, :1, :1]))
                latents = total / count  # windows overlap where they do not divide the ring
                progress.update()
                sharing.end_step()
                if on_step is not None:
                    on_step(index + 1, num_inference_steps)
        return latents[:, :, : plan.kept_latents]

    def _prepare_latents(
        self,
        conditioning: Conditioning,
        generator: torch.Generator | None,
        latents: Tensor | None,
        reference_noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Noise on the ring (1, C, T, h, w) and the reference's latents (1, C, 33, h, w)."""
        if generator is None:
            generator = torch.Generator()
            generator.seed()  # from the system: the global generator stays untouched
        plan = conditioning.plan
        mean, std = conditioning.reference_mean, conditioning.reference_std
        _, channels, _, *size = mean.shape
        shape = (1, channels, plan.noise_latents, *size)
        latents = _given_or_drawn(latents, "latents", shape, generator, like=mean)
        shape = (1, channels, WINDOW_LATENTS, *size)
        noise = _given_or_drawn(reference_noise, "reference_noise", shape, generator, like=mean)
        reference_latents = (mean + std * noise) * self.vae.config.scaling_factor
        return latents[:, :, : plan.sampled_latents], reference_latents

    def _velocities(
        self,
        window: Tensor,  # (1, C, 33, h, w)
        start: int,  # of the window on the ring
        step: Step,
        branches: Sequence[Branch],
        conditioning: Conditioning,
        reference_latents: Tensor,  # (1, C, 33, h, w)
        float8: bool,
    ) -> list[Tensor]:  # (1, C, 33, h, w) float32, one a branch
        """What the transformer predicts for one window on these sides of the guidance."""
        prompts = [branch.first_prompt for branch in branches] if step.is_early else [POSITIVE]
        batch = len(prompts)
        frames = sampling.ring_frames(start, WINDOW_LATENTS, conditioning.plan.sampled_latents)
        quietened = sampling.EARLY_FACE_MASK if step.is_early else 1.0
        motion = window.new_ones(batch, 4)
        tail = None
        if step.reuses_tails:
            images, texts = zip(*(branch.tails.gather(frames) for branch in branches), strict=True)
            tail = Tail(images, texts)
        output = self.transformer(
            hidden_states=window.expand(batch, -1, -1, -1, -1),
            timestep=step.timestep.expand(batch),
            encoder_hidden_states=conditioning.prompt_embeds[prompts],
            encoder_attention_mask=conditioning.prompt_mask[prompts],
            pooled_projections=conditioning.pooled_prompt_embeds[prompts],
            reference_latents=reference_latents.expand(batch, -1, -1, -1, -1),
            audio_embeds=torch.cat(
                [sampling.window_audio(branch.audio_embeds, start) for branch in branches]
            ),
            face_mask=(conditioning.face_mask * quietened).expand(batch, -1, -1, -1, -1),
            motion_expression=motion * conditioning.motion_expression,
            motion_pose=motion * conditioning.motion_pose,
            fps=motion[:, 0] * conditioning.fps,
            tail=tail,
            return_tail=step.keeps_tails,
            float8=float8,
        )
        if step.keeps_tails:
            kept = zip(branches, output.tail.image, output.tail.text, strict=True)
            for branch, image, text in kept:
                branch.tails.store(frames, image, text)
        return list(output.sample.float().split(1))

    @torch.no_grad()
    def decode_frames(
        self,
        latents: Tensor,
        num_frames: int | None = None,
        scratch_bytes: int = autoencoder.SCRATCH_BYTES,
    ) -> Generator[Tensor]:
        """Frames (F, 3, H, W) float32 in [0, 1], chunk by chunk in order, on the VAE's device.

        Each chunk leaves as soon as its tile is decoded, and what lies beyond `num_frames` is not
        decoded; the chunks together are the reference's tiled decode.

        Args:
            latents: (1, C, latent frames, h, w), what `denoise` returned.
            num_frames: how many frames to give; None is all.
            scratch_bytes: as `worker.model.autoencoder.decode_frames` takes it.
        """
        missing = num_frames
        scaling_factor = self.vae.config.scaling_factor
        unscaled = latents / scaling_factor
        with self._in_use("vae"):
            for frames in autoencoder.decode_frames(self.vae, unscaled, scratch_bytes):
                frames = frames[:missing]
                yield frames
                if missing is not None:
                    missing -= len(frames)
                    if missing == 0:
                        break

    @contextmanager
    def _in_use(self, name: str) -> Iterator[None]:
        """Inside, the network is where it runs."""
        hosted = self.hosted.get(name)
        with hosted.in_use() if hosted else nullcontext():
            yield


def _frame_size(
    image: Image.Image, resolution: int, height: int | None, width: int | None
) -> FrameSize:
    """The size asked for, or the one that fits the picture."""
    if height is None and width is None:
        return fit_size(image.height, image.width, resolution)
    if height is None or width is None:
        raise ValueError("height and width must be given together")
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
        raise ValueError(f"height and width must be multiples of {SIZE_MULTIPLE}")
    return FrameSize(height, width)


def _checked_waveform(audio: np.ndarray | Tensor, fps: float) -> np.ndarray:
    """The speech as a float32 array of at least one frame."""
    if isinstance(audio, Tensor):
        audio = audio.cpu().numpy()
    waveform = np.asarray(audio, dtype=np.float32)
    if waveform.ndim != 1:
        raise ValueError(f"audio must be one channel, (samples,), not {waveform.shape}")
    if fps not in FRAME_RATES:
        raise ValueError(f"fps must be one of {FRAME_RATES}, not {fps}")
    if count_frames(len(waveform), fps) == 0:
        raise ValueError("audio is shorter than one frame")
    return waveform


def _checked_box(box: Sequence[float], size: FrameSize) -> Box:
    """The box as a tuple, if it lies in the picture."""
    x, y, width, height = box
    in_picture = x < size.width and y < size.height and x + width > 0 and y + height > 0
    if width < 1 or height < 1 or not in_picture:
        raise ValueError("face_box must be (x, y, width, height) of a face in the image")
    return (x, y, width, height)


def _branches(conditioning: Conditioning, *, is_guided: bool) -> list[Branch]:
    """The sides of the guidance, the unconditional one first; without guidance the other alone."""
    speech = sampling.ring_audio(conditioning.audio_embeds, conditioning.plan)
    speaking = Branch(speech, first_prompt=POSITIVE)
    silent = Branch(torch.zeros_like(speech), first_prompt=NEGATIVE)
    return [silent, speaking] if is_guided else [speaking]


def _given_or_drawn(
    given: Tensor | None, name: str, shape: Sequence[int], generator: torch.Generator, like: Tensor
) -> Tensor:
    """The noise that was given, if it has the right shape, or else drawn; float32."""
    if given is None:
        return sampling.draw_noise(shape, generator, like.device)
    if tuple(given.shape) != tuple(shape):
        raise ValueError(f"{name} must be of shape {tuple(shape)}, not {tuple(given.shape)}")
    return given.to(like.device, torch.float32)


def _as_output(frames: Tensor, output_type: str) -> Any:
    """Frames (F, 3, H, W) as diffusers lays them out, a batch of one."""
    if output_type == "pt":
        return frames[None]
    pixels = frames.permute(0, 2, 3, 1)  # (F, H, W, 3)
    if output_type == "np":
        return pixels[None].numpy()
    return [[Image.fromarray(frame) for frame in (pixels * 255).byte().numpy()]]
