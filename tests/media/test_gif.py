"""The small GIF of a video's beginning."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from worker.media.gif import MAX_GIF_BYTES, MAX_SIDE, MIN_SIDE, GifWriter


def chunks(num_frames: int, height: int = 64, width: int = 96) -> Iterator[NDArray[np.uint8]]:
    """Frames in uneven chunks; each is grey, lighter than the one before."""
    levels = np.linspace(0, 250, num_frames).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3))
    yield from np.split(frames, [part for part in (7, 20, 33) if part < num_frames])


def shown(path: Path) -> list[Any]:
    """The grey at each hundredth of a second."""
    with Image.open(path) as image:
        return [
            frame.convert("L").getpixel((3, 3))
            for frame in ImageSequence.Iterator(image)
            for _ in range(frame.info.get("duration", 80) // 10)
        ]


@pytest.mark.parametrize(("fps", "step"), [(25.0, 2), (12.5, 1)])
@pytest.mark.parametrize("num_frames", [1, 10, 48, 300])
def test_it_shows_the_first_seconds_at_the_videos_own_pace(
    tmp_path: Path, fps: float, step: int, num_frames: int
) -> None:
    gif = GifWriter(fps)
    passed = np.concatenate(list(gif.watch(chunks(num_frames))))
    gif.write(tmp_path / "x.gif", "made")

    assert len(passed) == num_frames
    expected = np.repeat(passed[:, 3, 3, 0][::step][:50], 8)
    assert shown(tmp_path / "x.gif") == pytest.approx(expected.tolist(), abs=8)


def test_it_says_what_it_is_and_plays_on_and_on(tmp_path: Path) -> None:
    gif = GifWriter(25)
    list(gif.watch(chunks(10)))
    gif.write(tmp_path / "x.gif", "AI-generated")
    with Image.open(tmp_path / "x.gif") as image:
        assert (image.info["comment"], image.info["loop"]) == (b"AI-generated", 0)


def test_a_large_picture_is_made_small_and_keeps_its_shape(tmp_path: Path) -> None:
    gif = GifWriter(25)
    list(gif.watch(chunks(3, height=704, width=352)))
    gif.write(tmp_path / "x.gif", "")
    with Image.open(tmp_path / "x.gif") as image:
        assert image.size == (MAX_SIDE // 2, MAX_SIDE)


def test_noise_that_takes_much_room_is_made_smaller_still(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    noise = dice.integers(0, 256, (100, 320, 320, 3), dtype=np.uint8)
    gif = GifWriter(25)
    list(gif.watch([noise]))
    gif.write(tmp_path / "x.gif", "")
    content = (tmp_path / "x.gif").read_bytes()
    assert len(content) <= MAX_GIF_BYTES
    with Image.open(io.BytesIO(content)) as image:
        assert MIN_SIDE <= image.width < MAX_SIDE


def test_without_a_frame_there_is_none(tmp_path: Path) -> None:
    gif = GifWriter(25)
    list(gif.watch([]))
    with pytest.raises(ValueError, match="no frames"):
        gif.write(tmp_path / "x.gif", "")
