"""Sizes before any tensor exists: pixels and latents, seconds and frames, windows and steps.

Imports no torch, so that a request can be checked and planned where there is no GPU. Video frames,
audio frames and latents are three clocks: a frame of audio belongs to each frame of video, and a
latent frame stands for four frames of video (the first one for the first alone).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from avatar_client.contract.presets import REFERENCE_SCHEDULE

SAMPLE_RATE_HZ = 16_000
AUDIO_STATES_HZ = 50  # states of the speech encoder, two a frame of video at 25 frames a second
FRAME_RATES = (25.0, 12.5)

SPATIAL_COMPRESSION = 8  # pixels a latent, in height and in width
TEMPORAL_COMPRESSION = 4  # frames a latent
PATCH = 2  # latents a token, in height and in width
SIZE_MULTIPLE = SPATIAL_COMPRESSION * PATCH
FITTED_MULTIPLE = 64  # px; the reference rounds its own sizes more coarsely than the model needs

WINDOW_LATENTS = 33
WINDOW_FRAMES = TEMPORAL_COMPRESSION * (WINDOW_LATENTS - 1) + 1  # 129
WINDOW_SHIFT = 10  # latents that the windows move by from one step to the next
PADDING_FRAMES = 5  # silence after speech that is longer than one window

LONG_SIDE = {704: 1216, 512: 768, 384: 576, 256: 384}  # px; other resolutions: 1.5 times as long


REFERENCE_COMPUTED_STEPS = (*range(15), 15, 20, 25, 30, 35, 40, *range(41, 50))
ComputedSteps = Literal["reference"] | Sequence[int] | None
Box = tuple[float, float, float, float]  # x, y, width, height in pixels


def holds_centre(box: Box, other: Box) -> bool:
    """Whether the middle of the other box lies in this one."""
    x, y, width, height = box
    left, top, across, down = other
    return 0 <= left + across / 2 - x <= width and 0 <= top + down / 2 - y <= height


class FrameSize(NamedTuple):
    """Pixels of one frame."""

    height: int
    width: int

    @property
    def latent(self) -> "FrameSize":
        """The same frame in latents."""
        return FrameSize(self.height // SPATIAL_COMPRESSION, self.width // SPATIAL_COMPRESSION)

    @property
    def tokens(self) -> int:
        """Tokens that one latent frame takes in the transformer."""
        return (self.height // SIZE_MULTIPLE) * (self.width // SIZE_MULTIPLE)


def fit_size(height: int, width: int, resolution: int) -> FrameSize:
    """The frame size for a picture: its short side near `resolution`, both multiples of 64.

    A picture whose long side would be too long keeps the area of `LONG_SIDE` instead, so 704 never
    costs more than about 704 x 1216. The aspect ratio is kept only as well as the multiples allow.

    Source: arXiv 2505.20156's published code, measured: its sizes for 42 pictures are in the tests.
    """
    scale = resolution / min(height, width)
    size = rounded_size(height * scale, width * scale)
    area = resolution * LONG_SIDE.get(resolution, int(1.5 * resolution))
    if size.height * size.width > area:
        scale = math.sqrt(area / (height * width))
        size = rounded_size(height * scale, width * scale)
    return size


def rounded_size(height: float, width: float) -> FrameSize:
    """The frame size next to that one, both sides multiples of 64."""
    multiples = (max(round(side / FITTED_MULTIPLE), 1) for side in (height, width))
    return FrameSize(*(multiple * FITTED_MULTIPLE for multiple in multiples))


def count_frames(num_samples: int, fps: float) -> int:
    """Whole frames of video that `num_samples` of 16 kHz audio last."""
    return int(num_samples * fps // SAMPLE_RATE_HZ)


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """Everything that the number of video frames decides.

    Up to 129 frames are one window of 33 latents that stays where it is. More are sampled as
    circular latents: each step covers them with windows of 33, and shifts those by 10 for the next.

    Raises:
        ValueError: no frames.
    """

    num_frames: int  # frames of speech, and of the video that is kept

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError("the audio is shorter than one frame of video")

    @property
    def padded_audio_frames(self) -> int:
        """Frames of audio with the silence that fills up the last window."""
        if self.num_frames <= WINDOW_FRAMES:
            return WINDOW_FRAMES
        return self.num_frames + PADDING_FRAMES

    @property
    def noise_latents(self) -> int:
        """Latent frames of noise that are drawn."""
        return (self.padded_audio_frames // 128 + 1) * 32 + 1

    @property
    def single_window(self) -> bool:
        """Whether one window holds the whole video."""
        return self.padded_audio_frames == WINDOW_FRAMES

    @property
    def sampled_latents(self) -> int:
        """Latent frames that are sampled: the circular latents, or the one window."""
        return WINDOW_LATENTS if self.single_window else self.noise_latents

    @property
    def shift(self) -> int:
        """Latents that the windows move by from one step to the next."""
        return 0 if self.single_window else WINDOW_SHIFT

    @property
    def num_windows(self) -> int:
        """Windows a step, and so forward passes a step and CFG branch."""
        return -(-self.sampled_latents // WINDOW_LATENTS)

    @property
    def kept_latents(self) -> int:
        """Latent frames that are decoded; the surplus of the circular ones is dropped."""
        return self.padded_audio_frames // TEMPORAL_COMPRESSION + 1

    @property
    def decoded_frames(self) -> int:
        """Frames that the kept latents stand for; `num_frames` of them are kept."""
        return TEMPORAL_COMPRESSION * (self.kept_latents - 1) + 1


def uses_cfg(guidance_scale: float) -> bool:
    """Whether there is an unconditional CFG branch to go away from: a second pass each step."""
    return guidance_scale > 1


def window_tokens(size: FrameSize) -> int:
    """Video tokens of one forward pass: a window and the reference frame."""
    return (WINDOW_LATENTS + 1) * size.tokens


def resolve_computed_steps(
    computed_steps: ComputedSteps, num_inference_steps: int
) -> frozenset[int]:
    """The computed steps of a run: by our rule (None), the reference's fixed list, or as given.

    The fixed list was made for 50 steps; with fewer it ends early, with more the rest is cached.

    Raises:
        ValueError: no steps; step 0 is not among them, or one is not a step of the run.
    """
    if num_inference_steps < 1:
        raise ValueError("num_inference_steps must be at least 1")
    if computed_steps is None:
        return frozenset(REFERENCE_SCHEDULE.computed_steps(num_inference_steps))
    if computed_steps == "reference":
        return frozenset(step for step in REFERENCE_COMPUTED_STEPS if step < num_inference_steps)
    steps = frozenset(int(step) for step in computed_steps)
    if 0 not in steps:
        raise ValueError("computed_steps must hold 0: the first step has no cache to read")
    if not steps <= set(range(num_inference_steps)):
        raise ValueError(f"computed_steps must lie in 0..{num_inference_steps - 1}")
    return steps
