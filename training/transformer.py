"""Trains the denoiser: from noise to the latents of a person who speaks the recording.

Flow matching as the published model's: with noise e and latents x, at noise level s the model sees
(1 - s) x + s e and answers e - x. What the reference's guidance schedule needs is dropped out at
times: the audio to zeros, the prompt to the negative one, the face mask to 0.6 of itself.
"""

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Full
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo
from PIL import Image
from torch import Tensor
from transformers import WhisperFeatureExtractor, WhisperModel

from training import architecture, world
from training.autoencoder import face_weight
from training.convolution import to_trained
from training.loop import steps_done, train
from training.speech import MouthTrack, SpeechCorpus, mouth_track
from worker.audio import audio_windows, encode_speech, log_mel
from worker.demo import pooled_tokenizer, prompt_tokenizer
from worker.image import face_mask, to_llava_pixels
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel
from worker.sampling import EARLY_FACE_MASK
from worker.shapes import TEMPORAL_COMPRESSION, WINDOW_LATENTS, FrameSize
from worker.text import NEGATIVE_PROMPT, PROMPT_PREFIX, encode_clip, encode_llava, tokenize

PROMPTS = (
    "A person speaks to the camera.",
    "A woman speaks to the camera.",
    "A man talks, calm and friendly.",
    "Someone tells a story in front of a plain wall.",
    "A speaker in a studio.",
    "",
)

Kinds = tuple[tuple[tuple[int, int, int], float], ...]

# Height, width and latent frames, about as much work each; how often each is drawn.
SHORT_CLIPS: Kinds = (
    ((256, 256, 6), 0.5),
    ((192, 192, 11), 0.15),
    ((256, 192, 8), 0.1),
    ((192, 256, 8), 0.1),
    ((128, 128, WINDOW_LATENTS), 0.15),
)
WHOLE_CLIPS: Kinds = (((256, 256, WINDOW_LATENTS), 1.0),)
LEAD_LATENTS = 3  # before a clip that does not begin where its video does
POOL = 192  # scenes that are kept
USES = 8  # of a scene, on average
QUEUE = 8

NO_AUDIO_SHARE = 0.12
QUIET_MASK_SHARE = 0.3
CUT_SHARE = 0.1  # of clips whose speech ends and leaves zeros
ELSEWHERE_SHARE = 0.08  # of clips whose face mask lies beside the mouth: it stays closed
WHOLE_MASK_SHARE = 0.3
NOISE_SHIFT = 3.0
MOUTH_WEIGHT = 5.0


@dataclass(frozen=True)
class Phase:
    """A part of the training."""

    name: str
    kinds: Kinds
    steps: int
    learning_rate: float
    decay_share: float
    accumulate: int


PHASES = (
    Phase("short", SHORT_CLIPS, 3000, 1.5e-3, 0.35, 4),
    Phase("whole", WHOLE_CLIPS, 60, 4e-4, 0.8, 2),
)


@dataclass(frozen=True)
class Scene:
    """A clip as the denoiser is given it; shapes as in its `forward`, a batch of one."""

    latents: Tensor  # (1, C, T, h, w), scaled
    reference_mean: Tensor  # (1, C, 1, h, w), scaled
    reference_std: Tensor
    audio_embeds: Tensor  # (1, 4T - 3, 10, 5, 64) float16
    face_mask: Tensor  # (1, 1, 1, h, w)
    prompt_embeds: Tensor  # (2, L, D), the negative one first
    prompt_mask: Tensor  # (2, L)
    pooled_prompt_embeds: Tensor  # (2, D)
    pose: float
    expression: float
    weight: Tensor  # (h, w), what each latent counts


class Scenes:
    """Clips of people who speak, made from a seed."""

    def __init__(
        self, vae: AutoencoderKLHunyuanVideo, audio_encoder: WhisperModel, seed: Sequence[int]
    ) -> None:
        self._rng = np.random.default_rng(seed)
        to_trained(vae)  # quicker, and the same numbers
        self._vae = vae
        self._audio_encoder = audio_encoder
        self._feature_extractor = WhisperFeatureExtractor(feature_size=80)
        self._corpus = SpeechCorpus("train")
        self._tokenizer = prompt_tokenizer()
        self._text_encoder, self._pooled_text_encoder = architecture.text_encoders()
        self._pooled_tokenizer = pooled_tokenizer()

    @torch.no_grad()
    def make(self, height: int, width: int, num_latents: int) -> Scene:
        """A clip of so many latent frames."""
        rng = self._rng
        size = FrameSize(height, width)
        frames = TEMPORAL_COMPRESSION * (num_latents - 1) + 1
        # a clip from the beginning of its video, or one from the middle
        lead = LEAD_LATENTS if rng.random() < 0.5 else 0
        start = TEMPORAL_COMPRESSION * (lead + int(rng.integers(0, 40)) if lead else 0)
        whole = start + frames + int(rng.integers(0, 60))
        waveform = self._corpus.clip(rng, whole)
        states = encode_speech(log_mel(waveform, self._feature_extractor), self._audio_encoder)
        audio = audio_windows(states, whole, world.FPS)[:, start : start + frames].clone()
        mouth = mouth_track(waveform)
        if rng.random() < CUT_SHARE:
            end = int(rng.integers(0, frames))
            audio[:, end:] = 0
            mouth = _closed(mouth, start + end)

        face = world.draw_person(rng)
        mask = face_mask(_jittered(rng, face.box(*size)), size)
        if rng.random() < WHOLE_MASK_SHARE:
            mask = torch.ones_like(mask)
        elif rng.random() < ELSEWHERE_SHARE:
            mask = _mask_elsewhere(rng, face, size)
            mouth = _closed(mouth, 0)

        pose = float(rng.uniform(0, 100)) if rng.random() < 0.7 else 25.0
        expression = float(rng.uniform(0, 100)) if rng.random() < 0.7 else 30.0
        motion = world.move(rng, mouth, pose, expression)
        first = start - TEMPORAL_COMPRESSION * lead
        clip = world.render(face, motion[first : start + frames], *size)
        portrait = world.portrait(face, *size)
        with torch.autocast("cpu", torch.bfloat16):
            latents = self._vae.encode(clip.transpose(0, 1)[None] * 2 - 1).latent_dist.mean
            reference = self._vae.encode(portrait[None, :, None] * 2 - 1).latent_dist
        scale = self._vae.config.scaling_factor
        weight = face_weight(face, *size)[None, None]
        weight = torch.nn.functional.avg_pool2d(weight, 8)[0, 0]
        return Scene(
            latents=latents.float()[:, :, lead:] * scale,
            reference_mean=reference.mean.float() * scale,
            reference_std=reference.std.float() * scale,
            audio_embeds=audio,
            face_mask=mask,
            **self._encode_prompts(portrait),
            pose=pose,
            expression=expression,
            weight=1 + (weight - 1) / (weight.max() - 1) * MOUTH_WEIGHT,
        )

    def _encode_prompts(self, portrait: Tensor) -> dict[str, Tensor]:
        pixels = (portrait.permute(1, 2, 0) * 255).byte().numpy()
        prompt = PROMPT_PREFIX + PROMPTS[self._rng.integers(len(PROMPTS))]
        texts = [NEGATIVE_PROMPT, prompt]
        tokens = [tokenize(text, self._tokenizer) for text in texts]
        picture = to_llava_pixels(Image.fromarray(pixels))
        embeds, mask = encode_llava(tokens, picture, self._text_encoder)
        pooled = encode_clip(texts, self._pooled_tokenizer, self._pooled_text_encoder)
        return {"prompt_embeds": embeds, "prompt_mask": mask, "pooled_prompt_embeds": pooled}


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


def loss_of(
    transformer: torch.nn.Module, scene: Scene, rng: np.random.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The squared error of the velocity at a noise level drawn by chance."""
    even = rng.uniform()
    level = NOISE_SHIFT * even / (1 + (NOISE_SHIFT - 1) * even)
    noise = torch.randn_like(scene.latents)
    noisy = (1 - level) * scene.latents + level * noise
    reference = scene.reference_mean.expand_as(scene.latents)
    reference = reference + scene.reference_std * torch.randn_like(scene.latents)
    hears = rng.random() >= NO_AUDIO_SHARE
    prompt = 1 if hears or rng.random() < 0.5 else 0
    mask = scene.face_mask * (EARLY_FACE_MASK if rng.random() < QUIET_MASK_SHARE else 1.0)
    motion = torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = transformer(
            hidden_states=noisy,
            timestep=torch.tensor([1000 * level]),
            encoder_hidden_states=scene.prompt_embeds[prompt : prompt + 1],
            encoder_attention_mask=scene.prompt_mask[prompt : prompt + 1],
            pooled_projections=scene.pooled_prompt_embeds[prompt : prompt + 1],
            reference_latents=reference,
            audio_embeds=scene.audio_embeds.float() * float(hears),
            face_mask=mask,
            motion_expression=motion * scene.expression,
            motion_pose=motion * scene.pose,
            fps=motion[:, 0] * world.FPS,
        ).sample
    error = (velocity.float() - (noise - scene.latents)).square()
    loss = (error * scene.weight).mean() / scene.weight.mean()
    band = "low" if level < 0.4 else "middle" if level < 0.8 else "high"
    return loss, {f"{band}_noise": loss.item(), f"{band}_count": 1.0}


def _produce(queue: Any, work: tuple[Path, Path], seed: Sequence[int], kinds: Kinds) -> None:
    """Fills the queue with scenes until the process is stopped, or the trainer is gone."""
    torch.set_num_threads(1)
    vae, audio_encoder = work
    scenes = Scenes(
        AutoencoderKLHunyuanVideo.from_pretrained(vae).eval(),
        WhisperModel.from_pretrained(audio_encoder).eval(),
        seed,
    )
    rng = np.random.default_rng(seed)
    queue.cancel_join_thread()  # nobody reads what is left in the end
    trainer = multiprocessing.parent_process()
    while trainer is not None and trainer.is_alive():
        kind = kinds[rng.choice(len(kinds), p=[share for _, share in kinds])][0]
        scene = scenes.make(*kind)
        # by value: shared memory would hold a file handle for each tensor
        values = {name: _to_numpy(value) for name, value in vars(scene).items()}
        while trainer.is_alive():
            with contextlib.suppress(Full):
                queue.put(values, timeout=5)
                break


def _to_numpy(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def _to_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@contextmanager
def drawn_scenes(
    work: tuple[Path, Path], seed: Sequence[int], kinds: Kinds
) -> Iterator[Callable[[], Scene]]:
    """Gives what draws scenes; another process makes them meanwhile, each for a few uses."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue(QUEUE)
    process = context.Process(target=_produce, args=(queue, work, seed, kinds), daemon=True)
    process.start()
    pool: list[Scene] = []
    rng = np.random.default_rng(seed)
    draws = itertools.count()

    def draw() -> Scene:
        if next(draws) % USES == 0:
            values = queue.get(timeout=600)
            pool.append(Scene(**{name: _to_tensor(value) for name, value in values.items()}))
            del pool[:-POOL]
        return pool[rng.integers(len(pool))]

    try:
        yield draw
    finally:
        process.terminate()
        process.join()


def train_transformer(
    directory: Path, vae: Path, audio_encoder: Path, seed: int
) -> HunyuanVideoAvatarTransformer3DModel:
    """The denoiser, trained on short clips and then on whole windows.

    An earlier run in the directory is gone on with. The other two models are read from theirs.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the other core makes the scenes
    transformer = architecture.transformer().train()
    for parameter in transformer.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    for number, phase in enumerate(PHASES):
        chance = (seed, number, steps_done(directory / phase.name))
        torch.manual_seed(sum(chance))
        rng = np.random.default_rng(chance)
        with drawn_scenes((vae, audio_encoder), chance, phase.kinds) as draw:

            def loss(
                _: int,
                draw: Callable[[], Scene] = draw,
                rng: np.random.Generator = rng,
            ) -> tuple[Tensor, dict[str, float]]:
                return loss_of(transformer, draw(), rng)

            train(
                transformer.train(),
                loss,
                directory=directory / phase.name,
                steps=phase.steps,
                learning_rate=phase.learning_rate,
                decay_share=phase.decay_share,
                accumulate=phase.accumulate,
            )
    return transformer
