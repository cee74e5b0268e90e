"""What a worker has on the disk is gone when its process is, however that ended."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from worker.own_directory import LOCK, PREFIX, own_directory, remove_leftovers

ROOT = Path(__file__).parents[1]
HOLDER = """
import time
from worker.own_directory import own_directory
with own_directory("job") as directory:
    (directory / "video.mp4.part").write_bytes(bytes(1000))
    print(directory, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_killed_workers_directory_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        cwd=ROOT,
        env={"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        directory = Path(holder.stdout.readline().strip())
        remove_leftovers()
        assert (directory / "video.mp4.part").exists()

        holder.kill()
        holder.wait()

        remove_leftovers()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_jobs_stays(tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("avatar-demo-1", "avatar-endpoint-1", "something")]
    without_lock = tmp_path / f"{PREFIX}begun"  # perhaps by a worker that starts just now
    elsewhere = tmp_path / "elsewhere"
    for path in (*others, without_lock, elsewhere):
        path.mkdir()
    (elsewhere / LOCK).touch()
    link = tmp_path / f"{PREFIX}link"
    link.symlink_to(elsewhere)

    remove_leftovers()

    assert all(path.exists() for path in (*others, without_lock, link, elsewhere))


def test_what_this_process_uses_itself_stays() -> None:
    with own_directory("ranks") as directory:
        remove_leftovers()
        assert (directory / LOCK).exists()


def test_a_directory_that_somebody_has_removed_ends_no_job(tmp_path: Path) -> None:
    with own_directory("job") as directory:
        (directory / LOCK).unlink()
        directory.rmdir()
    assert list(tmp_path.iterdir()) == []
