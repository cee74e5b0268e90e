"""How far a video leaves its portrait as it goes on: the face's likeness, and the colours.

Long videos of such models drift: the face becomes another one, colours fade or burn in. Both are
measured on a few frames, small ones, so that it costs next to nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image, ImageCms

Floats = NDArray[np.float64]

NUM_FRAMES = 24  # that are measured of a video
ENDS = 8  # of them one in so many is its start, as many are its end
COLOUR_SIDE = 96  # px of the picture that colours are taken from
FACE_SIDE = 48  # px across the face that is compared, and no more than the picture has
LEAST_FACE_SIDE = 12  # px; a smaller face shows nothing
UPPER_FACE = 0.65  # of the box's height, from the hairline down: without the mouth, which speaks
REACH = 0.12  # of the face's width, by which it may have moved
SCALES = (0.94, 1.0, 1.06)  # by which it may have come nearer

_TO_LAB = ImageCms.buildTransform(
    ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
)


@dataclass(frozen=True, slots=True)
class Likeness:
    """One frame beside the portrait."""

    # Correlation of the face above the mouth, at its best place: 1 is the portrait's, 0 nothing
    # alike; neither light nor contrast changes it. Of several faces the one least alike counts.
    # None: there is no face to compare.
    identity: float | None
    colour_mean: float  # distance of the mean colours in Lab, as Delta E 1976
    colour_spread: float  # distance of the colours' standard deviations in Lab


class DriftMeter:
    """Measures a video against its portrait as its frames pass.

    Args:
        portrait: RGB; a frame is of the same picture, squeezed to the video's size.
        face_boxes: x, y, width, height in the portrait's pixels, from the hairline to the chin.
        num_frames: of the video.
    """

    def __init__(
        self, portrait: Image.Image, face_boxes: Sequence[Sequence[float]], num_frames: int
    ) -> None:
        self.measured: list[Likeness] = []
        self._portrait = portrait
        self._face_boxes = face_boxes
        count = min(NUM_FRAMES, num_frames)
        self._due = np.linspace(0, num_frames - 1, count).round().astype(int).tolist()
        self._num_seen = 0

    def watch(self, chunks: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """The same frames, in chunks (F, H, W, 3), measured as they pass."""

        def seen(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
            self.see(frames)
            return frames

        return map(seen, chunks)  # keeps no chunk, as a loop would

    def see(self, frames: NDArray[np.uint8]) -> None:
        """Measures those of the next frames (F, H, W, 3) that are due."""
        while self._due and self._due[0] < self._num_seen + len(frames):
            self.measured.append(self._compare(frames[self._due.pop(0) - self._num_seen]))
        self._num_seen += len(frames)

    def summary(self) -> dict[str, Any] | None:
        """The values at the start, at the end and where they are worst; None: nothing was seen."""
        if not self.measured:
            return None
        identities = [each.identity for each in self.measured if each.identity is not None]
        return {
            "identity": _over_time(identities, min) if identities else None,
            "colour_mean": _over_time([each.colour_mean for each in self.measured], max),
            "colour_spread": _over_time([each.colour_spread for each in self.measured], max),
        }

    def _compare(self, frame: NDArray[np.uint8]) -> Likeness:
        picture = Image.fromarray(frame)
        reference = self._portrait.resize(picture.size)
        (mean, spread), (own_mean, own_spread) = map(_colours, (reference, picture))
        return Likeness(
            self._identity(reference, picture),
            float(np.linalg.norm(own_mean - mean)),
            float(np.linalg.norm(own_spread - spread)),
        )

    def _identity(self, reference: Image.Image, picture: Image.Image) -> float | None:
        found = [self._identity_of(box, reference, picture) for box in self._face_boxes]
        return min((each for each in found if each is not None), default=None)

    def _identity_of(
        self, box: Sequence[float], reference: Image.Image, picture: Image.Image
    ) -> float | None:
        across, down = (
            size / own for size, own in zip(reference.size, self._portrait.size, strict=True)
        )
        x, y, width, height = np.array(box) * [across, down, across, down]
        scale = min(FACE_SIDE / width, 1.0)
        left, right = max(round(x * scale), 0), round((x + width) * scale)
        top, bottom = max(round(y * scale), 0), round((y + UPPER_FACE * height) * scale)
        face = _grey(reference, scale)[top:bottom, left:right]
        if min(face.shape) < LEAST_FACE_SIDE or face.std() == 0:
            return None
        reach = round(REACH * face.shape[1])
        middle = np.array([top + bottom, left + right]) / 2  # row and column
        best = 0.0
        for nearer in SCALES:
            grey = np.pad(_grey(picture, scale * nearer), reach, mode="edge")
            corner = np.round(middle * nearer - np.array(face.shape) / 2).astype(int).clip(min=0)
            ends = corner + face.shape + 2 * reach
            around = grey[corner[0] : ends[0], corner[1] : ends[1]]
            if around.shape[0] >= face.shape[0] and around.shape[1] >= face.shape[1]:
                best = max(best, _best_correlation(around, face))
        return best


def _over_time(
    values: Sequence[float], worst: Callable[[Sequence[float]], float]
) -> dict[str, float]:
    count = max(len(values) // ENDS, 1)
    return {
        "start": round(float(np.median(values[:count])), 3),
        "end": round(float(np.median(values[-count:])), 3),
        "worst": round(worst(values), 3),
    }


def _colours(picture: Image.Image) -> tuple[Floats, Floats]:
    """Mean and standard deviation of L, a and b."""
    small = picture.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX)
    lab = np.array(ImageCms.applyTransform(small, _TO_LAB)).reshape(-1, 3)
    # Pillow has L as a share of 255 and the others as bytes with a sign
    values = np.concatenate([lab[:, :1] * (100 / 255), lab[:, 1:].astype(np.int8)], axis=1)
    return values.mean(0), values.std(0)


def _grey(picture: Image.Image, scale: float) -> Floats:
    width, height = (max(round(side * scale), 1) for side in picture.size)
    return np.array(picture.convert("L").resize((width, height), Image.Resampling.BOX), np.float64)


def _best_correlation(around: Floats, face: Floats) -> float:
    """Pearson's, of the face with the place in the picture where it is greatest."""
    places = sliding_window_view(around, face.shape)  # (rows, columns, h, w)
    centred = places - places.mean((2, 3), keepdims=True)
    template = face - face.mean()
    norms = np.sqrt(np.square(centred).sum((2, 3))) * np.linalg.norm(template)
    products = np.einsum("rchw,hw->rc", centred, template)
    return float((products / np.maximum(norms, 1e-9)).max())
