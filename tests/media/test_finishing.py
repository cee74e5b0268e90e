"""The frames of the video: scaled, and laid on a background."""

import numpy as np
import pytest

from worker.framing import Framing
from worker.media.finishing import finished
from worker.shapes import FrameSize

SMALL, LARGE = FrameSize(64, 64), FrameSize(64, 128)
CONTAINED = Framing(model=SMALL, picture=SMALL, video=LARGE)


def test_frames_that_fit_pass_as_they_are() -> None:
    chunk = np.zeros((2, 64, 64, 3), np.uint8)
    [passed] = finished([chunk], Framing(SMALL, SMALL, SMALL))
    assert passed is chunk


def test_frames_are_scaled_one_by_one_and_keep_their_chunks() -> None:
    values = np.array([10, 200, 90], np.uint8)
    frames = np.broadcast_to(values[:, None, None, None], (3, 64, 64, 3))
    shape = Framing(SMALL, FrameSize(60, 64), FrameSize(60, 64))
    chunks = list(finished([frames[:2], frames[2:]], shape))
    assert [chunk.shape for chunk in chunks] == [(2, 60, 64, 3), (1, 60, 64, 3)]
    assert [int(chunk[i].mean()) for chunk in chunks for i in range(len(chunk))] == [10, 200, 90]


def test_a_contained_picture_stands_in_the_middle_of_its_colour() -> None:
    frames = np.full((1, 64, 64, 3), 200, np.uint8)
    [[frame]] = finished([frames], CONTAINED, "#102030")
    assert (frame[:, 32:96] == 200).all()
    assert (frame[:, :32] == (16, 32, 48)).all()
    assert (frame[:, 96:] == (16, 32, 48)).all()


def test_a_blur_has_the_pictures_colours_no_detail_and_does_not_move() -> None:
    choice = np.random.default_rng(0)
    frames = choice.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    frames[..., 0] = 255
    [[first, second]] = finished([frames], CONTAINED)
    assert (first[:, 32:96] == frames[0]).all()
    assert (second[:, 32:96] == frames[1]).all()
    border = first[:, :32]
    assert (border == second[:, :32]).all()
    assert (border[..., 0] > 250).all()
    assert border[..., 1].mean() == pytest.approx(128, abs=25)
    assert border[..., 1].std() < 25  # of noise whose own is 74
