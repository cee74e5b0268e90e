"""What the denoiser is trained on: people who speak, as latents with all that goes with them.

A scene is sampled (who, what they say, how they move) and then rendered and encoded. A window is a
stretch of a scene's latents, as one pass of the denoiser has it. Shape letters: C latent channels,
T latent frames of a scene, h and w latents, L text positions.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo
from PIL import Image
from torch import Tensor
from transformers import WhisperFeatureExtractor, WhisperModel

from training import architecture, world
from training.autoencoder import face_weight
from training.convolution import use_fast_convolutions
from training.loop import mixed_precision
from training.speech import WORDS, MouthTrack, SpeechCorpus, mouth_track, sentence
from worker.generation.audio import audio_windows, encode_speech, log_mel
from worker.generation.image import face_mask, to_llava_pixels
from worker.generation.text import (
    NEGATIVE_PROMPT,
    PROMPT_PREFIX,
    encode_clip,
    encode_llava,
    tokenize,
)
from worker.shapes import TEMPORAL_COMPRESSION, FrameSize

PROMPTS = (
    "A person speaks to the camera.",
    "A woman speaks to the camera.",
    "A man talks, calm and friendly.",
    "Someone tells a story in front of a plain wall.",
    "A speaker in a studio.",
    "",
)
RANDOM_PROMPT_SHARE = 0.5  # of random words: what a prompt says moves nothing

SPATIAL_FIELDS = ("latents", "reference_mean", "reference_std", "face_mask", "weight", "outside")
LEAD_LATENTS = 3  # before a window that does not begin at its scene's start
AUDIO_CUT_SHARE = 0.15  # of scenes whose audio is zero from some frame on
MISPLACED_MASK_SHARE = 0.08  # of scenes whose face mask misses the mouth: it stays closed
FULL_MASK_SHARE = 0.3  # of scenes whose face mask is the whole picture
MOUTH_WEIGHT = 5.0


def num_frames(num_latents: int) -> int:
    """Frames that so many latents of a video from its beginning stand for."""
    return TEMPORAL_COMPRESSION * (num_latents - 1) + 1


@dataclass(frozen=True)
class SceneSpec:
    """A scene before it is rendered."""

    size: FrameSize
    face: world.Face
    motion: world.Motion
    mel: np.ndarray  # (1, 80, 3000) float16
    num_audio_frames: int  # the audio is zero after these
    face_mask: np.ndarray  # (1, 1, h, w)
    prompt_embeds: np.ndarray  # (2, L, D) float16, the negative one first; L valid positions
    pooled_prompt_embeds: np.ndarray  # (2, D)
    pose: float
    expression: float


class SceneSampler:
    """Samples the specs of scenes; each is the same for the same seed and number."""

    def __init__(self, work: Path) -> None:
        self._corpus = SpeechCorpus("train", work)
        self._feature_extractor = WhisperFeatureExtractor(feature_size=80)
        self._tokenizer = architecture.prompt_tokenizer()
        self._text_encoder, self._pooled_text_encoder = architecture.text_encoders()
        self._pooled_tokenizer = architecture.pooled_tokenizer()

    def sample(self, size: FrameSize, num_latents: int, seed: Sequence[int]) -> SceneSpec:
        """The spec of a scene of so many latent frames."""
        rng = np.random.default_rng(seed)
        frames = num_frames(num_latents)
        waveform = self._corpus.clip(rng, frames)
        mouth = mouth_track(waveform)
        num_audio_frames = frames
        if rng.random() < AUDIO_CUT_SHARE:
            num_audio_frames = int(rng.integers(frames))
            mouth = _closed(mouth, num_audio_frames)

        face = world.random_face(rng)
        mask = face_mask(_jittered(rng, face.box(*size)), size)
        if rng.random() < FULL_MASK_SHARE:
            mask = torch.ones_like(mask)
        elif rng.random() < MISPLACED_MASK_SHARE:
            mask = _misplaced_mask(rng, face, size)
            mouth = _closed(mouth, 0)

        pose = float(rng.uniform(0, 100)) if rng.random() < 0.7 else 25.0
        expression = float(rng.uniform(0, 100)) if rng.random() < 0.7 else 30.0
        return SceneSpec(
            size=size,
            face=face,
            motion=world.speaking_motion(rng, mouth, pose, expression),
            mel=log_mel(waveform, self._feature_extractor).half().numpy(),
            num_audio_frames=num_audio_frames,
            face_mask=mask[0].numpy(),
            **self._encode_prompts(rng, world.portrait(face, *size)),
            pose=pose,
            expression=expression,
        )

    @torch.no_grad()
    def _encode_prompts(self, rng: np.random.Generator, portrait: Tensor) -> dict[str, np.ndarray]:
        picture = Image.fromarray((portrait.permute(1, 2, 0) * 255).byte().numpy())
        prompt = PROMPTS[rng.integers(len(PROMPTS))]
        if rng.random() < RANDOM_PROMPT_SHARE:
            languages = list(WORDS["train"])
            prompt = sentence(rng, WORDS["train"][languages[rng.integers(len(languages))]])
        texts = [NEGATIVE_PROMPT, PROMPT_PREFIX + prompt]
        tokens = [tokenize(text, self._tokenizer) for text in texts]
        embeds, mask = encode_llava(tokens, to_llava_pixels(picture), self._text_encoder)
        pooled = encode_clip(texts, self._pooled_tokenizer, self._pooled_text_encoder)
        longest = int(mask.sum(dim=1).min())  # the shorter one's, so that the two have one length
        return {
            "prompt_embeds": embeds[:, :longest].half().numpy(),
            "pooled_prompt_embeds": pooled.numpy(),
        }


def _closed(mouth: MouthTrack, start: int) -> MouthTrack:
    """The same with a mouth that stays closed from a frame on."""
    opening, width = mouth.opening.copy(), mouth.width.copy()
    opening[start:] = 0
    width[start:] = 0
    return MouthTrack(opening, width)


def _jittered(
    rng: np.random.Generator, box: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """The box as another detector might have found it."""
    x, y, width, height = box
    wider = width * rng.uniform(-0.15, 0.25)
    x, y = x - wider / 2 + width * rng.uniform(-0.1, 0.1), y + height * rng.uniform(-0.15, 0.1)
    return (x, y, width + wider, height + wider)


def _misplaced_mask(rng: np.random.Generator, face: world.Face, size: FrameSize) -> Tensor:
    """A mask of one edge of the picture, away from the mouth."""
    mask = torch.zeros(1, 1, 1, *size.latent)
    x, y, width, height = face.box(*size)
    top, bottom = int(y / 8), int((y + height) / 8) + 1
    left, right = int(x / 8), int((x + width) / 8) + 1
    edges = [mask[..., : max(top, 1), :], mask[..., bottom:, :]]
    edges += [mask[..., : max(left, 1)], mask[..., right:]]
    edges[rng.integers(4)].fill_(1)
    return mask


@dataclass(frozen=True)
class FaceCrop:
    """The size and place of a crop around the face, in latents."""

    height: int
    width: int
    is_top: bool  # begins at the eyes' upper edge; else it is centred on eyes and mouth
    jitter: float  # at most, to each side


FACE_CROP = FaceCrop(16, 16, is_top=False, jitter=2)
EYES_CROP = FaceCrop(4, 14, is_top=True, jitter=1)


@dataclass(frozen=True)
class Scene:
    """A scene, or a window of one, as the denoiser is given it; or several, stacked."""

    latents: Tensor  # (C, T, h, w), scaled
    audio_embeds: Tensor  # (4T - 3, 10, 5, 64)
    reference_mean: Tensor  # (C, 1, h, w), scaled
    reference_std: Tensor
    face_mask: Tensor  # (1, 1, h, w)
    prompt_embeds: Tensor  # (2, L, D)
    pooled_prompt_embeds: Tensor  # (2, D)
    pose: Tensor  # ()
    expression: Tensor
    weight: Tensor  # (h, w), of each latent in the loss
    outside: Tensor  # (h, w), 1 outside of the mouth and the eyes, where no speech is seen

    def window(self, start: int, length: int) -> Self:
        """The latents from `start` on, with the audio as the worker's windows have it."""
        first = TEMPORAL_COMPRESSION * start
        return self._with(
            self.latents[:, start : start + length],
            self.audio_embeds[first : first + num_frames(length)],
        )

    def circular_window(self, start: int, before: int, after: int) -> Self:
        """A video's end and its beginning, as a window that wraps around has them."""
        end, begin = self.window(start, before), self.window(0, after)
        silence = torch.zeros_like(self.audio_embeds[: TEMPORAL_COMPRESSION - 1])
        return self._with(
            torch.cat([end.latents, begin.latents], dim=1),
            torch.cat([end.audio_embeds, silence, begin.audio_embeds]),
        )

    def crop_face(self, crop: FaceCrop, rng: np.random.Generator) -> Self:
        """The latents around the face, as if the picture were no larger."""
        weights = (self.weight - 1).clamp(min=0)  # of eyes and mouth
        rows, columns = (weights.sum(dim).cpu().numpy() for dim in (1, 0))
        top = int(np.flatnonzero(rows)[0])
        row = top + crop.height / 2 if crop.is_top else _centroid(rows)
        fields = dict(vars(self))
        for axis, centre, length in (
            (-2, row, crop.height),
            (-1, _centroid(columns), crop.width),
        ):
            begin = round(centre - length / 2 + rng.uniform(-crop.jitter, crop.jitter))
            begin = min(max(begin, 0), self.weight.shape[axis] - length)
            for name in SPATIAL_FIELDS:
                fields[name] = fields[name].narrow(axis, begin, length)
        return type(self)(**fields)

    def _with(self, latents: Tensor, audio_embeds: Tensor) -> Self:
        return type(self)(**{**vars(self), "latents": latents, "audio_embeds": audio_embeds})

    @classmethod
    def stack(cls, scenes: Sequence["Scene"]) -> "Scene":
        """One more dimension in front; the texts are cut to the length of the shortest."""
        length = min(scene.prompt_embeds.shape[1] for scene in scenes)
        fields = {}
        for name in vars(scenes[0]):
            values = [getattr(scene, name) for scene in scenes]
            if name == "prompt_embeds":
                values = [value[:, :length] for value in values]
            fields[name] = torch.stack(values)
        return cls(**fields)


class SceneEncoder:
    """Renders scenes and encodes them into latents and audio embeddings, on one device."""

    def __init__(
        self, vae: AutoencoderKLHunyuanVideo, audio_encoder: WhisperModel, device: torch.device
    ) -> None:
        use_fast_convolutions(vae)  # the same numbers, faster
        self._vae = vae.to(device)
        self._audio_encoder = audio_encoder.to(device)
        self._device = device

    @classmethod
    def load(cls, work: Path, device: torch.device) -> Self:
        """Loads the autoencoder and the speech encoder that the training left in `work`."""
        vae = AutoencoderKLHunyuanVideo.from_pretrained(work / "vae").eval()
        return cls(vae, WhisperModel.from_pretrained(work / "audio_encoder").eval(), device)

    @torch.no_grad()
    def encode(self, spec: SceneSpec) -> Scene:
        """The scene of a spec."""
        size, device = spec.size, self._device
        clip = world.render(spec.face, spec.motion, *size, device)
        portrait = world.portrait(spec.face, *size, device)
        with mixed_precision(device):
            latents = self._vae.encode(clip.transpose(0, 1)[None] * 2 - 1).latent_dist.mean
        # as the worker gets it: in 256 levels
        portrait = (portrait * 255).floor() / 127.5 - 1
        reference = self._vae.encode(portrait[None, :, None]).latent_dist
        scale = self._vae.config.scaling_factor
        mel = torch.from_numpy(spec.mel).float().to(device)
        states = encode_speech(mel, self._audio_encoder)
        audio = audio_windows(states, len(clip), world.FPS)[0].clone()
        audio[spec.num_audio_frames :] = 0
        weight = face_weight(spec.face, *size)[None, None]
        weight = torch.nn.functional.avg_pool2d(weight, 8)[0, 0]
        weight = (weight - 1) / (weight.max() - 1)
        return Scene(
            latents=latents[0].float() * scale,
            audio_embeds=audio,
            reference_mean=reference.mean[0].float() * scale,
            reference_std=reference.std[0].float() * scale,
            face_mask=torch.from_numpy(spec.face_mask).to(device),
            prompt_embeds=torch.from_numpy(spec.prompt_embeds).to(device),
            pooled_prompt_embeds=torch.from_numpy(spec.pooled_prompt_embeds).to(device),
            pose=torch.tensor(spec.pose, device=device),
            expression=torch.tensor(spec.expression, device=device),
            weight=(1 + weight * MOUTH_WEIGHT).to(device),
            outside=(weight == 0).float().to(device),
        )


def _centroid(weights: np.ndarray) -> float:
    return float(np.average(np.arange(len(weights)) + 0.5, weights=weights))


@functools.cache
def _sampler_and_encoder(work: Path, device: torch.device) -> tuple[SceneSampler, SceneEncoder]:
    return SceneSampler(work), SceneEncoder.load(work, device)


def make_scene(
    work: Path,
    device: torch.device,
    seed: int,
    sizes: Sequence[FrameSize],
    num_latents: int,
    number: int,
) -> dict[str, np.ndarray]:
    """The fields of a scene, as any process makes it; the sizes take turns."""
    sampler, encoder = _sampler_and_encoder(work, device)
    spec = sampler.sample(sizes[number % len(sizes)], num_latents, (seed, number))
    return {name: value.cpu().numpy() for name, value in vars(encoder.encode(spec)).items()}


class SceneBuffer:
    """A replay buffer: holds scenes of several sizes, and samples batches of windows from them."""

    def __init__(
        self,
        scenes: Iterator[dict[str, np.ndarray]],
        num_sizes: int,
        limit: int,
        rng: np.random.Generator,
        device: torch.device,
    ) -> None:
        self._source = scenes
        self._scenes: list[list[Scene]] = [[] for _ in range(num_sizes)]
        self._limit = limit
        self._rng = rng
        self._device = device
        self._num_added = 0

    def add(self, count: int = 1) -> None:
        """Adds so many new scenes, which replace the oldest ones once the buffer is full."""
        for _ in range(count):
            fields = {
                name: torch.from_numpy(value).to(self._device)
                for name, value in next(self._source).items()
            }
            scenes = self._scenes[self._num_added % len(self._scenes)]
            scenes.append(Scene(**fields))
            del scenes[: -self._limit]
            self._num_added += 1

    def sample(
        self, count: int, length: int, circular_share: float = 0.0, crop: FaceCrop | None = None
    ) -> Scene:
        """Windows of one size, stacked.

        Args:
            count: of the windows.
            length: latent frames of each.
            circular_share: of the windows, which wrap around from a scene's end to its start.
            crop: of the face; None: whole pictures.
        """
        scenes = self._scenes[self._rng.integers(len(self._scenes))]
        windows = [self._window(scenes, length, circular_share) for _ in range(count)]
        if crop is not None:
            windows = [window.crop_face(crop, self._rng) for window in windows]
        return Scene.stack(windows)

    def _window(self, scenes: list[Scene], length: int, circular_share: float) -> Scene:
        rng = self._rng
        scene = scenes[rng.integers(len(scenes))]
        last = scene.latents.shape[1] - length
        start = 0 if rng.random() < 0.4 else int(rng.integers(LEAD_LATENTS, last + 1))
        if rng.random() < circular_share:
            before = int(rng.integers(1, length))
            return scene.circular_window(start + length - before, before, length - before)
        return scene.window(start, length)
