"""Files that were made to cost a decoder time or memory: each ends, and the next file is read."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from avatar_client.contract.job_errors import WorkerError
from avatar_client.contract.media_source import MediaSource
from tests.security import bombs
from tests.support.pictures import chart, encoded
from tests.support.recordings import voice, write
from tests.support.waiting import AT_ONCE_SECONDS
from worker.media import decoders, inputs
from worker.media.inputs import load_portrait, load_speech
from worker.service.job import JobStoppedError
from worker.settings import Settings

MAX_BYTES = 10**9
SETTINGS = Settings(max_image_pixels=2_000_000)
LONGEST_SECONDS = 60.0  # in a machine that has other things to do; see the budget below


@pytest.fixture(autouse=True)
def short_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.5 s of processor time in place of 20, or the tests would take so long."""
    monkeypatch.setattr(decoders, "FIRST_SECONDS", 1.5)


def require_healthy_files_are_read(directory: Path) -> None:
    picture = MediaSource(content=encoded(Image.fromarray(chart()), "JPEG"))
    assert load_portrait(picture, directory, SETTINGS).size == (64, 48)
    sound = MediaSource(content=write(voice(0.5, 48_000), 48_000))
    assert load_speech(sound, directory, SETTINGS).duration_seconds == pytest.approx(0.5)


@pytest.mark.parametrize("name", bombs.PICTURES)
def test_a_picture_ends_within_its_budget(name: str, tmp_path: Path) -> None:
    content = bombs.PICTURES[name]()
    begun = time.monotonic()
    try:
        load_portrait(MediaSource(content=content), tmp_path, SETTINGS)
    except WorkerError as error:
        assert (error.field, error.retryable) == ("image", False)  # noqa: PT017  # or it is read
    assert time.monotonic() - begun < LONGEST_SECONDS
    assert inputs.sandbox.peak_bytes < MAX_BYTES
    require_healthy_files_are_read(tmp_path)


@pytest.mark.parametrize("name", bombs.RECORDINGS)
def test_a_recording_ends_within_its_budget(name: str, tmp_path: Path) -> None:
    content = bombs.RECORDINGS[name]()
    begun = time.monotonic()
    try:
        load_speech(MediaSource(content=content), tmp_path, SETTINGS)
    except WorkerError as error:
        assert (error.field, error.retryable) == ("audio", False)  # noqa: PT017  # or it is read
    assert time.monotonic() - begun < LONGEST_SECONDS
    assert inputs.sandbox.peak_bytes < MAX_BYTES
    require_healthy_files_are_read(tmp_path)


def test_what_takes_too_long_says_so_with_a_remedy(tmp_path: Path) -> None:
    source = MediaSource(content=bombs.portable_comments(10_000_000))
    with pytest.raises(
        WorkerError, match="too long to decode; export it as a plain JPEG"
    ) as raised:
        load_portrait(source, tmp_path, SETTINGS)
    assert (raised.value.code, raised.value.field) == ("UNSUPPORTED_MEDIA", "image")


def test_what_takes_too_much_memory_says_so_with_a_remedy(tmp_path: Path) -> None:
    source = MediaSource(content=bombs.exif_rationals(6_000_000))
    with pytest.raises(WorkerError, match="too much memory to decode; export it as a") as raised:
        load_portrait(source, tmp_path, SETTINGS)
    assert (raised.value.code, raised.value.field) == ("UNSUPPORTED_MEDIA", "image")


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    content = bombs.progressive_scans(64, 501)
    with pytest.raises(WorkerError, match="more than 500 scans"):
        load_portrait(MediaSource(content=content), tmp_path, SETTINGS)
    # what lies behind the picture does not count: a film, another picture
    whole = encoded(Image.fromarray(chart()), "JPEG") + b"\xff\xda" * 1000
    assert load_portrait(MediaSource(content=whole), tmp_path, SETTINGS).size == (64, 48)


@pytest.mark.parametrize(
    ("field", "bomb"),
    [
        ("image", bombs.portable_comments),
        ("audio", bombs.amr_without_data),
    ],
)
def test_a_stop_frees_the_worker_at_once(
    field: str, bomb: Callable[[int], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "FIRST_SECONDS", 60.0)
    require_healthy_files_are_read(tmp_path)
    load = load_portrait if field == "image" else load_speech
    asked = 0
    stopped_at = 0.0

    def check() -> None:
        nonlocal asked, stopped_at
        asked += 1
        if asked == 8:
            stopped_at = time.monotonic()
            raise JobStoppedError

    with pytest.raises(JobStoppedError):
        load(MediaSource(content=bomb(60_000_000)), tmp_path, SETTINGS, check=check)
    assert time.monotonic() - stopped_at < AT_ONCE_SECONDS
    require_healthy_files_are_read(tmp_path)
