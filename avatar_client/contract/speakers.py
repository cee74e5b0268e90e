"""Who speaks in a video, whose face is whose, and when each of them begins."""

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema

from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.contract.media_source import Media
from avatar_client.contract.schema import Finite, Frozen

MAX_SPEAKERS = 4
MAX_NAME_CHARACTERS = 60
MAX_PAUSE_SECONDS = 5.0  # in which nobody speaks; a longer one is a recording's own
MAX_SHARED_PIXELS = 1.0  # of two boxes: what rounding makes

Order = Literal["together", "in_turn"]
Box = tuple[float, float, float, float]  # x, y, width, height in pixels


def _with_an_area(box: Box) -> Box:
    if min(box) < 0 or min(box[2:]) < 1:
        raise ValueError("must be [x, y, width, height] in pixels of the image")
    return box


FaceBox = Annotated[
    tuple[Finite, Finite, Finite, Finite], Field(strict=False), AfterValidator(_with_an_area)
]


def _face(value: Any) -> str | int | None:
    """A face by its place, as any tool writes it; None: it was left open."""
    text = (value.strip().lower() or None) if isinstance(value, str) else value
    if text is None:
        return None
    if text in ("left", "right"):
        return str(text)
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 4:
        return int(text)
    if isinstance(text, float) and text.is_integer():
        text = int(text)
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    raise ValueError("must be 'left', 'right' or the face's index from the left: 0, 1, ...")


FACE_SCHEMA = {"type": ["string", "integer"], "pattern": "^(left|right|[0-9]{1,3})$"}
Face = Annotated[str | int | None, PlainValidator(_face), WithJsonSchema(FACE_SCHEMA)]


def _stripped(value: Any) -> Any:
    return (value.strip() or None) if isinstance(value, str) else value


def _printable(name: str | None) -> str | None:
    if name is not None and not name.isprintable():
        raise ValueError("must be a name of printable characters")
    return name


Name = Annotated[
    Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)] | None,
    BeforeValidator(_stripped),
    AfterValidator(_printable),
]


class Speaker(Frozen):
    """One voice and its face."""

    audio: Media = Field(description="The recording, as `audio` takes it.")
    face: Face = Field(
        None,
        description="Whose face speaks: `left`, `right` or its index from the left, 0 being the "
        "first. Empty, and no `face_box`: speakers are from left to right if there are as many "
        "faces; one alone is the largest.",
    )
    face_box: FaceBox | None = Field(
        None,
        description="Or its box: x, y, width, height in pixels of the upright image. There must be "
        "a face in it, and boxes must not overlap.",
    )
    start_seconds: Annotated[Finite, Field(ge=0)] = Field(
        0.0,
        description="When the recording begins in the video. With `order` `in_turn`: how long "
        "after the one before has ended, beside `pause_seconds`.",
    )
    name: Name = Field(
        None,
        description="Comes back in the result, and decides nothing.",
    )


# Of a speaker: what decides the video beside the recording.
PLACE_FIELDS = {"face", "face_box", "start_seconds"}

Speakers = Annotated[
    tuple[Speaker, ...], Field(min_length=1, max_length=MAX_SPEAKERS, strict=False)
]


def require_apart(speakers: Sequence[Speaker]) -> None:
    """Returns if each speaker may have a face of his own.

    Raises:
        InvalidInputError: two have the same, or one is said in two ways; names the later one.
    """
    for index, speaker in enumerate(speakers):
        if speaker.face is not None and speaker.face_box is not None:
            message = "names the face that face_box shows: leave one of them out"
            raise InvalidInputError(message, field=f"speakers.{index}.face")
    for (first, one), (second, other) in combinations(enumerate(speakers), 2):
        places = [0 if each.face == "left" else each.face for each in (one, other)]
        if places[0] is not None and places[0] == places[1]:
            message = f"is the face of speakers.{first}; each speaker needs one of his own"
            raise InvalidInputError(message, field=f"speakers.{second}.face")
        if one.face_box is not None and other.face_box is not None:
            require_no_overlap(one.face_box, other.face_box, first, f"speakers.{second}.face_box")


def never_heard(start_seconds: float, end_seconds: float, index: int) -> InvalidInputError:
    """The refusal of a speaker who begins where the speech has been cut."""
    return InvalidInputError(
        f"begins at {start_seconds:g} s, and max_seconds ends the speech at {end_seconds:g} s: "
        "begin earlier, or raise max_seconds",
        field=f"speakers.{index}.start_seconds",
    )


def require_no_overlap(box: Box, other: Box, index: int, field: str) -> None:
    """Returns if the other box shares no pixels with that of `speakers.<index>`.

    Raises:
        InvalidInputError: it does, beyond what rounding makes; by `field`.
    """
    shared = [
        min(box[side] + box[side + 2], other[side] + other[side + 2]) - max(box[side], other[side])
        for side in (0, 1)
    ]
    if min(shared) > MAX_SHARED_PIXELS:
        raise InvalidInputError(
            f"overlaps the face of speakers.{index} by {shared[0]:.0f} x {shared[1]:.0f} pixels; "
            "each mouth follows one voice: boxes may touch and not overlap",
            field=field,
        )
