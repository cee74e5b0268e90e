"""The presets: which denoising steps are computed whole, and in which arithmetic."""

from typing import NamedTuple


class StepCacheSchedule(NamedTuple):
    """The steps that run the whole transformer.

    The others are cached: they reuse its tokens of an earlier step and run the last block.
    """

    first_percent: int  # of the steps, rounded up
    every: int  # so many between
    last_percent: int  # rounded up


REFERENCE_SCHEDULE = StepCacheSchedule(30, 5, 18)  # the reference's own for 50 steps


class Preset(NamedTuple):
    """How the denoising steps are computed. docs/performance.md says what each costs."""

    step_cache_schedule: StepCacheSchedule
    float8: bool  # the transformer's linear layers in 8 bits, where the GPU can
    # How far a layer's attention may be off (relative norm, measured) for seeing fewer keys, where
    # the GPU can; None: it sees all.
    attention_tolerance: float | None = None


PRESETS = {
    "quality": Preset(REFERENCE_SCHEDULE, float8=False),
    "balanced": Preset(StepCacheSchedule(14, 5, 8), float8=True),
    "draft": Preset(StepCacheSchedule(6, 7, 4), float8=True, attention_tolerance=0.1),
}


def computed_step_indices(
    num_inference_steps: int, schedule: StepCacheSchedule = REFERENCE_SCHEDULE
) -> tuple[int, ...]:
    """The steps that run the whole transformer, in order; the first one always does."""
    head = max(-(-schedule.first_percent * num_inference_steps // 100), 1)
    last = num_inference_steps - -(-schedule.last_percent * num_inference_steps // 100)
    between = range(head, last, schedule.every)
    return (*range(head), *between, *range(max(head, last), num_inference_steps))
