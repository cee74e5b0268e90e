from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from worker.generation.denoiser import Step, denoising_steps
from worker.generation.options import DenoiseOptions


def steps_of(**options: Any) -> list[Step]:
    scheduler = FlowMatchEulerDiscreteScheduler()
    return denoising_steps(DenoiseOptions(**options), scheduler, torch.device("cpu"))


def test_only_a_computed_step_before_a_cached_one_writes_the_step_cache() -> None:
    steps = steps_of(num_inference_steps=6, computed_steps=[0, 1, 4])

    assert [step.reads_cache for step in steps] == [False, False, True, True, False, True]
    assert [step.writes_cache for step in steps] == [False, True, False, False, True, False]


def test_the_steps_together_go_from_noise_to_none() -> None:
    steps = steps_of(num_inference_steps=7)

    assert sum(step.sigma_change for step in steps) == pytest.approx(-1)
    assert steps[0].timestep.tolist() == [1000]


def test_the_prompt_guides_the_first_ten_steps() -> None:
    steps = steps_of(num_inference_steps=12)

    assert [step.is_prompt_guided for step in steps] == [True] * 10 + [False] * 2
