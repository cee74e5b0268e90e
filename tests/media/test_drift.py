"""How far a video leaves its portrait: the figures, and the command that reads them from an mp4."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from training import world
from worker.__main__ import main
from worker.media.drift import NUM_FRAMES, DriftMeter, Likeness
from worker.media.inputs import AudioSegment
from worker.media.video import write_video

SIDE = 192
BOX = (42.0, 25.0, 94.0, 114.0)  # of the first face


def drawn(seed: int) -> Image.Image:
    face = world.random_face(np.random.default_rng(seed))
    pixels = (world.portrait(face, SIDE, SIDE) * 255).byte().permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


PORTRAIT, OTHER = drawn(900), drawn(901)


def measured(picture: Image.Image) -> Likeness:
    meter = DriftMeter(PORTRAIT, [BOX], 1)
    meter.see(np.array(picture)[None])
    return meter.measured[0]


def moved(picture: Image.Image, across: int, down: int) -> Image.Image:
    return Image.fromarray(np.roll(np.array(picture), (down, across), (0, 1)))


def test_the_portrait_itself_is_no_drift() -> None:
    same = measured(PORTRAIT)
    assert same.identity == pytest.approx(1.0)
    assert (same.colour_mean, same.colour_spread) == (0.0, 0.0)


def test_the_face_is_the_same_in_other_light_and_at_another_place() -> None:
    dark = measured(ImageEnhance.Brightness(PORTRAIT).enhance(0.7))
    assert dark.identity == pytest.approx(1.0, abs=0.01)
    assert dark.colour_mean > 10
    same = measured(moved(PORTRAIT, 5, -4))
    assert same.identity is not None
    assert same.identity > 0.9
    assert same.colour_mean < 0.5
    near = measured(PORTRAIT.resize((204, 204)).crop((6, 6, 198, 198)))
    assert near.identity is not None
    assert near.identity > 0.9


@pytest.mark.parametrize("seed", [901, 903, 916])
def test_another_face_is_told_apart(seed: int) -> None:
    identity = measured(drawn(seed)).identity
    assert identity is not None
    assert identity < 0.87


def test_faded_colours_are_less_spread() -> None:
    pale = measured(ImageEnhance.Color(PORTRAIT).enhance(0.3))
    assert pale.colour_spread > 3
    assert pale.identity == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("box", "size"),
    [
        (None, (SIDE, SIDE)),
        ((0, 0, 8, 8), (SIDE, SIDE)),  # too small to show anything
        ((0, 0, SIDE, SIDE), (SIDE, SIDE)),
        ((-20, -30, 250, 300), (SIDE, SIDE)),  # as a detector gives them
        ((180, 180, 40, 40), (64, 640)),
        ((0, 0, 190, 30), (640, 64)),
    ],
)
def test_any_face_box_and_any_shape_are_measured(
    box: tuple[float, ...] | None, size: tuple[int, int]
) -> None:
    meter = DriftMeter(PORTRAIT, [] if box is None else [box], 1)
    meter.see(np.array(PORTRAIT.resize(size))[None])
    [likeness] = meter.measured
    assert likeness.identity is None or likeness.identity == pytest.approx(1.0, abs=0.01)
    assert likeness.colour_mean < 1


def drifting() -> list[NDArray[np.uint8]]:
    """Thirty frames in chunks: the portrait, which at two thirds becomes somebody else."""
    frames = [np.array(PORTRAIT)] * 20 + [np.array(OTHER)] * 10
    return [np.stack(frames[start : start + 7]) for start in range(0, 30, 7)]


def test_a_video_that_drifts_is_worse_at_its_end() -> None:
    meter = DriftMeter(PORTRAIT, [BOX], 30)
    assert sum(len(chunk) for chunk in meter.watch(drifting())) == 30
    assert len(meter.measured) == NUM_FRAMES
    summary = meter.summary()
    assert summary is not None
    assert summary["identity"]["start"] == 1.0
    assert summary["identity"]["end"] == summary["identity"]["worst"] < 0.8
    assert summary["colour_mean"]["start"] == 0.0
    assert summary["colour_mean"]["end"] == summary["colour_mean"]["worst"] > 5


def test_of_several_faces_the_one_least_alike_counts() -> None:
    both = Image.new("RGB", (2 * SIDE, SIDE))
    both.paste(PORTRAIT, (0, 0))
    both.paste(OTHER, (SIDE, 0))
    left, right = BOX, (BOX[0] + SIDE, *BOX[1:])
    picture = both.copy()
    picture.paste(PORTRAIT, (SIDE, 0))
    for boxes, changed in (([left], False), ([right], True), ([left, right], True)):
        meter = DriftMeter(both, boxes, 1)
        meter.see(np.array(picture)[None])
        [likeness] = meter.measured
        assert likeness.identity is not None
        assert (likeness.identity < 0.8) == changed


def test_nothing_seen_is_nothing_measured() -> None:
    assert DriftMeter(PORTRAIT, [BOX], 30).summary() is None


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "video.mp4"
    write_video(
        path,
        drifting(),
        fps=25,
        height=SIDE,
        width=SIDE,
        recording=AudioSegment.silent(1200),
        metadata={},
    )
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["worker", "drift", *map(str, arguments)])
    return main()


def test_the_command_reads_it_from_an_mp4(
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    PORTRAIT.save(tmp_path / "portrait.png")
    for options in (["--portrait", tmp_path / "portrait.png"], []):  # or the first frame
        assert run(monkeypatch, video, *options, "--face-box", *BOX, "--json") == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["identity"]["start"] > 0.98
        assert summary["identity"]["end"] < 0.8
        assert summary["colour_mean"]["start"] < 1.5  # through an mp4 and back
        assert summary["colour_mean"]["end"] > 5

    assert run(monkeypatch, video, "--face-box", *BOX) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("seconds")
    assert lines[NUM_FRAMES].startswith("   1.16")
    assert lines[-3].startswith("identity: {'start': ")


@pytest.mark.parametrize("content", [None, b"", b"no video", "sound"])
def test_the_command_says_what_is_no_video(
    content: bytes | str | None,
    make_speech: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "video.mp4"
    if content == "sound":
        content = make_speech(seconds=0.1)
    if isinstance(content, bytes):
        path.write_bytes(content)
    assert run(monkeypatch, path) == 1
    assert str(path) in capsys.readouterr().err
