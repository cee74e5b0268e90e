"""Trains the small autoencoder: pictures of the drawn world, through latents and back."""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from torch.nn.functional import l1_loss

from training import architecture, world
from training.convolution import to_stored, to_trained
from training.loop import train
from training.speech import MouthTrack

FRAMES = 9  # of one clip: three latent frames
SIZE = 256  # px of a picture
STILL_CROP, CLIP_CROP = 64, 96  # px of what is learned from it
STILL_STEPS, CLIP_STEPS = 2800, 600
LATENT_NOISE = 0.1  # added to the latents, so that near ones decode alike
SIZE_WEIGHT = 1e-3  # keeps the latents near 1
FACE_WEIGHT = 3.0  # what the eyes and the mouth count beside the rest


def chance_track(rng: np.random.Generator, num_frames: int) -> MouthTrack:
    """A mouth that moves by chance, for pictures without sound."""
    seconds = np.arange(num_frames) / world.FPS
    waves = [np.sin(2 * math.pi * (rng.uniform(1, 6) * seconds + rng.random())) for _ in range(3)]
    opening = np.clip(rng.uniform(-0.3, 0.6) + 0.6 * waves[0] * waves[1], 0, 1)
    return MouthTrack(opening.astype(np.float32), waves[2].astype(np.float32))


class Pictures:
    """Crops of people in motion, half of them around the mouth and the eyes."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._bank: list[tuple[world.Face, Tensor]] = []  # single frames, the latest last

    def stills(self, count: int, crop: int) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, 1, crop, crop) in [-1, 1] and what each counts (B, 1, 1, crop, crop)."""
        for _ in range(100 if not self._bank else 1):
            self._bank.append(self._person(1))
        del self._bank[:-400]
        chosen = self._rng.integers(len(self._bank), size=count)
        return self._crops([self._bank[index] for index in chosen], crop)

    def clips(self, count: int, crop: int) -> tuple[Tensor, Tensor]:
        """The same of clips: (B, 3, F, crop, crop); all are of one person."""
        return self._crops([self._person(FRAMES)] * count, crop)

    def _person(self, num_frames: int) -> tuple[world.Face, Tensor]:
        rng = self._rng
        face = world.draw_person(rng)
        track = chance_track(rng, 60)
        motion = world.move(rng, track, rng.uniform(0, 100), rng.uniform(0, 100))
        start = int(rng.integers(0, 60 - num_frames))
        return face, world.render(face, motion[start : start + num_frames], SIZE, SIZE)

    def _crops(self, people: list[tuple[world.Face, Tensor]], crop: int) -> tuple[Tensor, Tensor]:
        pixels, weights = [], []
        for index, (face, frames) in enumerate(people):
            middle = np.asarray((face.centre[0], face.centre[1] + face.size * 0.3))
            spread = crop * 0.3 if index % 2 else SIZE
            corner = SIZE / 2 + SIZE * middle - crop / 2 + self._rng.uniform(-spread, spread, 2)
            x, y = np.clip(corner, 0, SIZE - crop).astype(int)
            pixels.append(frames[:, :, y : y + crop, x : x + crop])
            weights.append(face_weight(face, SIZE, SIZE)[y : y + crop, x : x + crop])
        return torch.stack(pixels).transpose(1, 2) * 2 - 1, torch.stack(weights)[:, None, None]


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

    # One frame is what a clip's every frame is while nothing moves, at a tenth of the work.
    train(
        vae,
        lambda _: loss_of(vae, *pictures.stills(16, STILL_CROP)),
        directory=directory / "stills",
        steps=STILL_STEPS,
        learning_rate=2e-3,
    )

    def clip_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        # the last ones whole: the normalisation sees what it will see in use
        whole = step >= 0.9 * CLIP_STEPS
        return loss_of(vae, *pictures.clips(1 if whole else 2, SIZE if whole else CLIP_CROP))

    train(
        vae.train(),
        clip_loss,
        directory=directory / "clips",
        steps=CLIP_STEPS,
        learning_rate=1e-3,
        decay_share=0.6,
    )
    pixels, _ = pictures.stills(16, SIZE)
    with torch.no_grad():
        spread = vae.encode(pixels).latent_dist.mean.std().item()
    stored = to_stored(vae.state_dict(), architecture.autoencoder())
    stored.register_to_config(scaling_factor=1 / spread)
    return stored
