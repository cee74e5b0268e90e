"""The disk's speed, from within and from a process of its own."""

import os
from pathlib import Path

import pytest

from worker.loading import disk

BLOCK_BYTES = 2**16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 16 blocks."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(16 * BLOCK_BYTES))
    return path


def test_a_file_that_is_read_to_its_beginning_ends_the_measurement_early(path: Path) -> None:
    per_second = disk.speed(path, num_threads=3, block_bytes=BLOCK_BYTES, seconds=3600.0)
    assert 1e5 < per_second < 1e12


def test_no_read_begins_after_the_time(path: Path) -> None:
    assert disk.speed(path, num_threads=3, block_bytes=BLOCK_BYTES, seconds=0.0) == 0.0


def test_another_process_measures_the_same(path: Path) -> None:
    with disk.probe(path, 3, BLOCK_BYTES, 3600.0) as bytes_per_second:
        measured = bytes_per_second()
        assert measured is not None
        assert 1e5 < measured < 1e12


def test_a_measurement_that_fails_stops_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with disk.probe(tmp_path / "missing", 3, BLOCK_BYTES, 0.1) as bytes_per_second:
        assert bytes_per_second() is None
    assert "missing" in capfd.readouterr().err


def test_nobody_has_to_ask_for_the_result(path: Path) -> None:
    with disk.probe(path, 3, BLOCK_BYTES, 0.1):
        pass
