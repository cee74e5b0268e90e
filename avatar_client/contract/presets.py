"""The presets: which denoising steps are computed whole, and in which arithmetic."""

import itertools
import math
from typing import NamedTuple, Protocol


class StepCacheSchedule(Protocol):
    """Which steps run the whole transformer.

    The others are cached: they reuse its tokens of an earlier step and run the last block.
    """

    def computed_steps(self, num_inference_steps: int) -> tuple[int, ...]:
        """The steps that do, in order; the first and the last one are among them."""


class ShareSchedule(NamedTuple):
    """All steps at the start and at the end, every so many between, as in the reference."""

    first_percent: int  # of the steps, rounded up
    every: int  # so many between
    last_percent: int  # rounded up

    def computed_steps(self, num_inference_steps: int) -> tuple[int, ...]:
        head = max(-(-self.first_percent * num_inference_steps // 100), 1)
        last = num_inference_steps - -(-self.last_percent * num_inference_steps // 100)
        between = range(head, last, self.every)
        return (*range(head), *between, *range(max(head, last), num_inference_steps))


class LogSNRSchedule(NamedTuple):
    """A share of the steps, even in the logarithm of the latents' signal-to-noise ratio.

    It is log((1 - t) / t) at the share t of the steps that is left, and `flow_shift` adds a
    constant: the steps are the same for every shift, and known before a job.
    docs/decisions/presets.md says how they were chosen.
    """

    percent: int  # of the steps at most, rounded up; but four at least

    def computed_steps(self, num_inference_steps: int) -> tuple[int, ...]:
        most = max(-(-self.percent * num_inference_steps // 100), 4)
        spacings = (hundredth / 100 for hundredth in itertools.count())
        even = (_even_steps(num_inference_steps, spacing) for spacing in spacings)
        return next(steps for steps in even if len(steps) <= most)


def _even_steps(num_inference_steps: int, spacing: float) -> tuple[int, ...]:
    """The first step, those that are at least so far from the one before, and the last."""
    steps, reached = [0], -math.inf
    for step in range(1, num_inference_steps):
        log_snr = math.log(step / (num_inference_steps - step))
        if log_snr - reached >= spacing or step == num_inference_steps - 1:
            steps.append(step)
            reached = log_snr
    return tuple(steps)


REFERENCE_SCHEDULE = ShareSchedule(30, 5, 18)  # the reference's own for 50 steps


class Preset(NamedTuple):
    """How the denoising steps are computed. docs/performance.md says what each costs."""

    step_cache_schedule: StepCacheSchedule
    float8: bool  # the transformer's linear layers in 8 bits, where the GPU can
    # How far a layer's attention may be off (relative norm, measured) for seeing fewer keys, where
    # the GPU can; None: it sees all.
    attention_tolerance: float | None = None


PRESETS = {
    "quality": Preset(REFERENCE_SCHEDULE, float8=False),
    "balanced": Preset(LogSNRSchedule(34), float8=True),
    "draft": Preset(LogSNRSchedule(24), float8=True, attention_tolerance=0.1),
}
