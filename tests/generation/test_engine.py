"""The model on its device, before the first job."""

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image

from avatar_client.contract.job_errors import InputTooLargeError
from avatar_client.contract.request import GenerationParams
from worker.generation.engine import Engine, rank_devices
from worker.generation.voices import Voice
from worker.settings import Settings


@pytest.fixture
def engine(random_model: Path) -> Engine:
    return Engine.load(Settings(model_dir=str(random_model)))


def silence(num_samples: int) -> list[Voice]:
    return [Voice(np.zeros(num_samples, np.float32), None)]


def video(engine: Engine) -> np.ndarray:
    params = GenerationParams(resolution=256, num_inference_steps=2)
    conditioning = engine.encode(Image.new("RGB", (64, 64)), silence(1280), params)
    latents = engine.denoise(conditioning, params, 7)
    return np.concatenate(list(engine.decode_frames(conditioning, latents)))


def test_a_warm_up_goes_the_whole_way_and_changes_no_job(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    before = video(engine)
    with caplog.at_level(logging.INFO, "worker.generation.engine"):
        engine.warm_up()
    assert "warmed up in" in caplog.text
    assert np.array_equal(video(engine), before)


@pytest.mark.parametrize("part", ["audio_encoder", "transformer", "vae"])
def test_a_warm_up_that_fails_says_why(engine: Engine, part: str) -> None:
    for parameter in getattr(engine.pipeline, part).parameters():
        parameter.data = parameter.data.flatten()[:1]
    with pytest.raises(RuntimeError, match=r"^the warm-up failed: (?!None).+"):
        engine.warm_up()


@pytest.mark.gpu
def test_on_a_gpu_the_model_is_warm_when_it_is_loaded(
    random_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "worker.generation.engine"):
        Engine.load(Settings(model_dir=str(random_model)))
    assert "warmed up in" in caplog.text


@pytest.mark.parametrize(("num_gpus", "num_ranks"), [(0, 1), (1, 1), (2, 2), (3, 2), (9, 8)])
def test_both_cfg_branches_get_equally_many_ranks(num_gpus: int, num_ranks: int) -> None:
    settings = Settings(avatar_model="demo", num_gpus=num_gpus)
    assert len(rank_devices(settings)) == num_ranks


@pytest.mark.slow
def test_on_a_cpu_the_memory_of_one_tensor_serves_the_next(random_model: Path) -> None:
    """Where it goes back to the kernel, each of its pages is a fault again."""
    program = (
        "import resource, sys, torch\n"
        "from worker.generation.engine import Engine\n"
        "from worker.settings import Settings\n"
        "torch.set_num_threads(1)\n"
        "Engine.load(Settings(model_dir=sys.argv[1]))\n"
        "for _ in range(4):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(2**24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    command = [sys.executable, "-c", program, str(random_model)]
    faults = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(faults) < 100  # of 16,384 pages


def test_speech_whose_tokens_the_host_cannot_hold_is_refused_before_the_first_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = GenerationParams(resolution=256, num_inference_steps=2)
    conditioning = engine.encode(
        Image.new("RGB", (64, 64)), silence(6 * 16_000), params
    )  # two windows
    # 2 x 2 windows of 34 x 256 tokens of 32 numbers, and their text
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * 2**20))
    with pytest.raises(InputTooLargeError, match="lower resolution") as caught:
        engine.denoise(conditioning, params, 7)
    assert caught.value.field == "max_seconds"
