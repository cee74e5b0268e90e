"""What the denoiser is trained on: people who speak, as latents with all that goes with them.

A scene is written by chance (who, what is heard, how they move) and then drawn and encoded. A
window is a stretch of a scene's latents, as one pass of the denoiser has it. Shape letters: C
latent channels, T latent frames of a scene, h and w latents, L text positions.
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
from training.convolution import to_trained
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
CHANCE_PROMPT_SHARE = 0.5  # of prompts of chance words: what they say moves nothing

PICTURES = ("latents", "reference_mean", "reference_std", "face_mask", "weight", "beside")
LEAD_LATENTS = 3  # before a window that does not begin where its scene does
CUT_SHARE = 0.15  # of scenes whose speech ends and leaves zeros
ELSEWHERE_SHARE = 0.08  # of scenes whose face mask lies beside the mouth: it stays closed
WHOLE_MASK_SHARE = 0.3
MOUTH_WEIGHT = 5.0


def num_frames(num_latents: int) -> int:
    """Frames that so many latents of a video from its beginning stand for."""
    return TEMPORAL_COMPRESSION * (num_latents - 1) + 1


@dataclass(frozen=True)
class Script:
    """A scene before it is drawn."""

    size: FrameSize
    face: world.Face
    motion: world.Motion
    mel: np.ndarray  # (1, 80, 3000) float16
    heard_frames: int  # zeros are heard after these
    face_mask: np.ndarray  # (1, 1, h, w)
    prompt_embeds: np.ndarray  # (2, L, D) float16, the negative one first; L valid positions
    pooled_prompt_embeds: np.ndarray  # (2, D)
    pose: float
    expression: float


class Writer:
    """Writes scripts; each is the same for the same seed and number."""

    def __init__(self, work: Path) -> None:
        self._corpus = SpeechCorpus("train", work)
        self._feature_extractor = WhisperFeatureExtractor(feature_size=80)
        self._tokenizer = architecture.prompt_tokenizer()
        self._text_encoder, self._pooled_text_encoder = architecture.text_encoders()
        self._pooled_tokenizer = architecture.pooled_tokenizer()

    def write(self, size: FrameSize, num_latents: int, chance: Sequence[int]) -> Script:
        """The script of so many latent frames."""
        rng = np.random.default_rng(chance)
        frames = num_frames(num_latents)
        waveform = self._corpus.clip(rng, frames)
        mouth = mouth_track(waveform)
        heard_frames = frames
        if rng.random() < CUT_SHARE:
            heard_frames = int(rng.integers(frames))
            mouth = _closed(mouth, heard_frames)

        face = world.draw_person(rng)
        mask = face_mask(_jittered(rng, face.box(*size)), size)
        if rng.random() < WHOLE_MASK_SHARE:
            mask = torch.ones_like(mask)
        elif rng.random() < ELSEWHERE_SHARE:
            mask = _mask_elsewhere(rng, face, size)
            mouth = _closed(mouth, 0)

        pose = float(rng.uniform(0, 100)) if rng.random() < 0.7 else 25.0
        expression = float(rng.uniform(0, 100)) if rng.random() < 0.7 else 30.0
        return Script(
            size=size,
            face=face,
            motion=world.move(rng, mouth, pose, expression),
            mel=log_mel(waveform, self._feature_extractor).half().numpy(),
            heard_frames=heard_frames,
            face_mask=mask[0].numpy(),
            **self._encode_prompts(rng, world.portrait(face, *size)),
            pose=pose,
            expression=expression,
        )

    @torch.no_grad()
    def _encode_prompts(self, rng: np.random.Generator, portrait: Tensor) -> dict[str, np.ndarray]:
        picture = Image.fromarray((portrait.permute(1, 2, 0) * 255).byte().numpy())
        prompt = PROMPTS[rng.integers(len(PROMPTS))]
        if rng.random() < CHANCE_PROMPT_SHARE:
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


def _mask_elsewhere(rng: np.random.Generator, face: world.Face, size: FrameSize) -> Tensor:
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
class Part:
    """A part of the face to look at from near, in latents."""

    height: int
    width: int
    is_top: bool  # begins where the eyes do; else its middle is that of eyes and mouth
    jitter: float  # to each side


WHOLE_FACE = Part(16, 16, is_top=False, jitter=2)
EYES = Part(4, 14, is_top=True, jitter=1)


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
    weight: Tensor  # (h, w), what each latent counts
    beside: Tensor  # (h, w), 1 where the speech is not seen: beside the mouth and the eyes

    def window(self, start: int, length: int) -> Self:
        """The latents from `start` on, with the audio as the worker's windows have it."""
        first = TEMPORAL_COMPRESSION * start
        return self._with(
            self.latents[:, start : start + length],
            self.audio_embeds[first : first + num_frames(length)],
        )

    def around(self, start: int, before: int, after: int) -> Self:
        """The end of a video and its beginning, as a window over both ends of the ring has them."""
        end, begin = self.window(start, before), self.window(0, after)
        silence = torch.zeros_like(self.audio_embeds[: TEMPORAL_COMPRESSION - 1])
        return self._with(
            torch.cat([end.latents, begin.latents], dim=1),
            torch.cat([end.audio_embeds, silence, begin.audio_embeds]),
        )

    def near_face(self, part: Part, rng: np.random.Generator) -> Self:
        """The latents around that part of the face, as if the picture were no larger."""
        counts = (self.weight - 1).clamp(min=0)  # of eyes and mouth
        down, across = (counts.sum(dim).cpu().numpy() for dim in (1, 0))
        top = int(np.flatnonzero(down)[0])
        middle = (top + part.height / 2 if part.is_top else _middle(down), _middle(across))
        fields = dict(vars(self))
        for axis, centre, length in ((-2, middle[0], part.height), (-1, middle[1], part.width)):
            begin = round(centre - length / 2 + rng.uniform(-part.jitter, part.jitter))
            begin = min(max(begin, 0), self.weight.shape[axis] - length)
            for name in PICTURES:
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


class Studio:
    """Draws scripts and encodes them, on one device."""

    def __init__(
        self, vae: AutoencoderKLHunyuanVideo, audio_encoder: WhisperModel, device: torch.device
    ) -> None:
        to_trained(vae)  # quicker, and the same numbers
        self._vae = vae.to(device)
        self._audio_encoder = audio_encoder.to(device)
        self._device = device

    @classmethod
    def load(cls, work: Path, device: torch.device) -> Self:
        """One with the autoencoder and the speech encoder that the training left in `work`."""
        vae = AutoencoderKLHunyuanVideo.from_pretrained(work / "vae").eval()
        return cls(vae, WhisperModel.from_pretrained(work / "audio_encoder").eval(), device)

    @torch.no_grad()
    def shoot(self, script: Script) -> Scene:
        """The scene of a script."""
        size, device = script.size, self._device
        clip = world.render(script.face, script.motion, *size, device)
        portrait = world.portrait(script.face, *size, device)
        with torch.autocast(device.type, torch.bfloat16):
            latents = self._vae.encode(clip.transpose(0, 1)[None] * 2 - 1).latent_dist.mean
        # as the worker sees it, in whole bytes
        portrait = (portrait * 255).floor() / 127.5 - 1
        reference = self._vae.encode(portrait[None, :, None]).latent_dist
        scale = self._vae.config.scaling_factor
        mel = torch.from_numpy(script.mel).float().to(device)
        states = encode_speech(mel, self._audio_encoder)
        audio = audio_windows(states, len(clip), world.FPS)[0]
        audio[script.heard_frames :] = 0
        weight = face_weight(script.face, *size)[None, None]
        weight = torch.nn.functional.avg_pool2d(weight, 8)[0, 0]
        weight = (weight - 1) / (weight.max() - 1)
        return Scene(
            latents=latents[0].float() * scale,
            audio_embeds=audio,
            reference_mean=reference.mean[0].float() * scale,
            reference_std=reference.std[0].float() * scale,
            face_mask=torch.from_numpy(script.face_mask).to(device),
            prompt_embeds=torch.from_numpy(script.prompt_embeds).to(device),
            pooled_prompt_embeds=torch.from_numpy(script.pooled_prompt_embeds).to(device),
            pose=torch.tensor(script.pose, device=device),
            expression=torch.tensor(script.expression, device=device),
            weight=(1 + weight * MOUTH_WEIGHT).to(device),
            beside=(weight == 0).float().to(device),
        )


def _middle(counts: np.ndarray) -> float:
    return float(np.average(np.arange(len(counts)) + 0.5, weights=counts))


@functools.cache
def _crew(work: Path, device: torch.device) -> tuple[Writer, Studio]:
    return Writer(work), Studio.load(work, device)


def make_scene(
    work: Path,
    device: torch.device,
    seed: int,
    sizes: Sequence[FrameSize],
    num_latents: int,
    number: int,
) -> dict[str, np.ndarray]:
    """The fields of a scene, as any process makes it; the sizes take turns."""
    writer, studio = _crew(work, device)
    script = writer.write(sizes[number % len(sizes)], num_latents, (seed, number))
    return {name: value.cpu().numpy() for name, value in vars(studio.shoot(script)).items()}


class Pool:
    """Scenes of several sizes, of which batches of windows are drawn; new ones come in slowly."""

    def __init__(
        self,
        scenes: Iterator[dict[str, np.ndarray]],
        num_sizes: int,
        limit: int,
        rng: np.random.Generator,
        device: torch.device,
    ) -> None:
        self._next = scenes
        self._scenes: list[list[Scene]] = [[] for _ in range(num_sizes)]
        self._limit = limit
        self._rng = rng
        self._device = device
        self._turn = 0

    def grow(self, count: int = 1) -> None:
        """Takes in so many new scenes, for the oldest ones when the pool is full."""
        for _ in range(count):
            fields = {
                name: torch.from_numpy(value).to(self._device)
                for name, value in next(self._next).items()
            }
            scenes = self._scenes[self._turn % len(self._scenes)]
            scenes.append(Scene(**fields))
            del scenes[: -self._limit]
            self._turn += 1

    def draw(
        self, count: int, length: int, ring_share: float = 0.0, part: Part | None = None
    ) -> Scene:
        """Windows of one size, stacked; a share of them lies over both ends of the ring.

        Args:
            part: of the face; None: whole pictures.
        """
        scenes = self._scenes[self._rng.integers(len(self._scenes))]
        windows = [self._window(scenes, length, ring_share) for _ in range(count)]
        if part is not None:
            windows = [window.near_face(part, self._rng) for window in windows]
        return Scene.stack(windows)

    def _window(self, scenes: list[Scene], length: int, ring_share: float) -> Scene:
        rng = self._rng
        scene = scenes[rng.integers(len(scenes))]
        last = scene.latents.shape[1] - length
        start = 0 if rng.random() < 0.4 else int(rng.integers(LEAD_LATENTS, last + 1))
        if rng.random() < ring_share:
            before = int(rng.integers(1, length))
            return scene.around(start + length - before, before, length - before)
        return scene.window(start, length)
