"""Whose face is whose: the faces that a request names, and what is said if they are not there."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from avatar_client.contract import preview
from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.contract.request import JobInput
from worker.generation.engine import Engine
from worker.service import faces
from worker.service.faces import ShownFaces
from worker.shapes import Box

PHOTO = Path(__file__).parents[1] / "data" / "astronaut.jpg"
SIZE = (600, 300)
LEFT, MIDDLE, RIGHT = (50.0, 60.0, 80.0, 90.0), (250.0, 60.0, 80.0, 90.0), (450.0, 60.0, 80.0, 90.0)


@dataclass
class Detector:
    """Finds what it is told to, wherever it looks."""

    boxes: list[Box]

    def find_faces(self, portrait: Image.Image, resolution: int) -> list[Box]:
        return self.boxes if portrait.size == SIZE else []


def choose(*speakers: dict[str, Any], found: list[Box]) -> faces.ChosenFaces:
    given = [{"audio": "https://example.com/a.wav", **each} for each in speakers]
    params = JobInput.model_validate({"image": "AA==", "speakers": given})
    engine: Any = Detector(found)
    return faces.choose(params, Image.new("RGB", SIZE), engine)


@pytest.mark.parametrize(
    ("speakers", "boxes"),
    [
        ([{}, {}, {}], [LEFT, MIDDLE, RIGHT]),
        ([{"face": "right"}, {"face": "left"}], [RIGHT, LEFT]),
        ([{"face": 2}, {"face": 1}], [RIGHT, MIDDLE]),
        ([{"face": "right"}, {}, {}], [RIGHT, LEFT, MIDDLE]),
        ([{}, {"face_box": [240, 50, 100, 110]}, {}], [LEFT, (240, 50, 100, 110), RIGHT]),
        ([{"face": 1}], [MIDDLE]),
        ([{}], [None]),  # the largest, as where there is one recording
    ],
)
def test_a_speaker_has_the_face_that_is_named_or_the_next_from_the_left(
    speakers: list[dict[str, Any]], boxes: list[Any]
) -> None:
    assert choose(*speakers, found=[LEFT, MIDDLE, RIGHT]).boxes == boxes


@pytest.mark.parametrize(
    ("speakers", "found", "field", "said"),
    [
        (
            [{}, {}, {}],
            [LEFT, RIGHT],
            "speakers",
            "are 3, and 2 faces were found, from",
        ),
        ([{}, {}], [], "speakers", "no face was found"),
        ([{}, {}], [LEFT, MIDDLE, RIGHT], "speakers.0.face", "3 faces were found"),
        ([{"face": 0}, {}], [LEFT, MIDDLE, RIGHT], "speakers.1.face", "is needed"),
        ([{}, {"face": 2}], [LEFT, RIGHT], "speakers.1.face", "1 at [450, 60, 80, 90]"),
        ([{"face": "left"}], [], "speakers.0.face", "no face was found"),
        ([{"face": "left"}, {"face": "right"}], [LEFT], "speakers.1.face", "face of speakers.0"),
        ([{"face": 1}, {"face": "right"}], [LEFT, RIGHT], "speakers.1.face", "face of speakers.0"),
        ([{"face": 0}, {"face_box": LEFT}], [LEFT], "speakers.1.face_box", "face of speakers.0"),
        (
            [{"face": 0}, {"face_box": [100, 60, 90, 90]}],
            [LEFT, (110.0, 60.0, 70.0, 90.0)],
            "speakers.1.face_box",
            "overlaps the face of speakers.0",
        ),
        ([{"face_box": [0, 0, 40, 40]}, {}], [LEFT, RIGHT], "speakers.0.face_box", "no face in it"),
        ([{"face_box": [0, 0, 40, 40]}], [LEFT], "speakers.0.face_box", "1 face was found"),
        ([{}, {"face_box": [590, 0, 40, 40]}], [LEFT, RIGHT], "speakers.1.face_box", "600 x 300"),
        ([{}, {"face_box": [9, 9, 2, 2]}], [LEFT, RIGHT], "speakers.1.face_box", "at least 2%"),
    ],
)
def test_a_face_that_is_not_there_is_refused_with_what_was_found(
    speakers: list[dict[str, Any]], found: list[Box], field: str, said: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        choose(*speakers, found=found)
    assert caught.value.field == field
    assert said in caught.value.message


def test_where_no_face_is_found_at_all_the_client_s_boxes_count() -> None:
    chosen = choose({"face_box": LEFT}, {"face_box": RIGHT}, found=[])
    assert chosen == faces.ChosenFaces([LEFT, RIGHT], (faces.UNSEEN,))


def test_found_boxes_that_overlap_a_little_are_parted_at_the_middle() -> None:
    chosen = choose({}, {}, found=[LEFT, (120.0, 60.0, 80.0, 90.0)])
    assert chosen.boxes == [(50, 60, 75, 90), (125, 60, 75, 90)]


def test_a_client_sees_the_faces_of_a_photo_and_can_name_each(engine: Engine) -> None:
    photo = Image.open(PHOTO).convert("RGB")
    photo.thumbnail((300, 300))
    pair = Image.new("RGB", (2 * photo.width + 200, photo.height), "grey")
    pair.paste(photo, (0, 0))
    pair.paste(photo, (photo.width + 200, 0))

    shown = ShownFaces.of(pair, 256, engine)

    left, right = shown.boxes
    assert right[0] - left[0] == pytest.approx(photo.width + 200, abs=30)
    assert len(shown.thumbnail) <= preview.MAX_CHARACTERS
    with Image.open(io.BytesIO(preview.read(shown.thumbnail))) as picture:
        assert max(picture.size) == min(max(pair.size), 640)
        x = round(left[0] * picture.width / pair.width) + 1
        y = round((left[1] + left[3] / 2) * picture.height / pair.height)
        line = np.asarray(picture, np.float32)[y - 5 : y + 5, x - 1 : x + 2].mean(axis=(0, 1))
        assert line[:2].min() - line[2] > 40  # yellow
    speakers = [{"audio": "https://a/b", "face_box": list(right)}, {"audio": "https://a/b"}]
    params = JobInput.model_validate({"image": "AA==", "resolution": 256, "speakers": speakers})
    assert faces.choose(params, pair, engine).boxes == [right, left]
