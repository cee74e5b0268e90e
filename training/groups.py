"""Several drawn people in one picture: who stands where, and who speaks when."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from training import world
from training.speech import FRAME_SAMPLES, SpeechCorpus, faded
from training.world import FPS, Face, Motion
from worker.shapes import Box, FrameSize

HALF_WIDTH = 1.22  # of a head with its hair and some room, by half the face's width
FACE_SIZES = (0.15, 0.24)  # least and most, of the picture's short side
NARROWEST_PANEL = 160  # px
PANEL_SHARE = 0.3  # of the groups, each person in a panel of their own, as in a video call

SPEAKING_SHARE = 0.75  # of the people; the others are silent
IN_TURN_SHARE = 0.55  # of the scenes, one after the other; else at any time, also at once
TURN_SECONDS = (0.8, 4.0)
GAP_SECONDS = 0.6  # at most, between turns


@dataclass(frozen=True)
class Group:
    """People in one picture, from left to right.

    In panels each has a background of their own; else all stand before the first one's.
    """

    faces: tuple[Face, ...]
    in_panels: bool = False

    def boxes(self, size: FrameSize) -> list[Box]:
        """The boxes of their faces (x, y, width, height) in a picture of this size."""
        return [face.box(*size) for face in self.faces]

    def portrait(self, size: FrameSize, device: torch.device | None = None) -> Tensor:
        """All at rest, (3, H, W) in [0, 1]."""
        return self.render([world.REST] * len(self.faces), size, device)[0]

    def render(
        self, motions: Sequence[Motion], size: FrameSize, device: torch.device | None = None
    ) -> Tensor:
        """The frames (F, 3, H, W) float32 in [0, 1], drawn on the device."""
        if not self.in_panels:
            return world.render_all(self.faces, motions, *size, device)
        width = size.width // len(self.faces)
        panels = []
        for place, (face, motion) in enumerate(zip(self.faces, motions, strict=True)):
            left = place * width
            right = size.width if place == len(self.faces) - 1 else left + width
            panel = FrameSize(size.height, right - left)
            alone = _moved(face, size, panel, (size.width - left - right) / 2)
            panels.append(world.render(alone, motion, *panel, device))
        return torch.cat(panels, dim=3)


def random_group(rng: np.random.Generator, count: int, size: FrameSize) -> Group:
    """So many people who have not been before; one alone is `world.random_face`'s."""
    faces = [world.random_face(rng) for _ in range(count)]
    if count == 1:
        return Group(tuple(faces))
    width = size.width // count
    if width >= NARROWEST_PANEL and rng.random() < PANEL_SHARE:
        panel = FrameSize(size.height, width)
        placed = [
            _moved(face, panel, size, (place + 0.5) * width - size.width / 2)
            for place, face in enumerate(faces)
        ]
        return Group(tuple(placed), in_panels=True)
    cell = width / min(size)  # as are all lengths below: shares of the short side
    largest = min(FACE_SIZES[1], cell / (2 * HALF_WIDTH))
    standing = []
    for place, face in enumerate(faces):
        half = float(rng.uniform(min(FACE_SIZES[0], 0.85 * largest), largest))
        room = cell / 2 - HALF_WIDTH * half
        x = (place + 0.5 - count / 2) * cell + float(rng.uniform(-room, room))
        standing.append(replace(face, size=half, centre=(x, float(rng.uniform(-0.12, 0.06)))))
    return Group(tuple(standing))


def _moved(face: Face, old: FrameSize, new: FrameSize, shift: float) -> Face:
    """The face, equally large in pixels, in another picture.

    Args:
        shift: of the face to the right, in pixels from the picture's middle.
    """
    x, y = (part * min(old) for part in face.centre)
    place = ((x + shift) / min(new), y / min(new))
    return replace(face, size=face.size * min(old) / min(new), centre=place)


def conversation(
    rng: np.random.Generator, corpus: SpeechCorpus, num_frames: int, count: int
) -> list[np.ndarray]:
    """What each of so many people says: (640 * num_frames,) float32, zeros where one is silent."""
    if count == 1:
        return [corpus.clip(rng, num_frames)]
    num_samples = FRAME_SAMPLES * num_frames
    speaking = [bool(rng.random() < SPEAKING_SHARE) for _ in range(count)]
    clips = [
        corpus.clip(rng, num_frames) if speaks else np.zeros(num_samples, np.float32)
        for speaks in speaking
    ]
    if rng.random() >= IN_TURN_SHARE:
        return clips
    heard = [np.zeros_like(clip) for clip in clips]
    start = 0
    while start < num_samples:
        speaker = int(rng.integers(count))
        end = start + round(float(rng.uniform(*TURN_SECONDS)) * FPS) * FRAME_SAMPLES
        heard[speaker][start:end] = faded(clips[speaker][start:end])
        start = end + int(rng.uniform(0, GAP_SECONDS) * FPS) * FRAME_SAMPLES
    return heard
