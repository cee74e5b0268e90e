"""How long a job will take, before it runs: arithmetic on sizes, no GPU.

The work of a forward pass is counted from the tokens; how fast this worker gets through it is
learned from the jobs that it has finished.
"""

from dataclasses import dataclass

from avatar_client.contract.presets import StepCacheSchedule, computed_step_indices
from worker.shapes import FrameSize, VideoPlan, window_tokens

TYPICAL_TEXT_TOKENS = 400  # valid length of the prompt, with the portrait's 576 tokens cut in
WIDTH = 3072
BLOCKS = 60
BLOCK_PARAMETERS = 12.46e9
CACHED_SHARE = 1 / BLOCKS  # a cached step runs one block of 60

# Sustained bfloat16 rate of this worker, in FLOP/s: a computed step with both CFG branches at
# 704 x 768, 9.75e15, in 16.9 s on an H200 (benchmarks/generation.py). The H100 has the same
# arithmetic.
RATES = {"H200": 5.7e14, "H100": 5.7e14}


# Five times what a grainy portrait takes in the encoder's settings (worker/media/video.py); pure
# noise takes 0.69. Sound is small beside it.
VIDEO_BYTES_PER_PIXEL = 0.125


def room_for_video(num_frames: int, num_pixels: float) -> int:
    """Bytes of disk that are kept for a video of so many frames of that size."""
    return int(VIDEO_BYTES_PER_PIXEL * num_frames * num_pixels) + 2**20


@dataclass(frozen=True, slots=True)
class JobPlan:
    """How much one job generates, and in which steps: what its cost depends on."""

    size: FrameSize
    video: VideoPlan
    num_inference_steps: int
    step_cache_schedule: StepCacheSchedule

    @property
    def num_computed_steps(self) -> int:
        """Steps that run the whole transformer."""
        return len(self._computed_steps())

    @property
    def flops(self) -> float:
        """Floating-point operations of the denoising loop, both CFG branches."""
        tokens = window_tokens(self.size) + TYPICAL_TEXT_TOKENS
        forward = 2 * BLOCK_PARAMETERS / 2 * tokens + 4 * BLOCKS * WIDTH * tokens**2
        return 2 * forward * self.video.num_windows * self._cost(self.num_inference_steps)

    @property
    def video_room_bytes(self) -> int:
        """Bytes of disk that are kept for the video."""
        return room_for_video(self.video.num_frames, self.size.height * self.size.width)

    def share_done(self, step: int) -> float:
        """How much of the denoising loop's work is done after `step` steps, 0 to 1."""
        return self._cost(step) / self._cost(self.num_inference_steps)

    def _cost(self, step: int) -> float:
        """The first `step` steps, in computed steps."""
        computed = sum(index < step for index in self._computed_steps())
        return computed + CACHED_SHARE * (step - computed)

    def _computed_steps(self) -> tuple[int, ...]:
        return computed_step_indices(self.num_inference_steps, self.step_cache_schedule)


@dataclass(slots=True)
class ThroughputEstimator:
    """This worker's throughput: the last finished job's, or the table's for its GPU before that."""

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
