"""Whose face is whose: the boxes that a request names, or the faces that are found, for each voice.

Boxes are x, y, width, height in pixels of the upright portrait. Faces are counted from the left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from PIL import Image

from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.contract.request import JobInput
from avatar_client.contract.speakers import require_no_overlap
from worker.media.numbered_faces import numbered
from worker.shapes import Box, holds_centre

if TYPE_CHECKING:
    from worker.generation.engine import Engine

MIN_FACE_SHARE = 0.02  # of the image's short side: a smaller face has no latent of its own
CLOSER_LOOK = 2.0  # the part of the portrait that is looked at again, in boxes
# Of the smaller of two found boxes: less is a detector's looseness, and is shared between them.
MOST_SHARED = 0.5
MOST_TOLD = 6  # faces, in a message
UNSEEN = "no face was found in the image: the boxes of the speakers are taken as they are"


@dataclass(frozen=True, slots=True)
class ChosenFaces:
    """The face of each voice."""

    boxes: list[Box | None]  # None, for one voice alone: the largest face, or else the whole frame
    warnings: tuple[str, ...] = ()  # for the client


@dataclass(frozen=True, slots=True)
class ShownFaces:
    """All faces of a portrait, for a client who has to choose."""

    boxes: list[Box]
    thumbnail: str  # a JPEG as a `data:` URL, with their numbers

    @classmethod
    def of(cls, portrait: Image.Image, resolution: int, engine: "Engine") -> "ShownFaces":
        """Those that are found."""
        boxes = find(portrait, resolution, engine)
        return cls(boxes, numbered(portrait, boxes))


def find(portrait: Image.Image, resolution: int, engine: "Engine") -> list[Box]:
    """All faces from left to right, in boxes that do not overlap unless much of them does."""
    boxes = list(engine.find_faces(portrait, resolution))
    for first, second in combinations(range(len(boxes)), 2):
        boxes[first], boxes[second] = _apart(boxes[first], boxes[second])
    return boxes


def require_inside(params: JobInput, portrait: Image.Image) -> None:
    """Returns if each box that the request names lies in the portrait and is large enough.

    Raises:
        InvalidInputError: one does not, or is not.
    """
    for index, speaker in enumerate(params.voices):
        if speaker.face_box is None:
            continue
        field = params.field_of(index, "face_box")
        x, y, width, height = speaker.face_box
        if x + width > portrait.width or y + height > portrait.height:
            message = f"reaches over the image's {portrait.width} x {portrait.height} pixels"
            raise InvalidInputError(message, field=field)
        if min(width, height) < MIN_FACE_SHARE * min(portrait.size):
            message = f"must be at least {MIN_FACE_SHARE:.0%} of the image's short side"
            raise InvalidInputError(message, field=field)


def choose(params: JobInput, portrait: Image.Image, engine: "Engine") -> ChosenFaces:
    """The face of each voice.

    Raises:
        InvalidInputError: a face or a box that is not there, or is another speaker's; too few
            faces, or so many that nobody can tell which are meant. Says where faces were found.
    """
    require_inside(params, portrait)
    if params.speakers is None:
        return ChosenFaces([params.face_box])
    [first, *others] = params.speakers
    if not others and first.face is None and first.face_box is None:
        return ChosenFaces([None])
    found = find(portrait, params.resolution, engine)
    boxes = [_named(params, index, found) for index in range(len(params.speakers))]
    warnings = _require_faces_in(params, portrait, found, engine)
    if None in boxes:
        _fill_in(boxes, found)
    for (first_index, box), (index, other) in combinations(enumerate(boxes), 2):
        assert box is not None
        assert other is not None
        name = "face_box" if params.speakers[index].face_box is not None else "face"
        field = f"speakers.{index}.{name}"
        if box == other:
            message = f"is the face of speakers.{first_index}, too: {_told(found)}"
            raise InvalidInputError(message, field=field)
        require_no_overlap(box, other, first_index, field)
    return ChosenFaces(boxes, warnings)


def _named(params: JobInput, index: int, found: Sequence[Box]) -> Box | None:
    """The box that a speaker names in one way or the other; None: he names none."""
    speaker = params.voices[index]
    if speaker.face is None:
        return speaker.face_box
    place = {"left": 0, "right": len(found) - 1}.get(str(speaker.face), speaker.face)
    assert isinstance(place, int)
    if not 0 <= place < len(found):
        message = f"is not there: {_told(found)}; name another, or show it by face_box"
        raise InvalidInputError(message, field=f"speakers.{index}.face")
    return found[place]


def _require_faces_in(
    params: JobInput, portrait: Image.Image, found: Sequence[Box], engine: "Engine"
) -> tuple[str, ...]:
    """Returns if there is a face in each box that the request shows; what to tell the client.

    A small face may be found only where nothing else is looked at. In a picture of whose faces none
    is found at all, a drawing perhaps, the client knows better.

    Raises:
        InvalidInputError: there is none.
    """
    missing = []
    for index, speaker in enumerate(params.voices):
        box = speaker.face_box
        if box is not None and not any(holds_centre(box, face) for face in found):
            part = _around(box, portrait)
            closer = engine.find_faces(portrait.crop(part), params.resolution)
            seen = [(x + part[0], y + part[1], width, height) for x, y, width, height in closer]
            if not any(holds_centre(box, face) for face in seen):
                missing.append(index)
    if not missing:
        return ()
    if not found and len(missing) == sum(each.face_box is not None for each in params.voices):
        return (UNSEEN,)
    raise InvalidInputError(
        f"has no face in it: {_told(found)}", field=f"speakers.{missing[0]}.face_box"
    )


def _fill_in(boxes: list[Box | None], found: Sequence[Box]) -> None:
    """Gives the speakers who name no face those that are left, from left to right.

    Raises:
        InvalidInputError: there are more of them, or fewer.
    """
    named = [box for box in boxes if box is not None]
    left = [face for face in found if not any(holds_centre(box, face) for box in named)]
    without = [index for index, box in enumerate(boxes) if box is None]
    if len(without) > len(left):
        raise InvalidInputError(
            f"are {len(boxes)}, and {_told(found)}: leave out who has no face, or show it by "
            "face_box",
            field="speakers",
        )
    if len(without) < len(left):
        raise InvalidInputError(
            f"is needed, since {_told(found)}: name one of them, as 'left', 'right' or by index",
            field=f"speakers.{without[0]}.face",
        )
    for index, face in zip(without, left, strict=True):
        boxes[index] = face


def _told(found: Sequence[Box]) -> str:
    """What was found, for a client."""
    if not found:
        return "no face was found"
    places = ", ".join(
        f"{index} at [{', '.join(f'{value:.0f}' for value in box)}]"
        for index, box in enumerate(found[:MOST_TOLD])
    )
    number = "1 face was" if len(found) == 1 else f"{len(found)} faces were"
    return f"{number} found, from the left: {places}{', ...' if len(found) > MOST_TOLD else ''}"


def _around(box: Box, portrait: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part of the portrait around a box."""
    x, y, width, height = box
    across, down = width * (CLOSER_LOOK - 1) / 2, height * (CLOSER_LOOK - 1) / 2
    return (
        int(max(x - across, 0)),
        int(max(y - down, 0)),
        int(min(x + width + across, portrait.width)),
        int(min(y + height + down, portrait.height)),
    )


def _apart(box: Box, other: Box) -> tuple[Box, Box]:
    """Two found boxes, cut at the middle of what they share, across or down."""
    shared = [
        min(box[side] + box[side + 2], other[side] + other[side + 2]) - max(box[side], other[side])
        for side in (0, 1)
    ]
    side = 0 if shared[0] <= shared[1] else 1
    smaller = min(box[side + 2], other[side + 2])
    if min(shared) <= 0 or shared[side] > MOST_SHARED * smaller:
        return box, other
    return _cut(box, other, side, shared[side] / 2), _cut(other, box, side, shared[side] / 2)


def _cut(box: Box, other: Box, side: int, length: float) -> Box:
    """The box without so much of it at the end that lies next to the other."""
    cut = list(box)
    cut[side + 2] -= length
    if box[side] > other[side]:
        cut[side] += length
    x, y, width, height = cut
    return (x, y, width, height)
