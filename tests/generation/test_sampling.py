from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.support.golden_weights import load_case
from worker.generation.sampling import (
    add_circular,
    circular_indices,
    draw_noise,
    gather_circular,
    noise_levels,
    window_audio,
    window_starts,
)
from worker.shapes import VideoPlan

DESCRIBED, TENSORS = load_case("scheduler")
THREE_WINDOWS = VideoPlan(300)


@pytest.fixture
def scheduler() -> Any:
    return FlowMatchEulerDiscreteScheduler()


@pytest.mark.parametrize("num_steps", DESCRIBED["tables"])
def test_sigmas_and_timesteps_are_the_reference_s_to_the_bit(
    num_steps: str, scheduler: Any
) -> None:
    sigmas, timesteps = noise_levels(scheduler, int(num_steps), DESCRIBED["shift"])
    assert torch.equal(sigmas, TENSORS[f"sigmas{num_steps}"])
    assert torch.equal(timesteps, TENSORS[f"timesteps{num_steps}"])


def test_the_scheduler_given_is_left_as_it_was(scheduler: Any) -> None:
    before = dict(scheduler.config), scheduler.sigmas.clone()
    noise_levels(scheduler, 8, 5.0)
    assert dict(scheduler.config) == before[0]
    assert torch.equal(scheduler.sigmas, before[1])


def test_an_euler_run_is_the_reference_s_to_the_bit(scheduler: Any) -> None:
    euler = DESCRIBED["euler"]
    sigmas, _ = noise_levels(scheduler, euler["steps"], DESCRIBED["shift"])
    latents = TENSORS[euler["x0"]]
    for step, velocity in enumerate(TENSORS[euler["velocity"]]):
        latents = latents + velocity * (sigmas[step + 1] - sigmas[step]).item()
    assert torch.equal(latents, TENSORS[euler["final"]])


def test_the_windows_of_every_step_cover_the_circular_latents() -> None:
    for step in range(8):
        seen = set()
        for start in window_starts(THREE_WINDOWS, step):
            seen |= set(circular_indices(start, 33, THREE_WINDOWS.sampled_latents))
        assert seen == set(range(97))


def test_the_windows_move_by_ten_latents_a_step() -> None:
    assert window_starts(THREE_WINDOWS, 0) == [0, 33, 66]
    assert window_starts(THREE_WINDOWS, 1) == [-10, 23, 56]
    assert window_starts(THREE_WINDOWS, 4) == [-7, 26, 59]  # 40 = 33 + 7


def test_a_single_window_stays_where_it_is() -> None:
    assert [window_starts(VideoPlan(75), step) for step in range(5)] == [[0]] * 5


def test_a_window_runs_over_the_end_of_circular_latents() -> None:
    circular = torch.arange(6)
    assert gather_circular(circular, 0, -2, 4).tolist() == [4, 5, 0, 1]
    assert circular_indices(-2, 4, 6) == [4, 5, 0, 1]
    add_circular(circular, 0, 5, torch.tensor([10, 100]))
    assert circular.tolist() == [100, 1, 2, 3, 4, 15]


def test_a_window_has_the_audio_of_its_own_frames() -> None:
    plan = VideoPlan(135)
    audio = torch.arange(plan.num_frames).float().view(1, -1, 1, 1, 1)
    audio_frames = window_audio(audio + 1, -10, plan.sampled_latents).flatten()
    assert len(audio_frames) == 129
    assert audio_frames[:40].any().item() is False  # the silent end
    assert audio_frames[40:].tolist() == list(range(1, 90))
    last_frames = window_audio(audio + 1, 30, plan.sampled_latents).flatten()
    assert last_frames.tolist() == [*range(121, 136), *[0] * 114]


def test_noise_repeats_with_its_generator_and_leaves_the_global_one_alone() -> None:
    state = torch.get_rng_state()
    noise = draw_noise((1, 2, 3), torch.Generator().manual_seed(5), torch.device("cpu"))
    expected = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(noise, expected)
    assert torch.equal(torch.get_rng_state(), state)
