"""Steps that were done need not be done again: a state goes on to the same latents."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from worker.generation.conditioning import Conditioning
from worker.generation.denoising_state import DenoisingState
from worker.generation.options import DenoiseOptions
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.generation.voices import Voice
from worker.generation.watch import Watch

# Steps 2 and 3 read the cache of step 1, step 5 that of step 4.
OPTIONS = DenoiseOptions(num_inference_steps=7, computed_steps=[0, 1, 4, 6])


@pytest.fixture(scope="module")
def pipeline(toy_model: Path) -> HunyuanVideoAvatarPipeline:
    pipeline = HunyuanVideoAvatarPipeline.from_pretrained(toy_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def conditioning(pipeline: HunyuanVideoAvatarPipeline) -> Conditioning:
    """Of speech that is longer than a window: the latents are circular."""
    waveform = (np.sin(np.arange(7 * 16_000) / 20) / 2).astype(np.float32)
    return pipeline.encode(
        image=Image.new("RGB", (32, 32), (200, 120, 90)),
        voices=[Voice(waveform, (0, 0, 32, 32))],
        prompt="A person speaks.",
        height=32,
        width=32,
    )


Denoise = Callable[..., Tensor]


@pytest.fixture(scope="module")
def denoise(pipeline: HunyuanVideoAvatarPipeline, conditioning: Conditioning) -> Denoise:
    def denoise(seed: int, state: DenoisingState | None = None, **more: Any) -> Tensor:
        options = replace(OPTIONS, first_step=state.step if state else 0)
        generator = torch.Generator().manual_seed(seed)
        return pipeline.denoise(conditioning, options, generator, state=state, **more)

    return denoise


def test_every_state_goes_on_to_the_same_latents(denoise: Denoise, tmp_path: Path) -> None:
    states: list[DenoisingState] = []
    whole = denoise(1, watch=Watch(on_state=states.append))

    assert [state.step for state in states] == [1, 4, 6, 7]  # a computed step follows, or none
    for state in states:
        path = tmp_path / str(state.step)
        state.save(path, {"any": "fact"})
        read = DenoisingState.load(path.read_bytes(), state.step)
        seen: list[int] = []
        # another seed: what was drawn is in the state

        def on_step(step: int, _: int, seen: list[int] = seen) -> None:
            seen.append(step)

        again = denoise(2, read, watch=Watch(on_step=on_step))
        assert torch.equal(again, whole)
        assert seen == list(range(state.step + 1, 8))


def test_a_state_that_does_not_fit_is_refused(denoise: Denoise) -> None:
    states: list[DenoisingState] = []
    denoise(1, watch=Watch(on_state=states.append))
    with pytest.raises(ValueError, match="the state's latents"):
        denoise(1, replace(states[0], latents=states[0].latents[:, :, :33]))
    for step in (-1, 2, 8):
        with pytest.raises(ValueError, match="first_step"):
            denoise(1, replace(states[0], step=step))
