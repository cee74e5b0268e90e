"""Blocks of a file, read through the page cache and past it."""

import mmap
import os
from pathlib import Path

import pytest

from worker.loading.files import PAGE_BYTES, BlockReader

NUM_BYTES = 5 * PAGE_BYTES + 17


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(NUM_BYTES))
    return path


def read(path: Path, start: int, num_bytes: int, *, past_cache: bool) -> bytes:
    buffer = mmap.mmap(-1, -(-num_bytes // PAGE_BYTES) * PAGE_BYTES)  # begins at a page
    with BlockReader(path) as reader:
        reader.read(memoryview(buffer), start, num_bytes, past_cache=past_cache)
    return buffer[:num_bytes]


@pytest.mark.parametrize("past_cache", [True, False])
@pytest.mark.parametrize(
    ("start", "num_bytes"), [(0, PAGE_BYTES), (2 * PAGE_BYTES, 100), (0, NUM_BYTES)]
)
def test_a_block_is_what_the_file_holds_there(
    path: Path, start: int, num_bytes: int, past_cache: bool
) -> None:
    content = path.read_bytes()[start : start + num_bytes]
    assert read(path, start, num_bytes, past_cache=past_cache) == content


@pytest.mark.parametrize("past_cache", [True, False])
def test_a_file_that_ends_before_the_block_does_is_named_with_its_end(
    path: Path, past_cache: bool
) -> None:
    with pytest.raises(OSError, match=rf"file ends at byte {NUM_BYTES}, inside a tensor"):
        read(path, PAGE_BYTES, NUM_BYTES, past_cache=past_cache)


def test_a_file_that_was_just_written_is_cached_and_so_is_what_lies_beyond_its_end(
    path: Path,
) -> None:
    with BlockReader(path) as reader:
        assert reader.is_cached(0, NUM_BYTES)
        assert reader.is_cached(8 * PAGE_BYTES, 9 * PAGE_BYTES)


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_reader_closes_its_file(path: Path) -> None:
    before = num_open_files()
    with BlockReader(path):
        assert num_open_files() > before
    assert num_open_files() == before
