"""A drawn world of talking faces: who they are, how they move, and their pictures.

Everything is a soft-edged shape given by its distance function, so that a shift of a tenth of a
pixel shows. A head has units of its own: x to the right, y down, the face about 1 wide and 1.25
high to each side. Shape letters: F frames, H and W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.speech import MouthTrack
from worker.shapes import Box

FPS = 25

SKINS = (
    (0.98, 0.86, 0.76),
    (0.95, 0.78, 0.66),
    (0.89, 0.69, 0.54),
    (0.78, 0.57, 0.42),
    (0.62, 0.43, 0.30),
    (0.47, 0.31, 0.22),
)
HAIRS = (
    (0.10, 0.08, 0.08),
    (0.23, 0.15, 0.11),
    (0.40, 0.25, 0.15),
    (0.62, 0.42, 0.22),
    (0.86, 0.72, 0.45),
    (0.58, 0.23, 0.12),
    (0.66, 0.66, 0.68),
)
EYES = ((0.28, 0.45, 0.38), (0.30, 0.45, 0.65), (0.35, 0.22, 0.12), (0.20, 0.14, 0.10))
HAIR_STYLES = ("bald", "short", "bob", "long", "bun")
RED_LIP = (0.70, 0.22, 0.25)  # by what part of it lips differ from the skin around them
MOUTH_INSIDE = (0.16, 0.05, 0.06)

# At motion_pose 25 the head sways by at most this much to each side.
SWAY_SHARE = 0.004  # of the picture's short side
SWAY_RADIANS = 0.007
HEAD_BOUNDS = (
    -1.5,
    1.5,
    -2.3,
    2.7,
)  # left, right, top, bottom of a head with its hair, as it sways
LIP_FRAMES = 5  # over which the lips' movements are smoothed
BLINK = (0.6, 0.15, 0.0, 0.0, 0.0, 0.1, 0.45, 0.8)  # how far the eyes are open, frame by frame
# People blink every few seconds, and where they pause rather than where they speak: how likely a
# blink begins in a frame, once the one before is some frames past.
PAUSE_OPENING = 0.15  # of the mouth, below which it pauses
REST_FRAMES = 30
BLINK_CHANCE_IN_PAUSE = 0.06
BLINK_CHANCE_IN_SPEECH = 0.006
LONG_GAP, LONGEST_GAP = 85, 120  # frames: then it becomes likely, and certain


class Colour(NamedTuple):
    """Red, green and blue in [0, 1]."""

    red: float
    green: float
    blue: float


@dataclass(frozen=True, kw_only=True)
class Face:
    """A person in a picture. Positions and sizes in shares of the picture's short side."""

    centre: tuple[float, float]  # x, y from the picture's middle
    size: float  # half the face's width
    tall: float  # the face's height by its width
    jaw: float  # how much narrower it gets downwards
    skin: Colour
    hair: Colour
    hair_style: str
    fringe: tuple[float, float, float]  # height, tilt and bend of the hair's lower edge
    eye: Colour
    eye_place: tuple[float, float]  # half the distance, height
    eye_size: tuple[float, float]
    brow_place: float  # above the eye
    brow_thick: float
    brow_bend: float
    nose: float
    mouth_place: float
    mouth_width: float
    lip_thick: float
    lip: Colour
    glasses: bool
    cheeks: float
    shade: float  # light from one side
    shirt: Colour
    shoulders: float
    background: tuple[Colour, Colour]
    background_bend: float
    spots: tuple[tuple[float, float, float, float], ...]  # x, y, radius, brightness

    def box(self, height: int, width: int) -> Box:
        """The face's box (x, y, width, height) in a picture of these pixels."""
        short = min(height, width)
        half = self.size * short
        x = width / 2 + self.centre[0] * short
        y = height / 2 + self.centre[1] * short
        return (x - half, y - half * 1.05, 2 * half, 2 * half * 1.15)


def random_face(rng: np.random.Generator) -> Face:
    """A person who has not been before."""

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def near(colour: Sequence[float], spread: float) -> Colour:
        mixed = np.clip(np.asarray(colour) + rng.normal(0, spread, 3), 0.04, 0.98)
        return Colour(*(float(part) for part in mixed))

    skin = near(SKINS[rng.integers(len(SKINS))], 0.02)
    red_lip = np.asarray(skin) * 0.55 + np.asarray(RED_LIP) * 0.45
    light = between(0.35, 0.95)
    ground = near((light, light, light), 0.12)
    size = between(0.19, 0.29)
    return Face(
        centre=(between(-0.08, 0.08), between(-0.10, 0.02)),
        size=size,
        tall=between(1.15, 1.32),
        jaw=between(0.05, 0.22),
        skin=skin,
        hair=near(HAIRS[rng.integers(len(HAIRS))], 0.025),
        hair_style=str(rng.choice(HAIR_STYLES, p=(0.08, 0.32, 0.25, 0.2, 0.15))),
        fringe=(between(-0.78, -0.5), between(-0.35, 0.35), between(-0.1, 0.45)),
        eye=near(EYES[rng.integers(len(EYES))], 0.03),
        eye_place=(between(0.36, 0.46), between(-0.22, -0.10)),
        eye_size=(between(0.15, 0.20), between(0.095, 0.135)),
        brow_place=between(0.22, 0.30),
        brow_thick=between(0.03, 0.06),
        brow_bend=between(0.3, 1.2),
        nose=between(0.8, 1.2),
        mouth_place=between(0.58, 0.70),
        mouth_width=between(0.30, 0.42),
        lip_thick=between(0.05, 0.085),
        lip=near(red_lip.tolist(), 0.03),
        glasses=bool(rng.random() < 0.18),
        cheeks=between(0, 0.25),
        shade=between(-0.12, 0.12),
        shirt=near((between(0.1, 0.9), between(0.1, 0.9), between(0.1, 0.9)), 0.02),
        shoulders=between(1.7, 2.3),
        background=(ground, near(tuple(part * between(0.7, 1.1) for part in ground), 0.04)),
        background_bend=between(-1, 1),
        spots=tuple(
            (between(-0.8, 0.8), between(-0.6, 0.6), between(0.1, 0.4), between(-0.12, 0.12))
            for _ in range(int(rng.integers(0, 4)))
        ),
    )


@dataclass(frozen=True)
class Motion:
    """What a face does, frame by frame; each (F,) float32."""

    x: np.ndarray  # of the head, in shares of the picture's short side
    y: np.ndarray
    tilt: np.ndarray  # radians
    eyes: np.ndarray  # 1 open, 0 closed
    brows: np.ndarray  # up, in the head's units
    opening: np.ndarray  # of the mouth, 0 to 1
    width: np.ndarray  # of the mouth, -1 round to 1 spread

    def __getitem__(self, frames: slice) -> "Motion":
        return Motion(*(getattr(self, name)[frames] for name in self.__dataclass_fields__))


REST = Motion(*(np.zeros(1, np.float32) for _ in range(7)))
REST = replace(REST, eyes=np.ones(1, np.float32))


def speaking_motion(
    rng: np.random.Generator, mouth: MouthTrack, pose: float = 25, expression: float = 30
) -> Motion:
    """Speech with blinks and a swaying head: what the sound decides, and what chance decides."""
    seconds = np.arange(len(mouth.opening)) / FPS
    sway = [_sway(rng, seconds) * pose / 25 for _ in range(3)]
    # lips and jaw have mass: they follow in about a tenth of a second to each side
    opening, width = (_smooth(track, LIP_FRAMES) for track in mouth)
    stress = _smooth(mouth.opening, 9)
    return Motion(
        x=sway[0] * SWAY_SHARE,
        y=sway[1] * SWAY_SHARE * 0.6,
        tilt=sway[2] * SWAY_RADIANS,
        eyes=_blinks(rng, mouth.opening),
        brows=stress * np.float32(0.06 * expression / 30),
        opening=opening,
        width=width,
    )


def _sway(rng: np.random.Generator, seconds: np.ndarray) -> np.ndarray:
    slow, quick = rng.uniform(0.15, 0.3), rng.uniform(0.35, 0.6)
    phases = rng.uniform(0, 2 * math.pi, 2)
    waves = 0.65 * np.sin(2 * math.pi * slow * seconds + phases[0])
    waves += 0.35 * np.sin(2 * math.pi * quick * seconds + phases[1])
    return waves.astype(np.float32)


def _blinks(rng: np.random.Generator, opening: np.ndarray) -> np.ndarray:
    """How far the eyes are open: they blink at moments that chance and the pauses decide."""
    num_frames = len(opening)
    eyes = np.ones(num_frames + len(BLINK), np.float32)
    draws = rng.random(num_frames)
    last = -int(rng.integers(LONGEST_GAP))  # when the eyes blinked before the video
    for frame in range(num_frames):
        if draws[frame] < _blink_chance(frame - last, float(opening[frame])):
            eyes[frame : frame + len(BLINK)] = BLINK
            last = frame
    return eyes[:num_frames]


def _blink_chance(frames_since_last: int, opening: float) -> float:
    if frames_since_last < REST_FRAMES:
        return 0.0
    if frames_since_last > LONG_GAP:
        return (frames_since_last - LONG_GAP) / (LONGEST_GAP - LONG_GAP)
    return BLINK_CHANCE_IN_PAUSE if opening < PAUSE_OPENING else BLINK_CHANCE_IN_SPEECH


def _smooth(track: np.ndarray, length: int) -> np.ndarray:
    kernel = np.hanning(length + 2)[1:-1]
    padded = np.pad(track, length // 2, mode="edge")
    smoothed: np.ndarray = np.convolve(padded, kernel / kernel.sum(), mode="valid")
    return smoothed.astype(np.float32)


def portrait(face: Face, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The person at rest, mouth closed and eyes open: (3, H, W) in [0, 1]."""
    return render(face, REST, height, width, device)[0]


def render(
    face: Face, motion: Motion, height: int, width: int, device: torch.device | None = None
) -> Tensor:
    """The frames (F, 3, H, W) float32 in [0, 1], drawn on the device."""
    return render_all([face], [motion], height, width, device)


def render_all(
    faces: Sequence[Face],
    motions: Sequence[Motion],
    height: int,
    width: int,
    device: torch.device | None = None,
) -> Tensor:
    """Several people in front of the first one's background: (F, 3, H, W) float32 in [0, 1]."""
    short = min(height, width)
    num_frames = len(motions[0].x)
    rows = (torch.arange(height, device=device) + 0.5 - height / 2) / short
    columns = (torch.arange(width, device=device) + 0.5 - width / 2) / short

    def canvas(face: Face, colours: Tensor) -> _Canvas:
        """In the units of the head at rest."""
        x = (columns[None, None, :] - face.centre[0]) / face.size
        y = (rows[None, :, None] - face.centre[1]) / face.size
        x, y = torch.broadcast_tensors(x, y)
        return _Canvas(colours, x, y, 1 / (face.size * short))

    still = _background(faces[0], rows, columns)
    for face in faces:
        _draw_body(canvas(face, still), face)
    colours = still.expand(-1, num_frames, -1, -1).clone()
    for face, motion in zip(faces, motions, strict=True):
        _draw_head(_moved(canvas(face, colours), face, motion), face, motion)
    return colours.transpose(0, 1).clamp(0, 1)


def _moved(canvas: "_Canvas", face: Face, motion: Motion) -> "_Canvas":
    """The part of it where the head is, in the units of the head as it moves."""
    part = canvas.part(*HEAD_BOUNDS)
    x = part.x - _tracks(motion.x, part.x) / face.size
    y = part.y - _tracks(motion.y, part.y) / face.size
    tilt = _tracks(motion.tilt, part.x)
    # around the neck
    turned_x, turned_y = x - tilt * (y - 1.2), y + tilt * x
    return _Canvas(part.colours, turned_x, turned_y, part.pixel)


def _tracks(values: np.ndarray, like: Tensor) -> Tensor:  # (F,) → (F, 1, 1)
    """One value a frame, for all of its pixels."""
    return torch.from_numpy(values).to(like.device)[:, None, None]


class _Canvas:
    """Frames to paint on, (3, F, H, W), and where their pixels lie in the head's units."""

    def __init__(self, colours: Tensor, x: Tensor, y: Tensor, pixel: float) -> None:
        self.colours = colours
        self.x = x  # (F, H, W), as is y
        self.y = y
        self.pixel = pixel

    def part(self, left: float, right: float, top: float, bottom: float) -> "_Canvas":
        """The pixels that are within the bounds in some frame; painting there paints here."""
        x, y = self.x.amax(dim=(0, 1)), self.y.amax(dim=(0, 2))
        low_x, low_y = self.x.amin(dim=(0, 1)), self.y.amin(dim=(0, 2))
        columns = _stretch((x > left) & (low_x < right))
        rows = _stretch((y > top) & (low_y < bottom))
        at = (slice(None), rows, columns)
        return _Canvas(self.colours[:, *at], self.x[at], self.y[at], self.pixel)

    def cover(self, distance: Tensor, opacity: float = 1) -> Tensor:
        """How much of each pixel lies inside (distance below 0)."""
        edge = 1.3 * self.pixel
        return (0.5 - distance / edge).clamp_(0, 1) * opacity

    def paint(self, alpha: Tensor, colour: tuple[float, float, float] | Tensor) -> None:
        """Lays a colour, or three planes of it, over the pixels, as far as alpha (F, H, W) says."""
        for plane, value in zip(self.colours, colour, strict=True):
            plane += alpha * (value - plane)


def _stretch(wanted: Tensor) -> slice:
    """The smallest slice with all that is wanted; of nothing, an empty one."""
    places = wanted.nonzero()
    return slice(int(places.min()), int(places.max()) + 1) if len(places) else slice(0, 0)


def _ellipse(x: Tensor, y: Tensor, half_width: float, half_height: float | Tensor) -> Tensor:
    """About the distance to an ellipse around the origin; negative inside."""
    a, b = x / half_width, y / half_height
    length = (a * a + b * b).sqrt()
    slope = ((a / half_width) ** 2 + (b / half_height) ** 2).sqrt()
    return (length - 1) * length / slope.clamp(min=1e-4)


def _round_box(x: Tensor, y: Tensor, half: tuple[float, float], radius: float) -> Tensor:
    a, b = x.abs() - half[0] + radius, y.abs() - half[1] + radius
    outside = (a.clamp(min=0) ** 2 + b.clamp(min=0) ** 2).sqrt()
    return outside + torch.maximum(a, b).clamp(max=0) - radius


def _glow(x: Tensor, y: Tensor, radius: float) -> Tensor:
    return (-(x * x + y * y) / (radius * radius)).exp()


def _background(face: Face, rows: Tensor, columns: Tensor) -> Tensor:
    x, y = columns[None, None, :], rows[None, :, None]
    far = (0.5 + y * 0.7 + x * 0.5 * face.background_bend).clamp(0, 1)
    first, second = (
        torch.tensor(colour, device=rows.device)[:, None, None, None] for colour in face.background
    )
    colours = torch.lerp(first, second, far)
    for spot_x, spot_y, radius, light in face.spots:
        colours = colours + light * _glow(x - spot_x, y - spot_y, radius)
    return colours


def _darker(colour: tuple[float, float, float], factor: float) -> tuple[float, float, float]:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def _draw_body(canvas: _Canvas, face: Face) -> None:
    x, bottom = canvas.x, canvas.y - face.tall
    canvas.paint(canvas.cover(_round_box(x, bottom - 1.95, (face.shoulders, 1.6), 0.9)), face.shirt)
    neck = canvas.cover(_round_box(x, bottom + 0.1, (0.42, 0.75), 0.3))
    canvas.paint(neck, _darker(face.skin, 0.86))


def _draw_head(canvas: _Canvas, face: Face, motion: Motion) -> None:
    x, y = canvas.x, canvas.y
    opening, width, eyes, brows = (
        _tracks(track, x) for track in (motion.opening, motion.width, motion.eyes, motion.brows)
    )
    if face.hair_style in ("bob", "long"):
        length = 0.75 if face.hair_style == "bob" else 1.25
        back = _round_box(x, y - length + 0.75, (1.16, length + 0.6), 0.75)
        canvas.paint(canvas.cover(back), _darker(face.hair, 0.8))
    if face.hair_style == "bun":
        canvas.paint(canvas.cover(_ellipse(x, y + face.tall + 0.25, 0.42, 0.36)), face.hair)

    for side in (-1, 1):
        ear = canvas.cover(_ellipse(x - side * 0.98, y - 0.02, 0.13, 0.22))
        canvas.paint(ear, _darker(face.skin, 0.9))

    jaw_x = x * (1 + face.jaw * (y / face.tall).clamp(min=0) ** 2)
    drop = 1 + 0.025 * opening * (y > 0)
    head = canvas.cover(_ellipse(jaw_x, y / drop, 0.97, face.tall))
    shade = 1 + face.shade * x - 0.10 * (y / face.tall).clamp(min=0) ** 2
    blush = face.cheeks * (_glow(x - 0.55, y - 0.28, 0.28) + _glow(x + 0.55, y - 0.28, 0.28))
    red = (0.9, 0.45, 0.4)
    canvas.paint(
        head,
        torch.stack(
            [part * shade + blush * (r - part) for part, r in zip(face.skin, red, strict=True)]
        ),
    )
    _draw_hair(canvas, face)
    _draw_nose(canvas.part(-0.35, 0.35, -0.3, 0.5), face)
    away, height = face.eye_place
    for side in (-1, 1):
        middle = side * away
        part = canvas.part(middle - 0.3, middle + 0.3, height - 0.6, height + 0.25)
        eye_x, eye_y = part.x * side - away, part.y - height
        _draw_eye(part, face, eye_x, eye_y, eyes, side)
        _draw_brow(part, face, eye_x, eye_y + face.brow_place + brows)
    if face.glasses:
        _draw_glasses(canvas.part(-1, 1, height - 0.3, height + 0.35), face)
    half = face.mouth_width * 1.3
    place = face.mouth_place
    _draw_mouth(canvas.part(-half, half, place - 0.35, place + 0.5), face, opening, width)


def _draw_hair(canvas: _Canvas, face: Face) -> None:
    x, y = canvas.x, canvas.y
    if face.hair_style == "bald":
        return
    height, tilt, bend = face.fringe
    cap = _ellipse(x, y + 0.12, 1.08, face.tall + 0.06)
    edge = y - (height + tilt * x * 0.5 + bend * x * x)
    canvas.paint(canvas.cover(torch.maximum(cap, edge)), face.hair)


def _draw_nose(canvas: _Canvas, face: Face) -> None:
    x, y = canvas.x, canvas.y
    tip = y - 0.26 * face.nose
    arc = (x.abs() ** 2 * 4 - 0.04) * -1
    line = (tip - arc).abs() - 0.022
    canvas.paint(canvas.cover(torch.maximum(line, x.abs() - 0.13), 0.8), _darker(face.skin, 0.68))
    canvas.paint(0.18 * _glow(x - 0.1, y - 0.05, 0.16), _darker(face.skin, 0.7))


def _draw_eye(canvas: _Canvas, face: Face, x: Tensor, y: Tensor, eyes: Tensor, side: int) -> None:
    half_width, half_height = face.eye_size
    inside = _ellipse(x, y, half_width, (half_height * eyes).clamp(min=0.008))
    white = canvas.cover(inside)
    canvas.paint(white, (0.96, 0.96, 0.95))
    iris = half_height * 0.78
    canvas.paint(white * canvas.cover(_ellipse(x, y, iris, iris)), face.eye)
    canvas.paint(white * canvas.cover(_ellipse(x, y, iris * 0.5, iris * 0.5)), (0.05, 0.05, 0.06))
    spark = _ellipse(x - side * iris * 0.3, y + iris * 0.35, iris * 0.25, iris * 0.25)
    canvas.paint(white * canvas.cover(spark, 0.9), (1.0, 1.0, 1.0))
    # the upper lid; of a closed eye the line that is left
    lid = torch.maximum(inside.abs() - 0.02, torch.minimum(y, eyes - 0.3))
    canvas.paint(canvas.cover(lid), _darker(face.skin, 0.35))


def _draw_brow(canvas: _Canvas, face: Face, x: Tensor, y: Tensor) -> None:
    line = (y - x * x * face.brow_bend).abs() - face.brow_thick * (1 - 0.5 * (x + 0.2).clamp(0, 1))
    brow = torch.maximum(line, x.abs() - face.eye_size[0] * 1.25)
    canvas.paint(canvas.cover(brow), _darker(face.hair, 0.8))


def _draw_glasses(canvas: _Canvas, face: Face) -> None:
    x, y = canvas.x, canvas.y
    away, height = face.eye_place
    lens = _round_box(x.abs() - away, y - height - 0.02, (away - 0.07, 0.24), 0.12)
    bridge = torch.maximum((y - height + 0.04).abs() - 0.01, x.abs() - 0.09)
    frame = torch.minimum(lens.abs() - 0.022, bridge)
    canvas.paint(canvas.cover(frame), (0.13, 0.12, 0.14))


def _draw_mouth(canvas: _Canvas, face: Face, opening: Tensor, width: Tensor) -> None:
    x, y = canvas.x, canvas.y - face.mouth_place
    half_width = face.mouth_width * (1 + 0.22 * width * opening.clamp(max=0.5) * 2)
    inner_width = half_width * 0.86
    gap = 0.22 * opening  # half the height of the opening
    middle = 0.35 * gap  # the lower jaw opens, more than the upper lip
    y = y - middle
    # the lips bend up a little at their ends
    bent = y + 0.10 * (x / half_width) ** 2 * face.lip_thick * 4
    lips = _ellipse_of(x, bent, half_width, gap + face.lip_thick)
    canvas.paint(canvas.cover(lips), face.lip)
    line = torch.maximum(bent.abs() - 0.012, x.abs() - inner_width)
    canvas.paint(canvas.cover(line, 0.6) * (1 - opening * 4).clamp(0, 1), _darker(face.lip, 0.6))

    hole = _ellipse_of(x, bent, inner_width, gap.clamp(min=0.004))
    inside = canvas.cover(hole) * (opening * 8).clamp(0, 1)
    canvas.paint(inside, MOUTH_INSIDE)
    teeth = bent + gap - 0.085 * (0.6 + 0.4 * width)  # below the upper lip
    shown = inside * canvas.cover(teeth) * (opening * 3 - 0.4).clamp(0, 1)
    canvas.paint(shown, (0.93, 0.92, 0.88))
    tongue = _ellipse_of(x, bent - gap * 0.8, inner_width * 0.55, (gap * 0.35).clamp(min=0.004))
    canvas.paint(inside * canvas.cover(tongue, 0.8), (0.62, 0.25, 0.27))


def _ellipse_of(x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    a, b = x / half_width, y / half_height
    length = (a * a + b * b).sqrt()
    slope = ((a / half_width) ** 2 + (b / half_height) ** 2).sqrt()
    return (length - 1) * length / slope.clamp(min=1e-4)
