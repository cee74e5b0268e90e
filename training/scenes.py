"""What the denoiser is trained on: people who speak, as latents with all that goes with them.

A scene is sampled (who, what they say, how they move) and drawn, by any process, and then encoded
on the device. A window is a stretch of a scene's latents, as one pass of the denoiser has it. Shape
letters: V people and their voices, C latent channels, F frames and T latent frames of a scene, h
and w latents, L text positions.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo
from PIL import Image
from torch import Tensor
from transformers import WhisperFeatureExtractor, WhisperModel

from training import architecture, world
from training.autoencoder import face_weight
from training.convolution import use_fast_convolutions
from training.groups import Group, conversation, random_group
from training.loop import mixed_precision, sent
from training.speech import WORDS, MouthTrack, SpeechCorpus, mouth_track, sentence
from worker.generation.audio import audio_windows, encode_speech, log_mel
from worker.generation.image import face_mask, face_masks, to_llava_pixels
from worker.generation.text import (
    NEGATIVE_PROMPT,
    PROMPT_PREFIX,
    encode_clip,
    encode_llava,
    tokenize,
)
from worker.shapes import TEMPORAL_COMPRESSION, Box, FrameSize

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
# Of one person alone:
MISPLACED_MASK_SHARE = 0.08  # whose face mask misses the mouth: it stays closed
FULL_MASK_SHARE = 0.3  # whose face mask is the whole picture
# Of the groups whose lips have any colour between the skin's and red, so that none is rare:
ANY_LIPS_SHARE = 0.5
LIP_REDNESS, LIP_SPREAD = (0.1, 0.8), 0.06
MOUTH_WEIGHT = 10.0  # as of the eyes; the rest keeps 31 dB and more with half of it


class Shot(NamedTuple):
    """A picture's size and how many people are in it."""

    size: FrameSize
    people: int


def num_frames(num_latents: int) -> int:
    """Frames that so many latents of a video from its beginning stand for."""
    return TEMPORAL_COMPRESSION * (num_latents - 1) + 1


@dataclass(frozen=True)
class SceneSpec:
    """A scene before it is drawn."""

    size: FrameSize
    group: Group
    portrait: np.ndarray  # (3, H, W) uint8
    motions: tuple[world.Motion, ...]  # of each
    mels: np.ndarray  # (V, 80, 3000) float16
    num_audio_frames: int  # the audio is zero after these
    face_mask: np.ndarray  # (V, 1, h, w)
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

    def sample(self, shot: Shot, num_latents: int, seed: Sequence[int]) -> SceneSpec:
        """The spec of a scene of so many latent frames."""
        rng = np.random.default_rng(seed)
        frames = num_frames(num_latents)
        waveforms = conversation(rng, self._corpus, frames, shot.people)
        mouths = [mouth_track(waveform) for waveform in waveforms]
        num_audio_frames = frames
        if rng.random() < AUDIO_CUT_SHARE:
            num_audio_frames = int(rng.integers(frames))
            mouths = [_closed(mouth, num_audio_frames) for mouth in mouths]

        group = random_group(rng, shot.people, shot.size)
        if rng.random() < ANY_LIPS_SHARE:
            group = replace(group, faces=tuple(_with_any_lips(rng, face) for face in group.faces))
        if shot.people == 1:
            mask, is_heard = _mask_of_one(rng, group.boxes(shot.size)[0], shot.size)
            mouths = mouths if is_heard else [_closed(mouths[0], 0)]
        else:
            mask = _masks_of_several(rng, group.boxes(shot.size), shot.size)
        portrait = (group.portrait(shot.size) * 255).byte().numpy()

        pose = float(rng.uniform(0, 100)) if rng.random() < 0.7 else 25.0
        expression = float(rng.uniform(0, 100)) if rng.random() < 0.7 else 30.0
        return SceneSpec(
            size=shot.size,
            group=group,
            portrait=portrait,
            motions=tuple(world.speaking_motion(rng, each, pose, expression) for each in mouths),
            mels=np.concatenate(
                [log_mel(each, self._feature_extractor).half().numpy() for each in waveforms]
            ),
            num_audio_frames=num_audio_frames,
            face_mask=mask[0].numpy(),
            **self._encode_prompts(rng, portrait),
            pose=pose,
            expression=expression,
        )

    @torch.no_grad()
    def _encode_prompts(
        self, rng: np.random.Generator, portrait: np.ndarray
    ) -> dict[str, np.ndarray]:
        picture = Image.fromarray(portrait.transpose(1, 2, 0))
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


def _jittered(rng: np.random.Generator, box: Box, most: float = 1.0) -> Box:
    """The box as another detector might have found it, off by at most this share of the usual."""
    x, y, width, height = box
    wider = most * width * rng.uniform(-0.15, 0.25)
    x += most * width * rng.uniform(-0.1, 0.1) - wider / 2
    y += most * height * rng.uniform(-0.15, 0.1)
    return (x, y, width + wider, height + wider)


def _mask_of_one(
    rng: np.random.Generator, box: Box, size: FrameSize
) -> tuple[Tensor, bool]:  # (1, 1, 1, h, w)
    """The mask of one person alone, and whether the mouth is in it."""
    if rng.random() < FULL_MASK_SHARE:
        return face_mask(None, size), True
    if rng.random() < MISPLACED_MASK_SHARE:
        return _misplaced_mask(rng, box, size), False
    return face_mask(_jittered(rng, box), size), True


def _masks_of_several(
    rng: np.random.Generator, boxes: Sequence[Box], size: FrameSize
) -> Tensor:  # (1, V, 1, h, w)
    """The mask of each, also of those who are silent: a speaker's would reach over their mouths."""
    # by less than for one alone, so that the boxes do not overlap
    return face_masks([_jittered(rng, box, 0.4) for box in boxes], size)


def _with_any_lips(rng: np.random.Generator, face: world.Face) -> world.Face:
    redness = rng.uniform(*LIP_REDNESS)
    lip = (1 - redness) * np.asarray(face.skin) + redness * np.asarray(world.RED_LIP)
    lip = np.clip(lip + rng.normal(0, LIP_SPREAD, 3), 0.04, 0.98)
    return replace(face, lip=world.Colour(*lip.tolist()))


def _misplaced_mask(rng: np.random.Generator, box: Box, size: FrameSize) -> Tensor:
    """A mask of one edge of the picture, away from the mouth."""
    mask = torch.zeros(1, 1, 1, *size.latent)
    x, y, width, height = box
    top, bottom = int(y / 8), int((y + height) / 8) + 1
    left, right = int(x / 8), int((x + width) / 8) + 1
    edges = [mask[..., : max(top, 1), :], mask[..., bottom:, :]]
    edges += [mask[..., : max(left, 1)], mask[..., right:]]
    edges[rng.integers(4)].fill_(1)
    return mask


class DrawnScene(NamedTuple):
    """A scene before it is encoded."""

    spec: SceneSpec
    frames: np.ndarray  # (F, 3, H, W) uint8


def draw_scene(
    work: Path, seed: int, shots: Sequence[Shot], num_latents: int, number: int
) -> DrawnScene:
    """The scene of this number, the same in any process; the shots take turns."""
    spec = _sampler(work).sample(shots[number % len(shots)], num_latents, (seed, number))
    frames = spec.group.render(spec.motions, spec.size)
    return DrawnScene(spec, (frames * 255).round().byte().numpy())


@functools.cache
def _sampler(work: Path) -> SceneSampler:
    return SceneSampler(work)


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
    audio_embeds: Tensor  # (V, 4T - 3, 10, 5, 64) float16
    reference_mean: Tensor  # (C, 1, h, w), scaled
    reference_std: Tensor
    face_mask: Tensor  # (V, 1, h, w)
    prompt_embeds: Tensor  # (2, L, D)
    pooled_prompt_embeds: Tensor  # (2, D)
    pose: Tensor  # ()
    expression: Tensor
    weight: Tensor  # (h, w), of each latent in the loss
    outside: Tensor  # (h, w), 1 outside of mouths and eyes, where no speech is seen
    places: (
        Tensor  # (V, 3), in latents: the eyes' upper edge, then the face's middle row and column
    )

    def window(self, start: int, length: int) -> Self:
        """The latents from `start` on, with the audio as the worker's windows have it."""
        first = TEMPORAL_COMPRESSION * start
        return self._with(
            self.latents[:, start : start + length],
            self.audio_embeds[:, first : first + num_frames(length)],
        )

    def circular_window(self, start: int, before: int, after: int) -> Self:
        """A video's end and its beginning, as a window that wraps around has them."""
        end, begin = self.window(start, before), self.window(0, after)
        silence = torch.zeros_like(self.audio_embeds[:, : TEMPORAL_COMPRESSION - 1])
        return self._with(
            torch.cat([end.latents, begin.latents], dim=1),
            torch.cat([end.audio_embeds, silence, begin.audio_embeds], dim=1),
        )

    def crop_face(self, crop: FaceCrop, rng: np.random.Generator) -> Self:
        """The latents around one of the faces, as if the picture were no larger."""
        top, row, column = self.places[int(rng.integers(len(self.places)))].tolist()
        row = top + crop.height / 2 if crop.is_top else row
        fields = dict(vars(self))
        for axis, centre, length in ((-2, row, crop.height), (-1, column, crop.width)):
            begin = round(centre - length / 2 + rng.uniform(-crop.jitter, crop.jitter))
            begin = min(max(begin, 0), self.weight.shape[axis] - length)
            for name in SPATIAL_FIELDS:
                fields[name] = fields[name].narrow(axis, begin, length)
        return type(self)(**fields)

    def _with(self, latents: Tensor, audio_embeds: Tensor) -> Self:
        return type(self)(**{**vars(self), "latents": latents, "audio_embeds": audio_embeds})

    @classmethod
    def stack(cls, scenes: Sequence["Scene"]) -> "Scene":
        """One more dimension in front; the texts are cut to the length of the shortest.

        And then, where they are longer than that, to a multiple of 8: so batches have few shapes.
        """
        shortest = min(scene.prompt_embeds.shape[1] for scene in scenes)
        length = max(shortest - shortest % 8, min(shortest, 8))
        fields = {}
        for name in vars(scenes[0]):
            values = [getattr(scene, name) for scene in scenes]
            if name == "prompt_embeds":
                values = [value[:, :length] for value in values]
            fields[name] = torch.stack(values)
        return cls(**fields)


class SceneEncoder:
    """Encodes drawn scenes into latents and audio embeddings, on one device."""

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
    def encode(self, drawn: DrawnScene) -> Scene:
        """The scene as it was drawn."""
        spec, size, device = drawn.spec, drawn.spec.size, self._device
        clip, portrait, mask, embeds, pooled = (
            sent(torch.from_numpy(values), device)
            for values in (
                drawn.frames,
                spec.portrait,
                spec.face_mask,
                spec.prompt_embeds,
                spec.pooled_prompt_embeds,
            )
        )
        clip, portrait = (pixels.float() / 127.5 - 1 for pixels in (clip, portrait))
        with mixed_precision(device):
            latents = encode_frames(self._vae, clip.transpose(0, 1))
        reference = self._vae.encode(portrait[None, :, None]).latent_dist
        scale = self._vae.config.scaling_factor
        weights = [_face_weight(face, size) for face in spec.group.faces]
        weight = torch.stack(weights).amax(dim=0)
        return Scene(
            latents=latents.float() * scale,
            audio_embeds=self._encode_audio(spec, len(clip)),
            reference_mean=reference.mean[0].float() * scale,
            reference_std=reference.std[0].float() * scale,
            face_mask=mask,
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            pose=torch.full((), spec.pose, device=device),
            expression=torch.full((), spec.expression, device=device),
            weight=sent(1 + weight * MOUTH_WEIGHT, device),
            outside=sent((weight == 0).float(), device),
            # a crop reads the places one by one: on a GPU each reading would wait
            places=torch.tensor([_place(each) for each in weights]),
        )

    def _encode_audio(self, spec: SceneSpec, num_frames: int) -> Tensor:  # (V, F, 10, 5, 64)
        mels = sent(torch.from_numpy(spec.mels), self._device).float().split(1)
        states = torch.stack([encode_speech(mel, self._audio_encoder) for mel in mels])
        audio = audio_windows(states, num_frames, world.FPS).clone()
        audio[:, spec.num_audio_frames :] = 0
        return audio


def encode_frames(vae: AutoencoderKLHunyuanVideo, clip: Tensor) -> Tensor:
    """The latents' mean (C, T, h, w) of a clip (3, F, H, W), with `use_fast_convolutions`.

    As the model's own `encode`, which takes a long clip in stretches one by one; here they go
    through it together, since one alone leaves most of a GPU idle.
    """
    frames, stride = vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames
    starts = range(0, clip.shape[1], stride)
    stretches = [clip[:, start : start + frames + 1] for start in starts]
    alike = [each for each in stretches if each.shape[1] == frames + 1]
    encoded = [*vae.quant_conv(vae.encoder(torch.stack(alike))).split(1)] if alike else []
    encoded += [vae.quant_conv(vae.encoder(each[None])) for each in stretches[len(alike) :]]
    kept, overlap = stride // TEMPORAL_COMPRESSION, (frames - stride) // TEMPORAL_COMPRESSION
    first, *later = encoded
    parts, before = [first[:, :, : kept + 1]], first
    for moments in later:
        blended = vae.blend_t(before, moments[:, :, 1:], overlap)
        parts.append(blended[:, :, :kept])
        before = blended
    num_latents = (clip.shape[1] - 1) // TEMPORAL_COMPRESSION + 1
    mean, _ = torch.cat(parts, dim=2)[0, :, :num_latents].chunk(2)
    return mean


def _face_weight(face: world.Face, size: FrameSize) -> Tensor:  # (h, w)
    """1 at the eyes and the mouth, 0 elsewhere, in between at their edges."""
    weight = face_weight(face, *size)[None, None]
    weight = torch.nn.functional.avg_pool2d(weight, 8)[0, 0]
    return (weight - 1) / (weight.max() - 1)


def _place(weight: Tensor) -> tuple[float, float, float]:
    """The eyes' upper edge, the middle row and the middle column."""
    rows, columns = (weight.sum(dim).numpy() for dim in (1, 0))
    return float(np.flatnonzero(rows)[0]), _centroid(rows), _centroid(columns)


def _centroid(weights: np.ndarray) -> float:
    return float(np.average(np.arange(len(weights)) + 0.5, weights=weights))


class SceneBuffer:
    """A replay buffer: holds scenes of several shots, and samples batches of windows from them."""

    def __init__(
        self,
        scenes: Iterator[Scene],
        num_shots: int,
        limit: int,
        rng: np.random.Generator,
    ) -> None:
        self._source = scenes
        self._scenes: list[list[Scene]] = [[] for _ in range(num_shots)]
        self._limit = limit
        self._rng = rng
        self._num_added = 0

    def add(self, count: int = 1) -> None:
        """Adds so many new scenes, which replace the oldest ones once the buffer is full."""
        for _ in range(count):
            scenes = self._scenes[self._num_added % len(self._scenes)]
            scenes.append(next(self._source))
            del scenes[: -self._limit]
            self._num_added += 1

    def sample(
        self, count: int, length: int, circular_share: float = 0.0, crop: FaceCrop | None = None
    ) -> Scene:
        """Windows of one shot, stacked.

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
