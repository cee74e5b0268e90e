"""HunyuanVideo-Avatar from end to end: one portrait and one speech recording in, frames out.

Owns the order of things and no maths: encode, denoise, decode. `__call__` is these three in a row;
a job calls them one by one, to time them and to write frames while later ones are decoded.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
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

from avatar_client.contract.request import Bystanders
from worker.generation.audio import encode_audio
from worker.generation.cfg import cfg_branches
from worker.generation.conditioning import (
    Conditioning,
    PromptCache,
    frame_size,
)
from worker.generation.denoiser import Denoiser, can_begin_at, denoising_steps
from worker.generation.denoising_state import DenoisingState
from worker.generation.face import TorchScriptFaceDetector, faces_of_others, find_faces, largest
from worker.generation.image import (
    face_mask,
    face_masks,
    resize,
    scale_box,
    to_llava_pixels,
    to_pixels,
)
from worker.generation.options import DenoiseOptions
from worker.generation.pipeline_output import (
    HunyuanVideoAvatarPipelineOutput,
    OutputType,
    as_output,
    require_output_type,
)
from worker.generation.sampling import prepare_latents, unrepeatable_generator
from worker.generation.text import (
    NEGATIVE_PROMPT,
    PROMPT_PREFIX,
    PromptTokens,
    encode_clip,
    encode_llava,
    tokenize,
)
from worker.generation.voices import Voice, require_voices
from worker.generation.watch import OnStep, Watch
from worker.loading.offload import OffloadedModel
from worker.model import autoencoder
from worker.model import encoders as encoders  # diffusers loads from modules that are there already
from worker.model.sparse_attention import SparseAttention
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel
from worker.multi_gpu.parallel import BranchParallel, NoParallel
from worker.shapes import Box, ComputedSteps, FrameSize, fit_size

NO_FACE = "no face was found: the whole picture moves; give face_box"


class HunyuanVideoAvatarPipeline(DiffusionPipeline):
    """Talking-avatar video from a portrait, speech and a prompt.

    The default arguments and the bfloat16 latent state are the reference's; `docs/reference.md`
    names each deviation. Each component runs in its own dtype. Without `face_detector` dlib
    finds the face.
    """

    # By component: on the GPU only while they are in use.
    offloaded: Mapping[str, OffloadedModel] = MappingProxyType({})
    denoiser_class = Denoiser
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
        self.prompt_cache = PromptCache()
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
        computed_steps: ComputedSteps = None,
        float8: bool = False,
        output_type: OutputType = "pt",
        on_step: OnStep | None = None,
    ) -> HunyuanVideoAvatarPipelineOutput:
        """A video of the pictured person speaking the recording: encode, denoise, decode in a row.

        The arguments are those of the three methods, those of `DenoiseOptions`, and
            audio: the speech of the one voice, (samples,) float32 in [-1, 1], mono, 16 kHz.
            face_box: (x, y, width, height) of its face in pixels of `image`; None detects it.
            output_type: "pt" a tensor (1, F, 3, H, W) and "np" an array (1, F, H, W, 3), float32
                in [0, 1]; "pil" a list of one list of pictures; "latent" (1, C, kept latents, h, w)
                before decoding, still scaled. Frames are on the CPU.

        Raises:
            ValueError: an argument that the model cannot serve, by name.
        """
        require_output_type(output_type)
        conditioning = self.encode(
            image=image,
            voices=[Voice(_as_array(audio), None if face_box is None else _as_box(face_box))],
            prompt=prompt,
            negative_prompt=negative_prompt,
            resolution=resolution,
            height=height,
            width=width,
            fps=fps,
            motion_pose=motion_pose,
            motion_expression=motion_expression,
        )
        result = self.denoise(
            conditioning,
            DenoiseOptions(
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                flow_shift=flow_shift,
                computed_steps=computed_steps,
                float8=float8,
                latents_dtype=latents_dtype,
            ),
            generator=generator,
            latents=latents,
            reference_noise=reference_noise,
            watch=Watch(on_step=on_step),
        )
        frames: Any = result
        if output_type != "latent":
            chunks = [chunk.cpu() for chunk in self.decode_frames(result, conditioning.num_frames)]
            frames = as_output(torch.cat(chunks), output_type)
        return HunyuanVideoAvatarPipelineOutput(
            frames=frames,
            fps=conditioning.fps,
            face_box=next(iter(conditioning.face_boxes), None),
            warnings=conditioning.warnings,
        )

    @torch.no_grad()
    def encode(
        self,
        image: Image.Image,
        voices: Sequence[Voice],
        prompt: str,
        negative_prompt: str | None = None,
        resolution: int = 704,
        height: int | None = None,
        width: int | None = None,
        fps: float = 25,
        motion_pose: float = 25,
        motion_expression: float = 30,
        bystanders: Bystanders = "free",
    ) -> Conditioning:
        """Everything that the sampling loop needs, from the portrait, the speech and the prompt.

        Args:
            image: the portrait, upright; it is squeezed to the frame size.
            voices: who speaks; their recordings set the length.
            prompt: the user's words; the reference's prefix is put before them.
            negative_prompt: what to avoid; None is the reference's.
            resolution: the short side, roughly; the size follows from it and the picture's shape.
            height, width: an exact size instead, both or neither, multiples of 16.
            fps: frames a second of the video, 25 or 12.5.
            motion_pose, motion_expression: how much the head and the face move.
            bystanders: what the faces of nobody hear: "free" leaves it to their place, as the
                reference does; "still" has them hear silence, by a mask of their own.

        Raises:
            ValueError: an argument that the model cannot serve, by name.
        """
        size = frame_size(image, resolution, height, width)
        given_size = FrameSize(image.height, image.width)
        num_frames = require_voices(voices, given_size, fps)
        portrait = resize(image, size)

        mask, face_boxes = self._face_masks(voices, portrait, given_size, bystanders)
        waveforms = [voice.waveform for voice in voices]
        if mask.shape[1] > len(voices):
            waveforms.append(np.zeros_like(waveforms[0]))
        with self.in_use("audio_encoder"):
            audio_embeds = encode_audio(waveforms, fps, self.feature_extractor, self.audio_encoder)
        negative_prompt = NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
        prompts, warnings = self._encode_prompts(negative_prompt, PROMPT_PREFIX + prompt, portrait)

        if not face_boxes:
            warnings.append(NO_FACE)

        with self.in_use("vae"):
            pixels = to_pixels(portrait).to(self.vae.device, self.vae.dtype)
            reference = self.vae.encode(pixels).latent_dist

        return Conditioning(
            **prompts,
            audio_embeds=audio_embeds,
            face_mask=mask.to(reference.mean.device),
            reference_mean=reference.mean.float(),
            reference_std=reference.std.float(),
            motion_pose=motion_pose,
            motion_expression=motion_expression,
            height=size.height,
            width=size.width,
            num_frames=num_frames,
            fps=fps,
            face_boxes=face_boxes,
            warnings=tuple(warnings),
        )

    def _face_masks(
        self,
        voices: Sequence[Voice],
        portrait: Image.Image,
        given_size: FrameSize,
        bystanders: Bystanders,
    ) -> tuple[Tensor, tuple[Box, ...]]:
        """Of each voice its mask (1, V, 1, h, w), and its face's box where it was given.

        The last mask is that of the bystanders, if they are to be still and there are any.
        """
        size = FrameSize(portrait.height, portrait.width)
        given = tuple(voice.face_box for voice in voices if voice.face_box is not None)
        boxes = [scale_box(box, given_size, size) for box in given]
        faces: list[Box] = []
        if not boxes or bystanders == "still":
            faces = find_faces(portrait, self.face_detector)
        if not boxes:
            found = largest(faces)
            if found is None:
                return face_mask(None, size), ()
            boxes, given = [found], (scale_box(found, size, given_size),)
        others = faces_of_others(faces, boxes) if bystanders == "still" else []
        masks = face_masks([*boxes, *others], size)
        if others:
            own, still = masks.split([len(boxes), len(others)], dim=1)
            masks = torch.cat([own, still.sum(dim=1, keepdim=True)], dim=1)
        return masks, given

    @torch.no_grad()
    def foresee(
        self,
        image: Image.Image,
        prompt: str,
        negative_prompt: str | None = None,
        face_box: Box | None = None,
        resolution: int = 704,
        height: int | None = None,
        width: int | None = None,
    ) -> tuple[str, ...]:
        """The warnings that `encode` would give, without what costs time."""
        negative_prompt = NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
        prompts = [negative_prompt, PROMPT_PREFIX + prompt]
        warnings = _cut_warnings([tokenize(text, self.tokenizer) for text in prompts])
        if face_box is None:
            size = frame_size(image, resolution, height, width)
            if not find_faces(resize(image, size), self.face_detector):
                warnings.append(NO_FACE)
        return tuple(warnings)

    @torch.no_grad()
    def find_face(self, image: Image.Image, resolution: int = 704) -> Box | None:
        """The box of the largest face in pixels of `image`, as `encode` would find it there."""
        return largest(self.find_faces(image, resolution))

    @torch.no_grad()
    def find_faces(self, image: Image.Image, resolution: int = 704) -> list[Box]:
        """The boxes of all faces in pixels of `image`, from left to right."""
        size = fit_size(image.height, image.width, resolution)
        boxes = find_faces(resize(image, size), self.face_detector)
        return [scale_box(box, size, FrameSize(image.height, image.width)) for box in boxes]

    def _encode_prompts(
        self, negative_prompt: str, prompt: str, portrait: Image.Image
    ) -> tuple[Mapping[str, Tensor], list[str]]:
        """The fields of `Conditioning` that come from the prompts, and what to tell the user."""
        prompts = [negative_prompt, prompt]
        tokens = [tokenize(text, self.tokenizer) for text in prompts]

        def encode() -> dict[str, Tensor]:
            with self.in_use("text_encoder"):
                embeds, mask = encode_llava(tokens, to_llava_pixels(portrait), self.text_encoder)
            with self.in_use("text_encoder_2"):
                pooled = encode_clip(prompts, self.tokenizer_2, self.text_encoder_2)
            return {"prompt_embeds": embeds, "prompt_mask": mask, "pooled_prompt_embeds": pooled}

        return self.prompt_cache.get(prompts, portrait, encode), _cut_warnings(tokens)

    @torch.no_grad()
    def denoise(
        self,
        conditioning: Conditioning,
        options: DenoiseOptions = DenoiseOptions(),  # noqa: B008 (frozen)
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        reference_noise: Tensor | None = None,
        parallel: BranchParallel | None = None,
        state: DenoisingState | None = None,
        watch: Watch = Watch(),  # noqa: B008 (frozen)
    ) -> Tensor:
        """Latents of the video (1, C, kept latents, h, w), still scaled, from noise or a state.

        Args:
            conditioning: what `encode` returned.
            options: how they are computed.
            generator, latents, reference_noise: as `prepare_latents` takes them.
            parallel: the other ranks that run this loop too; rank 0's noise counts.
            state: what `watch.on_state` was given after `options.first_step` steps; needed on rank
                0 alone, whose latents count.
            watch: what looks on.

        Raises:
            ValueError: noise or a state of another shape; unusable steps.
        """
        parallel = parallel or NoParallel()
        scaling_factor = self.vae.config.scaling_factor
        generator = generator or unrepeatable_generator()
        noise = prepare_latents(conditioning, scaling_factor, generator, latents, reference_noise)
        if state is not None:
            noise = state.restored(like=noise, generator=generator)
        latents, reference_latents = map(parallel.broadcast, noise)
        steps = denoising_steps(options, self.scheduler, latents.device)
        sparsity = watch.sparsity
        if sparsity is None and options.attention_tolerance is not None:
            seed = generator.initial_seed()
            sparsity = SparseAttention(options.attention_tolerance, seed, latents.device)
        denoiser = self.denoiser_class(
            transformer=self.transformer,
            conditioning=conditioning,
            reference_latents=reference_latents,
            branches=parallel.local_branches(cfg_branches(conditioning, uses_cfg=options.uses_cfg)),
            options=options,
            parallel=parallel,
            sparsity=sparsity,
            preview=watch.preview,
        )
        with self.in_use("transformer"), self.progress_bar(total=len(steps)) as progress:
            progress.update(options.first_step)
            for step in steps[options.first_step :]:
                parallel.begin_step()
                latents = denoiser.step(latents, step)
                if sparsity is not None and step is steps[-1]:  # later the ranks are on their own
                    sparsity.share_report(parallel.gather_numbers)
                progress.update()
                parallel.end_step()
                if watch.on_state is not None and can_begin_at(steps, step.index + 1):
                    watch.on_state(
                        DenoisingState.of(step.index + 1, latents, reference_latents, generator)
                    )
                if watch.on_step is not None:
                    watch.on_step(step.index + 1, len(steps))
        return latents[:, :, : conditioning.plan.kept_latents]

    @torch.no_grad()
    def decode_frames(
        self,
        latents: Tensor,
        num_frames: int | None = None,
        scratch_bytes: int = autoencoder.SCRATCH_BYTES,
        tile_map: autoencoder.TileMap = map,
    ) -> Generator[Tensor]:
        """Frames (F, 3, H, W) float32 in [0, 1], chunk by chunk in order, on the VAE's device.

        Each chunk leaves as soon as its tiles are decoded, and what lies beyond `num_frames` is not
        decoded; the chunks together are the reference's tiled decode.

        Args:
            latents: (1, C, latent frames, h, w), what `denoise` returned.
            num_frames: how many frames to give; None is all.
            scratch_bytes, tile_map: as `worker.model.autoencoder.decode_frames` takes them.
        """
        with self.in_use("vae"):
            yield from autoencoder.decode_frames(
                self.vae, self._unscaled(latents), scratch_bytes, num_frames, tile_map
            )

    @torch.no_grad()
    def decode_tiles(
        self,
        latents: Tensor,
        num_frames: int | None,
        scratch_bytes: int,
        tile_map: autoencoder.TileMap,
    ) -> None:
        """What another process than the one that calls `decode_frames` does of the decoding."""
        with self.in_use("vae"):
            autoencoder.decode_tiles(
                self.vae, self._unscaled(latents), scratch_bytes, num_frames, tile_map
            )

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor

    @contextmanager
    def in_use(self, name: str) -> Iterator[None]:
        """Inside, the network is where it runs."""
        offloaded = self.offloaded.get(name)
        with offloaded.in_use() if offloaded else nullcontext():
            yield


def _as_array(audio: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(audio, Tensor):
        audio = audio.cpu().numpy()
    return np.asarray(audio, dtype=np.float32)


def _as_box(box: Sequence[float]) -> Box:
    x, y, width, height = box
    return (x, y, width, height)


def _cut_warnings(tokens: Sequence[PromptTokens]) -> list[str]:
    """What to tell of a negative prompt and a prompt that the model does not read whole."""
    return [
        f"the {name} is longer than the model reads: its end was cut off"
        for name, each in zip(("negative prompt", "prompt"), tokens, strict=True)
        if each.was_cut
    ]
