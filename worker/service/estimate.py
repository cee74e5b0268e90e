"""How long a job will take and what that costs, before it runs: arithmetic on sizes, no GPU.

The work of a forward pass is counted from the tokens; how fast this worker gets through it is
learned from the jobs that it has finished.
"""

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from avatar_client.contract.presets import PRESETS
from worker.shapes import FrameSize, VideoPlan, window_tokens

TYPICAL_TEXT_TOKENS = 400  # valid length of the prompt, with the portrait's 576 tokens cut in
WIDTH = 3072
BLOCKS = 60
BLOCK_PARAMETERS = 12.46e9
CACHED_SHARE = 1 / BLOCKS  # a cached step runs one block of 60


class Throughput(NamedTuple):
    """How fast a worker is."""

    flops_per_second: float  # of denoising
    seconds_per_pixel: float  # of the finished video, all that is not denoising


# One GPU: a computed step with both CFG branches at 704 x 768, 9.75e15, in 14.8 s on an H200, and
# in 13.4 s in 8 bits; 129 frames decoded in 5.6 s (benchmarks/generation.py). The H100 has the same
# arithmetic. What `draft` leaves out of its attention depends on the model: none is counted.
IN_16_BITS = Throughput(6.6e14, 8.0e-8)
IN_8_BITS = Throughput(7.3e14, 8.0e-8)
KNOWN_GPUS = ("H200", "H100")

SHORTEST_SECONDS = 1e-3  # that a stage's time is told in

# Five times what a grainy portrait takes in the encoder's settings (worker/media/video.py); pure
# noise takes 0.69. Sound is small beside it.
VIDEO_BYTES_PER_PIXEL = 0.125
RAW_BYTES_PER_PIXEL = 1.5  # yuv420p as it goes into the encoder


def room_for_video(num_frames: int, num_pixels: float, rate: float = 1.0) -> int:
    """Bytes of disk that are kept for a video of so many frames of that size.

    `rate` is that of its quality, in that of the default.
    """
    bytes_per_pixel = min(VIDEO_BYTES_PER_PIXEL * rate, RAW_BYTES_PER_PIXEL)
    return int(bytes_per_pixel * num_frames * num_pixels) + 2**20


@dataclass(frozen=True, slots=True)
class JobPlan:
    """How much one job generates, and in which steps: what its cost depends on."""

    size: FrameSize  # of the frames that the model makes
    video: VideoPlan
    preset: str
    num_inference_steps: int
    num_cfg_branches: int
    video_size: FrameSize | None = None  # of the finished frames; None: as the model makes them

    @property
    def shown_size(self) -> FrameSize:
        """Pixels of a frame of the video."""
        return self.video_size or self.size

    @property
    def num_computed_steps(self) -> int:
        """Steps that run the whole transformer."""
        return len(self._computed_steps())

    @property
    def flops(self) -> float:
        """Floating-point operations of the denoising loop, all CFG branches."""
        tokens = window_tokens(self.size) + TYPICAL_TEXT_TOKENS
        forward = 2 * BLOCK_PARAMETERS / 2 * tokens + 4 * BLOCKS * WIDTH * tokens**2
        passes = self.num_cfg_branches * self.video.num_windows
        return passes * forward * self._cost(self.num_inference_steps)

    @property
    def num_pixels(self) -> int:
        """Pixels of all frames."""
        return self.video.num_frames * self.size.height * self.size.width

    def video_room_bytes(self, rate: float = 1.0) -> int:
        """Bytes of disk that are kept for the video; see `room_for_video`."""
        return room_for_video(self.video.num_frames, prod(self.shown_size), rate)

    def share_done(self, step: int) -> float:
        """How much of the denoising loop's work is done after `step` steps, 0 to 1."""
        return self._cost(step) / self._cost(self.num_inference_steps)

    def _cost(self, step: int) -> float:
        """The first `step` steps, in computed steps."""
        computed = sum(index < step for index in self._computed_steps())
        return computed + CACHED_SHARE * (step - computed)

    def _computed_steps(self) -> tuple[int, ...]:
        return PRESETS[self.preset].step_cache_schedule.computed_steps(self.num_inference_steps)


@dataclass(slots=True)
class ThroughputEstimator:
    """This worker's throughput by preset: as its last job had it, or else the table's."""

    gpu_name: str | None = None
    num_gpus: int = 1
    _measured: dict[str, Throughput] = field(default_factory=dict)  # by preset, the latest last

    def record(self, plan: JobPlan, denoise_seconds: float, total_seconds: float) -> None:
        """Learns from a finished job."""
        denoise_seconds = max(denoise_seconds, SHORTEST_SECONDS)
        self._measured.pop(plan.preset, None)
        self._measured[plan.preset] = Throughput(
            plan.flops / denoise_seconds, (total_seconds - denoise_seconds) / plan.num_pixels
        )

    def estimate_seconds(self, plan: JobPlan) -> float | None:
        """Seconds for the whole job; None if neither this worker nor the table knows."""
        known = self._measured.get(plan.preset) or self._of_the_table(plan.preset)
        if known is None and self._measured:
            known = list(self._measured.values())[-1]
        if known is None:
            return None
        denoise_seconds = plan.flops / known.flops_per_second
        return round(denoise_seconds + plan.num_pixels * known.seconds_per_pixel, 1)

    def _of_the_table(self, preset: str) -> Throughput | None:
        if not any(name in (self.gpu_name or "") for name in KNOWN_GPUS):
            return None
        alone = IN_8_BITS if PRESETS[preset].float8 else IN_16_BITS
        return alone._replace(flops_per_second=self.num_gpus * alone.flops_per_second)


def cost_usd(seconds: float | None, price_per_second: float | None) -> float | None:
    """What so much of the worker's time costs; None if the time or the price is not known."""
    if seconds is None or price_per_second is None:
        return None
    return round(seconds * price_per_second, 6)
