"""A loaded model of random weights and small requests, shared by the tests of the service."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker.generation.engine import Engine
from worker.settings import Settings


@pytest.fixture(scope="session")
def engine(random_model: Path) -> Engine:
    """The model of random weights, loaded once for all workers of these tests."""
    return Engine.load(Settings(model_dir=str(random_model)))


@pytest.fixture(scope="session")
def make_input(
    make_portrait: Callable[..., bytes], make_speech: Callable[..., bytes]
) -> Callable[..., dict[str, Any]]:
    """The `input` of a small job; arguments replace its fields."""
    small = {
        "image": base64.b64encode(make_portrait()).decode(),
        "audio": base64.b64encode(make_speech(seconds=0.4)).decode(),
        "resolution": 256,
        "num_inference_steps": 1,
    }

    def make(**changes: Any) -> dict[str, Any]:
        return small | changes

    return make


@pytest.fixture(scope="session")
def smallest_input(
    make_portrait: Callable[..., bytes], make_speech: Callable[..., bytes]
) -> dict[str, Any]:
    """The `input` of a job for a worker that draws at once."""
    return {
        "image": base64.b64encode(make_portrait(64, 64)).decode(),
        "audio": base64.b64encode(make_speech(seconds=0.08)).decode(),
        "resolution": 256,
    }
