"""A mark on every frame, and the picture that it may come from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avatar_client.contract.job_errors import (
    InputTooLargeError,
    InputUrlBlockedError,
    UnsupportedMediaError,
    WorkerError,
)
from avatar_client.contract.media_source import MediaSource
from avatar_client.contract.request import Watermark
from tests.support.pictures import encoded
from worker.media.inputs import load_mark
from worker.media.watermark import Mark
from worker.settings import Settings
from worker.shapes import FrameSize

SIZE = FrameSize(200, 320)
GREY = np.full((2, *SIZE, 3), 100, np.uint8)


def changed(mark: Mark) -> np.ndarray:
    [marked] = mark.on([GREY])
    assert (GREY == 100).all()  # not the frames that were given
    assert (marked[0] == marked[1]).all()
    return marked[0].astype(int) - 100


@pytest.mark.parametrize("place", ["top-left", "top-right", "bottom-left", "bottom-right"])
def test_a_text_stands_in_its_corner_and_is_read_on_any_ground(place: str) -> None:
    asked = Watermark.model_validate({"text": "Made by a model", "place": place})
    difference = changed(Mark.of(asked, None, SIZE))

    rows, columns = np.nonzero(difference.any(axis=2))
    assert (rows.max() < 100) == place.startswith("top")
    assert columns.min() >= 4
    assert columns.max() < 316
    middle = (columns.min() + columns.max()) / 2
    assert (middle < 160) == place.endswith("left")
    assert difference.max() > 80  # white letters
    assert difference.min() < -50  # with a dark edge


@pytest.mark.parametrize("size", [FrameSize(64, 704), FrameSize(704, 112), FrameSize(256, 144)])
def test_the_longest_text_stays_in_the_frame(size: FrameSize) -> None:
    mark = Mark.of(Watermark(text="W" * 80), None, size)

    height, width = mark.weight.shape[:2]
    assert 0 <= mark.top <= size.height - height
    assert 0 <= mark.left <= size.width - width
    assert mark.weight.max() > 0.3


def test_a_picture_hides_what_its_alpha_and_the_opacity_say() -> None:
    picture = Image.new("RGBA", (100, 50), (200, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (50, 0, 100, 50))  # its right half cannot be seen

    asked = Watermark.model_validate({"image": "AA==", "opacity": 0.5, "place": "top-left"})
    difference = changed(Mark.of(asked, picture, SIZE))

    assert difference[6 + 10, 6 + 10].tolist() == [50, -50, -50]  # 40 x 20, 6 from the edges
    assert not difference[6 + 10, 6 + 30 :].any()
    assert not difference[:, 60:].any()
    assert not difference[40:].any()


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Image.Image]:
    def load(content: bytes, **settings: int) -> Image.Image:
        return load_mark(MediaSource(content=content), tmp_path, Settings(**settings))

    return load


def test_transparent_pixels_come_through_the_sandbox(load: Callable[..., Image.Image]) -> None:
    picture = Image.new("RGBA", (8, 4), (250, 10, 20, 0))
    picture.putpixel((0, 0), (30, 60, 90, 255))
    picture.putpixel((1, 0), (30, 60, 90, 128))

    mark = load(encoded(picture, "PNG"))

    assert (mark.mode, mark.size) == ("RGBA", (8, 4))
    assert mark.getpixel((0, 0)) == (30, 60, 90, 255)
    assert mark.getpixel((1, 0)) == pytest.approx((30, 60, 90, 128), abs=1)
    assert mark.getpixel((2, 0))[3] == 0  # type: ignore[index]
    opaque = load(encoded(Image.new("RGB", (3, 3), (1, 2, 3)), "PNG"))
    assert opaque.getpixel((1, 1)) == (1, 2, 3, 255)


@pytest.mark.parametrize(
    ("content", "settings", "kind"),
    [
        (b"GIF89a, or not", {}, UnsupportedMediaError),
        (encoded(Image.new("RGB", (9, 9)), "PNG"), {"max_image_pixels": 80}, InputTooLargeError),
        (bytes(100), {"max_input_bytes": 99}, InputTooLargeError),
    ],
)
def test_a_picture_that_is_no_use_is_refused_by_its_field(
    load: Callable[..., Image.Image],
    content: bytes,
    settings: dict[str, int],
    kind: type[WorkerError],
) -> None:
    with pytest.raises(kind) as caught:
        load(content, **settings)
    assert caught.value.field == "output.watermark.image"


def test_a_picture_is_fetched_from_public_addresses_alone(tmp_path: Path) -> None:
    with pytest.raises(InputUrlBlockedError) as caught:
        load_mark(MediaSource(url="https://127.0.0.1/logo.png"), tmp_path, Settings())
    assert caught.value.field == "output.watermark.image"
