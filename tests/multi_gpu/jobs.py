"""Jobs for several ranks: small ones, whose passes take some hundredths of a second."""

import io
import os
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image

from avatar_client.contract import preview
from avatar_client.contract.request import GenerationParams
from tests.support.golden_transformer import relative_difference
from worker.generation.conditioning import Conditioning
from worker.generation.engine import Engine
from worker.generation.options import DecodeOptions
from worker.generation.preview import FramePreview
from worker.generation.voices import Voice
from worker.generation.watch import Watch
from worker.loading import preview as latent_maps
from worker.loading.model_directory import DEMO_DIR
from worker.model.autoencoder import SCRATCH_BYTES
from worker.settings import Settings

TWO = Settings(avatar_model="demo", num_gpus=2)
SIDE = 32  # px
# A batch of two, or heads of several ranks, are summed in another order; latents are bfloat16.
TOLERANCE = 1e-3
NUM_STEPS = 12  # the last two without the negative prompt, some of them cached


def params(
    num_steps: int = NUM_STEPS,
    guidance_scale: float = 7.5,
    preset: Literal["quality", "draft"] = "quality",
) -> GenerationParams:
    return GenerationParams(
        num_inference_steps=num_steps, guidance_scale=guidance_scale, preset=preset
    )


def conditioning(
    engine: Engine, seconds: float = 0.2, width: int = SIDE, num_voices: int = 1
) -> Conditioning:
    """What steers a video of voices side by side, each with a tone of its own."""
    times = np.arange(round(seconds * 16_000)) / 20
    across = width / num_voices
    voices = [
        Voice(
            (np.sin(times * (1 + index)) / 2).astype(np.float32),
            (index * across, 0, min(across, SIDE), SIDE),
        )
        for index in range(num_voices)
    ]
    return engine.pipeline.encode(
        image=Image.new("RGB", (width, SIDE), (200, 120, 90)),
        voices=voices,
        prompt="A person speaks.",
        height=SIDE,
        width=width,
    )


def assert_as_alone(engine: Engine, *job: Any) -> None:
    """The latents of all ranks are those of the first alone."""
    expected = replace(engine, ranks=None).denoise(*job)
    assert relative_difference(engine.denoise(*job), expected) < TOLERANCE


def last_preview(
    engine: Engine, told: Conditioning, asked: GenerationParams, seed: int
) -> NDArray[np.float64]:
    """The last picture that the first rank draws of a middle frame, while the job is denoised."""
    latent_to_rgb = latent_maps.load(DEMO_DIR, engine.pipeline.vae.config.latent_channels)
    assert latent_to_rgb is not None
    watched = FramePreview(latent_to_rgb, told.plan.kept_latents // 2)
    pictures: list[str | None] = []

    def on_step(step: int, num_steps: int) -> None:
        pictures.append(watched.data_url(step / num_steps))

    engine.denoise(told, asked, seed, Watch(on_step=on_step, preview=watched))
    last = pictures[-1]
    assert last is not None
    return np.array(Image.open(io.BytesIO(preview.read(last)))).astype(np.float64)


def assert_same_picture(picture: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    """But for what other roundings make of a JPEG, of 255 levels."""
    assert abs(picture - expected).mean() < 1.0


def rank_process_of(pid: int | None = None) -> psutil.Process:
    """The only rank process of the worker with that process id; without one, of this process."""
    children = psutil.Process(pid or os.getpid()).children()
    [process] = [
        child for child in children if "worker.multi_gpu.rank_process" in " ".join(child.cmdline())
    ]
    return process


@dataclass(frozen=True)
class Video:
    """One to decode that nobody has denoised, and into how many tiles it is cut."""

    num_latents: int
    height: int  # px, as is width
    width: int
    num_frames: int
    num_tiles: int

    def latents(self, engine: Engine) -> torch.Tensor:
        shape = (self.num_latents, self.height // 8, self.width // 8)
        channels = engine.pipeline.vae.config.latent_channels
        return torch.randn(1, channels, *shape, generator=torch.Generator().manual_seed(3))

    def chunks(self, engine: Engine) -> Generator[NDArray[np.uint8]]:
        told = replace(conditioning(engine), num_frames=self.num_frames)
        return engine.decode_frames(told, self.latents(engine))

    def decoded(self, engine: Engine) -> torch.Tensor:
        """The frames in float32, before they are rounded."""
        latents = self.latents(engine)
        options = DecodeOptions(num_frames=self.num_frames, scratch_bytes=SCRATCH_BYTES)
        ranks = nullcontext() if engine.ranks is None else engine.ranks.decoding(latents, options)
        with ranks as gatherer:
            frames = engine.pipeline.decode_frames(
                latents, self.num_frames, SCRATCH_BYTES, gatherer.map if gatherer else map
            )
            return torch.cat(list(frames))


def assert_decodes_as_alone(engine: Engine, video: Video) -> None:
    shared, alone = (list(video.chunks(each)) for each in (engine, replace(engine, ranks=None)))
    np.testing.assert_array_equal(np.concatenate(shared), np.concatenate(alone))
