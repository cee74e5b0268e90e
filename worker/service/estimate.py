"""How long a job will take, before it runs: arithmetic on sizes, no GPU.

The work of a forward pass is counted from the tokens; how fast this worker gets through it is
learned from the jobs that it has finished.
"""

from dataclasses import dataclass

from avatar_client.contract.presets import StepCacheSchedule, computed_step_indices
from worker.shapes import FrameSize, VideoPlan, window_tokens

TEXT_TOKENS = 400  # typical valid length of the prompt, with the portrait's 576 tokens cut in
WIDTH = 3072
BLOCKS = 60
BLOCK_PARAMETERS = 12.46e9
CACHED_SHARE = 1 / BLOCKS  # a cached step runs one block of 60

# Sustained bfloat16 rate of this worker, in FLOP/s: a computed step with both CFG branches at
# 704 x 768, 9.75e15, in 16.9 s on an H200 (benchmarks/generation.py). The H100 has the same
# arithmetic.
RATES = {"H200": 5.7e14, "H100": 5.7e14}


def job_flops(
    plan: VideoPlan, size: FrameSize, num_inference_steps: int, schedule: StepCacheSchedule
) -> float:
    """Floating-point operations of the denoising loop, both guidance branches."""
    tokens = window_tokens(size) + TEXT_TOKENS
    forward = 2 * BLOCK_PARAMETERS / 2 * tokens + 4 * BLOCKS * WIDTH * tokens**2
    steps = _cost(num_inference_steps, num_inference_steps, schedule)
    return 2 * forward * plan.num_windows * steps


def work_share(step: int, num_inference_steps: int, schedule: StepCacheSchedule) -> float:
    """How much of the denoising loop's work is done after `step` steps, 0 to 1."""
    whole = _cost(num_inference_steps, num_inference_steps, schedule)
    return _cost(step, num_inference_steps, schedule) / whole


def _cost(step: int, num_inference_steps: int, schedule: StepCacheSchedule) -> float:
    """The first `step` steps, in computed steps."""
    full = sum(index < step for index in computed_step_indices(num_inference_steps, schedule))
    return full + CACHED_SHARE * (step - full)


@dataclass(slots=True)
class Speedometer:
    """This worker's rate: the last finished job's, or the table's for its GPU before that."""

    gpu_name: str | None = None
    num_gpus: int = 1
    _measured: float | None = None  # FLOP/s

    def record(self, flops: float, seconds: float) -> None:
        """Learns from a finished denoising loop."""
        self._measured = flops / seconds

    def estimate_seconds(self, flops: float) -> float | None:
        """Seconds for that much work; None if neither this worker nor the table knows."""
        known = (rate for name, rate in RATES.items() if name in (self.gpu_name or ""))
        rate = self._measured or self.num_gpus * next(known, 0.0)
        return round(flops / rate, 1) if rate else None
