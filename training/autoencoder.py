"""Trains the small autoencoder: pictures of the drawn world, through latents and back."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from torch.nn.functional import l1_loss

from training import architecture, world
from training.convolution import inflate_kernels, use_fast_convolutions, with_library_convolutions
from training.groups import Group, random_group
from training.loop import LossGradients, mixed_precision, time_for, train
from training.speech import MouthTrack
from worker.shapes import FrameSize

SIZE = 256  # px of a picture
PICTURES = 800  # whose clips are rendered before the training
PEOPLE = (1, 1, 2, 3)  # in a picture, each as often
CLIP_FRAMES = 17
TRACK_FRAMES = 60  # of the movement of which a clip is a part


@dataclass(frozen=True)
class Phase:
    """A part of the training."""

    name: str
    count: int  # clips a step, each of another picture
    num_frames: int
    crop: int  # px of what is learned from a picture
    steps: int
    learning_rate: float
    decay_share: float
    time_share: float  # of the training's, where that is limited


# One frame is what a clip's every frame is while nothing moves, at a tenth of the work. The last
# clips are whole pictures: the normalisation sees what it will see in use.
PHASES = (
    Phase("stills", 32, 1, 96, 3700, 2e-3, 0.3, 0.4),
    Phase("clips", 8, 9, 96, 950, 3e-4, 0.8, 0.4),
    Phase("whole", 4, CLIP_FRAMES, SIZE, 50, 1e-4, 1.0, 0.2),
)
LATENT_NOISE = 0.1  # added to the latents, so that near ones decode alike
POSTERIOR_STD = 0.05  # of the encoder: the reference latents are sampled with it
LATENT_WEIGHT = 1e-3  # keeps the latents near 1
MEASURED_PEOPLE = 8
FACE_WEIGHT = 3.0  # of the eyes and the mouth in the loss, added to 1


def random_track(rng: np.random.Generator, num_frames: int) -> MouthTrack:
    """A mouth that moves at random, for pictures without sound."""
    seconds = np.arange(num_frames) / world.FPS
    waves = [np.sin(2 * math.pi * (rng.uniform(1, 3) * seconds + rng.random())) for _ in range(3)]
    opening = np.clip(rng.uniform(-0.3, 0.6) + 0.6 * waves[0] * waves[1], 0, 1)
    return MouthTrack(opening.astype(np.float32), waves[2].astype(np.float32))


class ClipSampler:
    """Samples crops of people who move at random, half of them around the mouth and the eyes."""

    def __init__(
        self, seed: int, device: torch.device, pictures: int = PICTURES, size: int = SIZE
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._size = size
        square = FrameSize(size, size)
        self._groups = [
            random_group(self._rng, int(self._rng.choice(PEOPLE)), square) for _ in range(pictures)
        ]
        self._clips = torch.stack([self._draw(group, device) for group in self._groups])
        self._weights = torch.stack(
            [
                torch.stack([face_weight(face, *square) for face in group.faces]).amax(dim=0)
                for group in self._groups
            ]
        ).to(device)

    def _draw(self, group: Group, device: torch.device) -> Tensor:  # (3, F, H, W) uint8
        rng = self._rng
        start = int(rng.integers(0, TRACK_FRAMES - CLIP_FRAMES))
        motions = []
        for _ in group.faces:
            track = random_track(rng, TRACK_FRAMES)
            motion = world.speaking_motion(rng, track, rng.uniform(0, 100), rng.uniform(0, 100))
            motions.append(motion[start : start + CLIP_FRAMES])
        frames = group.render(motions, FrameSize(self._size, self._size), device)
        return (frames * 255).round().byte().transpose(0, 1)

    def batch(self, count: int, num_frames: int, crop: int) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, F, crop, crop) uint8 and their weights (B, 1, 1, crop, crop)."""
        rng = self._rng
        pictures = rng.integers(len(self._groups), size=count)
        firsts = rng.integers(CLIP_FRAMES - num_frames + 1, size=count)
        corners = [
            self._corner(self._groups[picture], crop, of_face=number % 2 == 0)
            for number, picture in enumerate(pictures)
        ]
        starts = np.concatenate([pictures[None], firsts[None], np.transpose(corners)])  # (4, B)
        picture, first, top, left = torch.from_numpy(starts).to(self._clips.device)[..., None]
        planes, frames, pixels = (
            torch.arange(length, device=self._clips.device) for length in (3, num_frames, crop)
        )
        rows, columns = (top + pixels)[:, :, None], (left + pixels)[:, None, :]  # (B, crop, crop)
        weights = self._weights[picture[:, None], rows, columns]
        rows, columns = rows[:, None, None], columns[:, None, None]
        frame = (first + frames)[:, None, :, None, None]
        picture = picture[:, None, None, None]
        clips = self._clips[picture, planes[:, None, None, None], frame, rows, columns]
        return clips, weights[:, None, None]

    def _corner(self, group: Group, crop: int, *, of_face: bool) -> np.ndarray:  # row, column
        rng, size = self._rng, self._size
        face = group.faces[rng.integers(len(group.faces))]
        # between the mouth and the eyes
        middle = np.asarray((face.centre[1] + face.size * rng.choice([0.0, 0.5]), face.centre[0]))
        spread = crop * 0.3 if of_face else size
        corner = size / 2 + size * middle - crop / 2 + rng.uniform(-spread, spread, 2)
        place: np.ndarray = np.clip(corner, 0, size - crop).astype(np.int64)
        return place


def face_weight(face: world.Face, height: int, width: int) -> Tensor:
    """The weight of each pixel in the loss (H, W): more around the eyes and the mouth."""
    short = min(height, width)
    x = ((torch.arange(width) + 0.5 - width / 2) / short - face.centre[0]) / face.size
    y = ((torch.arange(height) + 0.5 - height / 2) / short - face.centre[1]) / face.size
    mouth = (x.abs()[None] < face.mouth_width * 1.4) & ((y - face.mouth_place).abs() < 0.4)[:, None]
    away, place = face.eye_place
    eyes = ((x.abs() - away).abs()[None] < 0.28) & ((y - place).abs() < 0.2)[:, None]
    return 1 + FACE_WEIGHT * (mouth | eyes)


def reconstruction_loss(
    vae: AutoencoderKLHunyuanVideo, pixels: Tensor, weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The L1 error of the reconstruction, in values and in edges.

    Args:
        pixels: (B, 3, F, H, W) uint8.
        weight: of each pixel, (B, 1, 1, H, W).
    """
    pixels = pixels.float() / 127.5 - 1
    with mixed_precision(pixels.device, cache_enabled=False):
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
    loss = values + edges + LATENT_WEIGHT * mean.square().mean()
    with torch.no_grad():
        psnr = -10 * ((decoded - pixels) / 2).square().mean().log10()
        return loss, {"psnr": psnr, "std": mean.std()}


def train_autoencoder(
    directory: Path,
    seed: int,
    device: torch.device,
    phases: tuple[Phase, ...] = PHASES,
    pictures: int = PICTURES,
    deadline: float | None = None,
) -> AutoencoderKLHunyuanVideo:
    """The trained autoencoder; resumes an earlier run in the directory.

    With a deadline, by `time.monotonic()`, the phases share the time until then.
    """
    torch.manual_seed(seed)
    vae = architecture.autoencoder().train()
    use_fast_convolutions(vae)
    vae.to(device)
    size = phases[-1].crop
    sampler = ClipSampler(seed, device, pictures, size)

    torch.backends.cudnn.benchmark = True  # the shapes are few, unlike the denoiser's
    for index, phase in enumerate(phases):
        gradients = LossGradients(vae, partial(reconstruction_loss, vae))

        def backward(
            phase: Phase = phase, gradients: LossGradients = gradients
        ) -> dict[str, Tensor]:
            return gradients(*sampler.batch(phase.count, phase.num_frames, phase.crop))

        train(
            vae.train(),
            backward,
            directory=directory / phase.name,
            steps=phase.steps,
            learning_rate=phase.learning_rate,
            decay_share=phase.decay_share,
            seconds=time_for(
                deadline, phase.time_share, sum(later.time_share for later in phases[index + 1 :])
            ),
        )
        if phase.num_frames == 1:
            inflate_kernels(vae)
    torch.backends.cudnn.benchmark = False
    pixels, _ = sampler.batch(16, 1, size)
    with torch.no_grad():
        spread = vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean.std().item()
    stored = with_library_convolutions(vae.state_dict(), architecture.autoencoder())
    # float16 has not the range for what the encoder computes
    stored.register_to_config(scaling_factor=1 / spread, force_upcast=True)
    with torch.no_grad():  # nothing has trained the half that gives the logarithm of the variance
        half = len(stored.quant_conv.weight) // 2
        stored.quant_conv.weight[half:] = 0
        stored.quant_conv.bias[half:] = 2 * math.log(POSTERIOR_STD)
    return stored


def drawn_people(count: int, seed: int = 97) -> Iterator[Tensor]:
    """A picture (3, H, W) of each of so many people, as they speak."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        face = world.random_face(rng)
        motion = world.speaking_motion(rng, random_track(rng, TRACK_FRAMES), 25, 30)
        moment = int(rng.integers(TRACK_FRAMES))
        yield world.render(face, motion[moment : moment + 1], SIZE, SIZE, torch.device("cpu"))[0]


@torch.inference_mode()
def measure(vae: AutoencoderKLHunyuanVideo, device: torch.device) -> str:
    """How near whole pictures of people whom the training never saw come back."""
    vae = vae.to(device)
    rng = np.random.default_rng(98)
    psnrs = []
    for _ in range(MEASURED_PEOPLE):
        face = world.random_face(rng)
        motion = world.speaking_motion(rng, random_track(rng, TRACK_FRAMES + 1))
        frames = world.render(face, motion, SIZE, SIZE, device)
        latents = vae.encode(frames.transpose(0, 1)[None] * 2 - 1).latent_dist.mean
        decoded = vae.decode(latents).sample[0].transpose(0, 1) / 2 + 0.5
        psnrs.append(-10 * (decoded - frames).square().mean().log10().item())
    return f"pictures through latents and back: {np.mean(psnrs):.1f} dB, lowest {min(psnrs):.1f}"
