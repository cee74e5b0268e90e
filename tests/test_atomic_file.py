"""Files that are there whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from worker.atomic_file import atomic_write, write_text


def test_a_file_is_replaced_only_when_all_of_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_after_a_failure_the_old_file_stays_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as part:
            part.write_text("half of the n")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_has_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.with_name("file.part").write_text("half of something much longer")
    write_text(path, "whole", mode=0o600)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_those_that_write_the_same_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path, shared=True) as first, atomic_write(path, shared=True) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # whose context was left last
    assert list(tmp_path.iterdir()) == [path]


def test_a_durable_file_reaches_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "of passing interest")
    assert synced == []
    path.unlink()
    write_text(path, "kept", durable=True)
    assert synced == [(Path(f"{path}.part"), False)]


def test_a_private_file_is_never_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o644)
    with atomic_write(path, mode=0o600) as part:
        assert stat.S_IMODE(part.stat().st_mode) == 0o600
        part.unlink()  # as a library does that writes beside, and renames
        part.write_text("new")
        part.chmod(0o640)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
