import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avatar_client.contract.presets import PRESETS, REFERENCE_SCHEDULE, LogSNRSchedule
from tests.support.golden_weights import GOLDENS
from worker.shapes import (
    REFERENCE_COMPUTED_STEPS,
    FrameSize,
    VideoPlan,
    count_frames,
    fit_size,
    resolve_computed_steps,
    window_tokens,
)

RESIZED = json.loads((GOLDENS / "image.json").read_text())["resize"]["rows"]


@pytest.mark.parametrize("row", RESIZED, ids=lambda row: "-".join(map(str, row)))
def test_a_picture_gets_the_size_that_the_reference_gives_it(row: list[int]) -> None:
    width, height, resolution, new_width, new_height = row
    assert fit_size(height, width, resolution) == FrameSize(new_height, new_width)


def test_even_a_strip_of_a_picture_gets_a_size() -> None:
    assert fit_size(height=10, width=5000, resolution=256) == FrameSize(height=64, width=7040)


@pytest.mark.parametrize(
    ("seconds", "padded", "noise", "windows", "kept", "decoded"),
    [
        (1.0, 129, 65, 1, 33, 129),
        (5.16, 129, 65, 1, 33, 129),
        (5.2, 135, 65, 2, 34, 133),
        (12.0, 305, 97, 3, 77, 305),
        (15.99, 404, 129, 4, 102, 405),
    ],
)
def test_the_length_of_the_speech_decides_the_reference_s_numbers(
    seconds: float, padded: int, noise: int, windows: int, kept: int, decoded: int
) -> None:
    plan = VideoPlan(count_frames(round(seconds * 16_000), fps=25))
    assert plan.padded_audio_frames == padded
    assert plan.noise_latents == noise
    assert plan.num_windows == windows
    assert plan.kept_latents == kept
    assert plan.decoded_frames == decoded


@given(num_frames=st.integers(1, 20_000))
def test_a_plan_of_any_length_holds_together(num_frames: Any) -> None:
    plan = VideoPlan(num_frames)
    assert plan.kept_latents <= plan.sampled_latents <= plan.noise_latents
    assert plan.decoded_frames >= num_frames
    assert 33 * (plan.num_windows - 1) < plan.sampled_latents <= 33 * plan.num_windows
    assert (plan.shift == 0) == plan.single_window == (plan.num_windows == 1)


def test_half_the_frame_rate_is_half_the_frames() -> None:
    assert count_frames(160_000, fps=25) == 250
    assert count_frames(160_000, fps=12.5) == 125


def test_no_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter than one frame"):
        VideoPlan(count_frames(639, fps=25))


def test_full_size_has_the_published_number_of_tokens() -> None:
    assert FrameSize(704, 1216).tokens == 3344
    assert FrameSize(704, 1216).latent == (88, 152)
    assert window_tokens(FrameSize(704, 1216)) == 113_696


def test_fifty_steps_are_cached_as_in_the_reference() -> None:
    assert REFERENCE_SCHEDULE.computed_steps(50) == REFERENCE_COMPUTED_STEPS
    assert len(REFERENCE_COMPUTED_STEPS) == 30


@given(num_steps=st.integers(1, 200))
@pytest.mark.parametrize("preset", PRESETS)
def test_every_schedule_starts_and_ends_in_full(preset: str, num_steps: Any) -> None:
    steps = PRESETS[preset].step_cache_schedule.computed_steps(num_steps)
    assert sorted(set(steps)) == list(steps)
    assert steps[0] == 0
    assert steps[-1] == num_steps - 1
    cheaper = [each.step_cache_schedule.computed_steps(num_steps) for each in PRESETS.values()]
    assert [len(each) for each in cheaper] == sorted((len(each) for each in cheaper), reverse=True)


@given(num_steps=st.integers(10, 200), shift=st.floats(0.1, 20))
def test_steps_even_in_the_signal_to_noise_ratio_are_so_for_every_shift(
    num_steps: Any, shift: float
) -> None:
    def log_snr(step: int) -> float:
        left = 1 - step / num_steps
        sigma = shift * left / (1 + (shift - 1) * left)
        return math.log((1 - sigma) / sigma)

    steps = LogSNRSchedule(24).computed_steps(num_steps)
    assert 3 <= len(steps) <= max(math.ceil(0.24 * num_steps), 4)
    inner = list(pairwise(steps[1:-1]))
    reached = min((log_snr(later) - log_snr(step) for step, later in inner), default=0)
    # none could have come a step earlier without being nearer than another two are
    assert all(log_snr(later - 1) - log_snr(step) < reached + 1e-9 for step, later in inner)


@given(num_steps=st.integers(1, 200))
def test_the_references_schedule_never_rests_for_long(num_steps: Any) -> None:
    steps = REFERENCE_SCHEDULE.computed_steps(num_steps)
    assert max((later - step for step, later in pairwise(steps)), default=1) <= 5
    assert set(range(-(-3 * num_steps // 10))) <= set(steps)


def test_the_reference_s_fixed_list_ends_early_with_fewer_steps() -> None:
    assert resolve_computed_steps("reference", 20) == frozenset(range(16))
    assert resolve_computed_steps("reference", 16) == frozenset(range(16))
    assert 59 not in resolve_computed_steps("reference", 60)


def test_computed_steps_can_be_given() -> None:
    assert resolve_computed_steps([0, 3], 5) == {0, 3}


@pytest.mark.parametrize("computed_steps", [[1, 2], [], [0, 5]])
def test_computed_steps_that_cannot_run_are_refused(computed_steps: list[Any]) -> None:
    with pytest.raises(ValueError, match="computed_steps must"):
        resolve_computed_steps(computed_steps, 5)
