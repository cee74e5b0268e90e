"""The model on its device, before the first job."""

import logging

import numpy as np
import pytest
from PIL import Image

from worker.engine import Engine
from worker.schema import GenerationParams
from worker.settings import Settings


@pytest.fixture
def engine(random_model) -> Engine:
    return Engine.load(Settings(model_dir=str(random_model)))


def video(engine: Engine) -> np.ndarray:
    params = GenerationParams(resolution=256, num_inference_steps=2)
    conditioning = engine.encode(Image.new("RGB", (64, 64)), np.zeros(1280, np.float32), params)
    latents = engine.denoise(conditioning, params, 7, lambda step, num_steps: None)
    return np.concatenate(list(engine.frames(conditioning, latents)))


def test_a_warm_up_goes_the_whole_way_and_changes_no_job(engine, caplog):
    before = video(engine)
    with caplog.at_level(logging.INFO, "worker.engine"):
        engine.warm_up()
    assert "warmed up in" in caplog.text
    assert np.array_equal(video(engine), before)


@pytest.mark.parametrize("part", ["audio_encoder", "transformer", "vae"])
def test_a_warm_up_that_fails_says_why(engine, part):
    for parameter in getattr(engine.pipeline, part).parameters():
        parameter.data = parameter.data.flatten()[:1]
    with pytest.raises(RuntimeError, match=r"^the warm-up failed: (?!None).+"):
        engine.warm_up()


@pytest.mark.gpu
def test_on_a_gpu_the_model_is_warm_when_it_is_loaded(random_model, caplog):
    with caplog.at_level(logging.INFO, "worker.engine"):
        Engine.load(Settings(model_dir=str(random_model)))
    assert "warmed up in" in caplog.text
