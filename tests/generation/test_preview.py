"""The look at a video in the making: which latents it draws, how often, and what it breaks."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from avatar_client.contract import preview
from avatar_client.contract.request import GenerationParams
from worker.generation.engine import Engine
from worker.generation.preview import FramePreview
from worker.generation.voices import Voice
from worker.generation.watch import Watch
from worker.model.latent_to_rgb import LatentToRGB
from worker.settings import Settings
from worker.small_jpeg import encoded

CHANNELS = 4


@pytest.fixture
def latent_to_rgb() -> LatentToRGB:
    generator = torch.Generator().manual_seed(3)
    colours = torch.randn(3, CHANNELS, 3, 3, generator=generator) / 10
    return LatentToRGB(colours.repeat_interleave(4, 0), torch.full((12,), 0.5))


def picture(data_url: str | None) -> np.ndarray:
    assert data_url is not None
    return np.array(Image.open(io.BytesIO(preview.read(data_url)))).astype(float)


def likeness(drawn: np.ndarray, latent_to_rgb: LatentToRGB, latents: torch.Tensor) -> float:
    """Correlation of a picture with what the map makes of latents (C, h, w)."""
    height, width, _ = drawn.shape
    small = drawn.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3))
    expected = latent_to_rgb(latents).permute(1, 2, 0).numpy()
    return float(np.corrcoef(small.ravel(), expected.ravel())[0, 1])


def smooth(seed: int) -> torch.Tensor:
    """Latents (C, 8, 12) that a JPEG keeps."""
    small = torch.randn(1, CHANNELS, 2, 3, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, size=(8, 12), mode="bilinear")[0]


@pytest.mark.parametrize("sigma", [1.0, 0.4, 0.01])
def test_the_picture_is_of_the_clean_latents_however_noisy_they_are(
    latent_to_rgb: LatentToRGB, sigma: float
) -> None:
    clean = torch.stack([smooth(1), smooth(2)], 1)[None]  # (1, C, 2, 8, 12)
    noise = torch.randn(clean.shape)
    noisy = (1 - sigma) * clean + sigma * noise
    watched = FramePreview(latent_to_rgb, frame=0)
    watched.see(noisy, noise - clean, sigma, frames=[35, 0])  # the window runs over the end

    drawn = picture(watched.data_url(0.1))

    assert drawn.shape == (64, 96, 3)
    assert likeness(drawn, latent_to_rgb, clean[0, :, 1]) > 0.95
    assert likeness(drawn, latent_to_rgb, clean[0, :, 0]) < 0.5


def test_there_is_one_about_every_tenth_of_the_way(latent_to_rgb: LatentToRGB) -> None:
    def count(num_steps: int, begins_at: int = 0) -> int:
        watched = FramePreview(latent_to_rgb, frame=0)
        pictures = []
        for step in range(begins_at + 1, num_steps + 1):
            watched.see(smooth(step)[None, :, None], torch.zeros(1, 1, 1, 1, 1), 0.0, [0])
            pictures.append(watched.data_url(step / num_steps))
        return len(set(pictures) - {None})

    assert [count(steps) for steps in (1, 4, 10, 50, 73)] == [1, 4, 10, 10, 10]
    assert count(50, begins_at=25) == 6


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_a_picture(latent_to_rgb: LatentToRGB) -> None:
    large = torch.ones(8192, 8192, device="cuda")
    window = smooth(1)[None, :, None].cuda()
    watched = FramePreview(latent_to_rgb, frame=0)
    watched.see(window, torch.zeros_like(window), 0.0, [0])
    torch.cuda.synchronize()
    for _ in range(100):
        large @ large
    assert watched.data_url(0.1) is None
    torch.cuda.synchronize()
    assert likeness(picture(watched.data_url(0.1)), latent_to_rgb, smooth(1)) > 0.95


def test_a_picture_that_cannot_be_drawn_costs_the_job_nothing(
    latent_to_rgb: LatentToRGB, caplog: pytest.LogCaptureFixture
) -> None:
    watched = FramePreview(latent_to_rgb, frame=0)
    window = torch.zeros(1, CHANNELS + 1, 1, 8, 12)  # of another model
    for share in (0.1, 0.2, 0.3):
        watched.see(window, window, share, [0])
        assert watched.data_url(share) is None
    assert caplog.text.count("no preview any more") == 1


def test_a_picture_of_noise_fits_into_a_progress_too() -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1216, 704), (256, 2560)):
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        assert len(preview.to_data_url(encoded(noise))) <= 60_000


def test_a_video_is_the_same_with_a_preview(random_model: Any) -> None:
    engine = Engine.load(Settings(model_dir=str(random_model)))
    params = GenerationParams(num_inference_steps=4, preset="draft")
    conditioning = engine.pipeline.encode(
        Image.new("RGB", (64, 64)),
        [Voice(np.zeros(16_000 * 6, np.float32), None)],  # 6 s: two windows on a ring
        prompt="",
        height=64,
        width=96,
    )
    watched = engine.preview(conditioning)
    assert watched is not None
    assert engine.latent_to_rgb is not None
    seen: list[str | None] = []

    def on_step(step: int, num_steps: int) -> None:
        seen.append(watched.data_url(step / num_steps))

    with_preview = engine.denoise(conditioning, params, 7, Watch(on_step=on_step, preview=watched))

    assert torch.equal(with_preview, engine.denoise(conditioning, params, 7))
    assert len({each for each in seen if each}) == 4
    assert picture(seen[-1]).shape == (conditioning.height, conditioning.width, 3)
    middle = conditioning.plan.kept_latents // 2
    likenesses = [  # of the last picture to the video's latents
        likeness(picture(seen[-1]), engine.latent_to_rgb, with_preview[0, :, frame])
        for frame in (middle, middle + 1)
    ]
    assert likenesses[0] > 0.9 > likenesses[1]
