"""Trains the small autoencoder: pictures of the drawn world, through latents and back."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from torch.nn.functional import l1_loss

from training import architecture, world
from training.convolution import see_motion, to_stored, to_trained
from training.loop import train
from training.speech import MouthTrack, SpeechCorpus, mouth_track

SIZE = 256  # px of a picture
TRACK_FRAMES = 60  # of the speech of which a clip is a part


@dataclass(frozen=True)
class Phase:
    """A part of the training."""

    name: str
    count: int  # clips a step, each of another person
    num_frames: int
    crop: int  # px of what is learned from a picture
    steps: int
    learning_rate: float
    decay_share: float


# One frame is what a clip's every frame is while nothing moves, at a tenth of the work. The last
# clips are whole pictures: the normalisation sees what it will see in use.
PHASES = (
    Phase("stills", 16, 1, 64, 2800, 2e-3, 0.3),
    Phase("clips", 4, 9, 64, 600, 2e-4, 0.8),
    Phase("whole", 1, 9, SIZE, 40, 1e-4, 1.0),
)
LATENT_NOISE = 0.1  # added to the latents, so that near ones decode alike
SIZE_WEIGHT = 1e-3  # keeps the latents near 1
FACE_WEIGHT = 3.0  # what the eyes and the mouth count beside the rest


def chance_track(rng: np.random.Generator, num_frames: int) -> MouthTrack:
    """A mouth that moves by chance, for pictures without sound."""
    seconds = np.arange(num_frames) / world.FPS
    waves = [np.sin(2 * math.pi * (rng.uniform(1, 3) * seconds + rng.random())) for _ in range(3)]
    opening = np.clip(rng.uniform(-0.3, 0.6) + 0.6 * waves[0] * waves[1], 0, 1)
    return MouthTrack(opening.astype(np.float32), waves[2].astype(np.float32))


class Pictures:
    """Crops of people who speak or move by chance, half of them around the mouth and the eyes."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._corpus = SpeechCorpus("train")

    def batch(self, count: int, num_frames: int, crop: int) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, F, crop, crop) in [-1, 1] and what each counts (B, 1, 1, crop, crop)."""
        pixels, weights = zip(
            *(self._clip(num_frames, crop, index % 2 == 0) for index in range(count)), strict=True
        )
        return torch.stack(pixels).transpose(1, 2) * 2 - 1, torch.stack(weights)[:, None, None]

    def _clip(self, num_frames: int, crop: int, of_face: bool) -> tuple[Tensor, Tensor]:
        rng = self._rng
        face = world.draw_person(rng)
        if rng.random() < 0.75:
            track = mouth_track(self._corpus.clip(rng, TRACK_FRAMES))
        else:
            track = chance_track(rng, TRACK_FRAMES)
        motion = world.move(rng, track, rng.uniform(0, 100), rng.uniform(0, 100))
        start = int(rng.integers(0, TRACK_FRAMES - num_frames))
        # between the mouth and the eyes
        middle = np.asarray((face.centre[1] + face.size * rng.choice([0.0, 0.5]), face.centre[0]))
        spread = crop * 0.3 if of_face else SIZE
        corner = SIZE / 2 + SIZE * middle - crop / 2 + rng.uniform(-spread, spread, 2)
        y, x = np.clip(corner, 0, SIZE - crop).astype(int)
        at = (slice(y, y + crop), slice(x, x + crop))
        frames = world.render(face, motion[start : start + num_frames], SIZE, SIZE, at)
        return frames, face_weight(face, SIZE, SIZE)[at]


def face_weight(face: world.Face, height: int, width: int) -> Tensor:
    """What each pixel counts (H, W): more around the eyes and the mouth."""
    short = min(height, width)
    x = ((torch.arange(width) + 0.5 - width / 2) / short - face.centre[0]) / face.size
    y = ((torch.arange(height) + 0.5 - height / 2) / short - face.centre[1]) / face.size
    mouth = (x.abs()[None] < face.mouth_width * 1.4) & ((y - face.mouth_place).abs() < 0.4)[:, None]
    away, place = face.eye_place
    eyes = ((x.abs() - away).abs()[None] < 0.28) & ((y - place).abs() < 0.2)[:, None]
    return 1 + FACE_WEIGHT * (mouth | eyes)


def loss_of(
    vae: AutoencoderKLHunyuanVideo, pixels: Tensor, weight: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """How far the pictures are from the originals, in values and in edges."""
    with torch.autocast("cpu", torch.bfloat16):
        mean = vae.encode(pixels).latent_dist.mean.float()
        decoded = vae.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample
    decoded = decoded.float()
    values = ((decoded - pixels).abs() * weight).mean() / weight.mean()
    edges = torch.stack(
        [
            l1_loss(decoded.diff(dim=dim), pixels.diff(dim=dim))
            for dim in (2, 3, 4)
            if pixels.shape[dim] > 1
        ]
    ).sum()
    loss = values + edges + SIZE_WEIGHT * mean.square().mean()
    with torch.no_grad():
        error = ((decoded - pixels) / 2).square().mean().item()
    return loss, {"psnr": -10 * math.log10(error), "std": mean.std().item()}


def train_autoencoder(directory: Path, seed: int) -> AutoencoderKLHunyuanVideo:
    """The autoencoder, trained; an earlier run in the directory is gone on with."""
    torch.manual_seed(seed)
    vae = architecture.autoencoder().train()
    to_trained(vae)
    pictures = Pictures(seed)

    for phase in PHASES:

        def loss(_: int, phase: Phase = phase) -> tuple[Tensor, dict[str, float]]:
            return loss_of(vae, *pictures.batch(phase.count, phase.num_frames, phase.crop))

        train(
            vae.train(),
            loss,
            directory=directory / phase.name,
            steps=phase.steps,
            learning_rate=phase.learning_rate,
            decay_share=phase.decay_share,
        )
        if phase.num_frames == 1:
            see_motion(vae)
    pixels, _ = pictures.batch(16, 1, SIZE)
    with torch.no_grad():
        spread = vae.encode(pixels).latent_dist.mean.std().item()
    stored = to_stored(vae.state_dict(), architecture.autoencoder())
    stored.register_to_config(scaling_factor=1 / spread)
    return stored
