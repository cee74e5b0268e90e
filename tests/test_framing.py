"""Which part of a portrait becomes the video, at what size, and that nothing is stretched."""

from collections.abc import Iterator
from itertools import product
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.contract.request import Aspect, Fit
from worker import framing
from worker.framing import Framing
from worker.media.finishing import finished
from worker.shapes import FrameSize, fit_size

ASPECTS = get_args(Aspect)
RATIOS = {"1:1": 1, "9:16": 9 / 16, "16:9": 16 / 9, "4:5": 4 / 5}
PORTRAITS = [  # width, height
    *((512, 512), (1920, 1080), (640, 480), (500, 1250)),
    *((1500, 500), (33, 40), (263, 2000), (400, 50)),
]


def sizes() -> Iterator[tuple[FrameSize, int, Aspect, Fit, Framing]]:
    for (width, height), resolution, aspect, fit in product(
        PORTRAITS, (256, 384, 512, 704), ASPECTS, get_args(Fit)
    ):
        portrait = FrameSize(height, width)
        shape = Framing.of(portrait, resolution, aspect, fit)
        yield portrait, resolution, aspect, fit, shape


def test_the_model_gets_sides_that_it_knows_and_no_more_pixels_than_the_resolution_has() -> None:
    for _, resolution, aspect, _, shape in sizes():
        assert shape.model.height % 64 == shape.model.width % 64 == 0
        largest = fit_size(9, 16, resolution)
        if aspect != "source":
            room = 1.3 * largest.height * largest.width  # multiples of 64 are coarse
            assert shape.model.height * shape.model.width <= room


def test_the_video_has_the_aspect_ratio_that_is_asked_for_in_even_sides() -> None:
    for portrait, _, aspect, fit, shape in sizes():
        ratio = RATIOS.get(aspect, portrait.width / portrait.height)
        assert shape.video.width / shape.video.height == pytest.approx(ratio, rel=0.006)
        own_ratio = portrait.width / portrait.height if fit == "contain" else ratio
        assert shape.picture.width / shape.picture.height == pytest.approx(own_ratio, rel=0.006)
        assert shape.video.height % 2 == shape.video.width % 2 == 0
        assert shape.picture.height <= shape.video.height
        assert shape.picture.width <= shape.video.width


def test_a_portrait_of_the_models_own_ratio_is_not_scaled_at_all() -> None:
    for side in (256, 300, 512, 2000):
        shape = Framing.of(FrameSize(side, side), 384)
        assert shape == Framing(*[FrameSize(384, 384)] * 3)
    assert Framing.of(FrameSize(1080, 1920), 704).model == fit_size(1080, 1920, 704)


def roundness(frame: np.ndarray) -> float:
    """Width over height of a white disc on black."""
    weight = frame[..., 1].astype(float)
    y, x = np.indices(weight.shape)
    total = weight.sum()
    across, down = ((weight * (each - (weight * each).sum() / total) ** 2).sum() for each in (x, y))
    return float(np.sqrt(across / down))


@pytest.mark.parametrize("fit", get_args(Fit))
@pytest.mark.parametrize("aspect", ASPECTS)
def test_a_circle_of_the_portrait_is_a_circle_in_the_video(aspect: Aspect, fit: Fit) -> None:
    for width, height in PORTRAITS:
        radius = min(width, height) / 4
        y, x = np.indices((height, width)) + 0.5
        inside = radius - np.hypot(x - width / 2, y - height / 2)
        disc = (255 * np.clip(inside + 0.5, 0, 1)).astype(np.uint8)
        image = Image.fromarray(disc).convert("RGB")
        size = framing.size_of(image)
        shape = Framing.of(size, 256, aspect, fit)
        part = framing.cover(size, aspect if fit == "cover" else "source", None)
        shown = framing.cut(image, part, shape.model)

        [frame] = np.concatenate(list(finished([np.asarray(shown)[None]], shape, "#000000")))

        assert frame.shape == (*shape.video, 3)
        assert roundness(frame) == pytest.approx(1, abs=0.01), (width, height)


def test_the_whole_face_is_in_the_part_and_near_its_middle_where_the_portrait_reaches() -> None:
    choice = np.random.default_rng(0)
    for aspect, (width, height) in product(ASPECTS, PORTRAITS):
        for _ in range(50):
            side = choice.uniform(0.1, 0.5) * min(width, height)
            face = (*choice.uniform(0, (width - side, height - side)), side, side)
            x, y, part_width, part_height = framing.cover(FrameSize(height, width), aspect, face)
            assert -1e-6 <= x <= face[0] + 1e-6
            assert -1e-6 <= y <= face[1] + 1e-6
            assert face[0] + side <= x + part_width + 1e-6 <= width + 2e-6
            assert face[1] + side <= y + part_height + 1e-6 <= height + 2e-6
            if 0 < x < width - part_width:
                assert x + part_width / 2 == pytest.approx(face[0] + side / 2)


def test_without_a_face_the_middle_is_kept() -> None:
    assert framing.cover(FrameSize(100, 300), "1:1", None) == (100, 0, 100, 100)
    assert framing.cover(FrameSize(300, 100), "1:1", None) == (0, 100, 100, 100)


@pytest.mark.parametrize(
    ("size", "aspect", "face", "side"),
    [
        (FrameSize(1000, 500), "16:9", (50, 100, 300, 400), "higher"),
        (FrameSize(500, 1500), "9:16", (600, 50, 320, 400), "wider"),
    ],
)
def test_a_ratio_that_would_cut_the_face_is_refused(
    size: FrameSize, aspect: Aspect, face: tuple[float, float, float, float], side: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"the face is {side} than") as caught:
        framing.cover(size, aspect, face)
    assert caught.value.field == "output.aspect"
    x, y, width, height = face
    framing.cover(size, aspect, (x, y, width / 2, height / 2))


def test_a_detected_face_that_reaches_over_the_edge_counts_as_far_as_it_is_seen() -> None:
    part = framing.cover(FrameSize(400, 1000), "1:1", (-100, -50, 450, 440))
    assert part == (0, 0, 400, 400)


def test_a_box_follows_its_face_into_the_part() -> None:
    box = framing.box_in_part((300, 100, 40, 50), (200, 50, 400, 200), FrameSize(100, 100))
    assert box == (25, 25, 10, 25)
