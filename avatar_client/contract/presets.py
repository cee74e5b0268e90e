"""The presets: which denoising steps run in full, and in which arithmetic."""

from typing import NamedTuple


class Schedule(NamedTuple):
    """Which steps run the whole transformer; the others reuse its tokens and run the last block."""

    first_percent: int  # of the steps, rounded up
    every: int  # so many between
    last_percent: int  # rounded up


REFERENCE_SCHEDULE = Schedule(30, 5, 18)  # the reference's own for 50 steps


class Preset(NamedTuple):
    """How the denoising steps are computed. docs/performance.md says what each costs."""

    schedule: Schedule
    float8: bool  # the transformer's linear layers in 8 bits, where the GPU can


PRESETS = {
    "quality": Preset(REFERENCE_SCHEDULE, float8=False),
    "balanced": Preset(Schedule(14, 5, 8), float8=True),
    "draft": Preset(Schedule(6, 7, 4), float8=True),
}


def full_step_indices(
    num_inference_steps: int, schedule: Schedule = REFERENCE_SCHEDULE
) -> tuple[int, ...]:
    """The steps that run the whole transformer, in order; the first one always does."""
    head = max(-(-schedule.first_percent * num_inference_steps // 100), 1)
    tail = num_inference_steps - -(-schedule.last_percent * num_inference_steps // 100)
    between = range(head, tail, schedule.every)
    return (*range(head), *between, *range(max(head, tail), num_inference_steps))
