"""The libraries of FlashAttention 4's kernels, where they are missing or of no use."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from worker.model import flash_attention_4

HOPPER = (9, 0)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the libraries are looked for, and the packages' versions."""
    monkeypatch.setenv(flash_attention_4.CACHE_DIR, str(tmp_path))
    monkeypatch.setattr(metadata, "version", "of {}".format)
    flash_attention_4.library.cache_clear()
    yield tmp_path
    flash_attention_4.library.cache_clear()  # of what was not there


def test_a_library_is_of_one_kernel_one_gpu_and_these_versions(directory: Path) -> None:
    path = flash_attention_4.library_path("attend", HOPPER)
    versions = "of flash-attn-4-of nvidia-cutlass-dsl-of apache-tvm-ffi"
    assert path == directory / "libraries" / versions / "sm_90" / "attend.so"


def test_without_the_package_there_is_no_library(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert flash_attention_4.library("attend", HOPPER) is None


def test_where_none_was_made_the_package_serves(directory: Path) -> None:
    assert flash_attention_4.library("attend", HOPPER) is None


def test_a_gpu_with_libraries_has_no_other_kernels_than_they(directory: Path) -> None:
    path = flash_attention_4.library_path("attend", HOPPER)
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(ImportError, match="over chosen blocks"):
        flash_attention_4.library("attend_blocks", HOPPER)


def test_one_that_does_not_load_is_passed_over_and_named(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = flash_attention_4.library_path("attend", HOPPER)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no library")
    assert flash_attention_4.library("attend", HOPPER) is None
    assert str(path) in caplog.text
