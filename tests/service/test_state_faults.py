"""States of jobs where something fails as they are written or read."""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.service.test_resume import (
    BROKEN,
    KEY,
    NAME,
    NUM_STEPS,
    STEP,
    WAIT_SECONDS,
    leave,
    opened,
    path_of,
    require_refused,
    some_state,
)
from tests.support.full_disk import no_file_above
from tests.support.waiting import wait_until
from worker.media.state_store import DirectoryStore
from worker.service import resume
from worker.service.resume import TAG_BYTES, Resumption

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "POLL_SECONDS", 0.001)


@pytest.fixture
def resumption(tmp_path: Path) -> Resumption:
    return Resumption(DirectoryStore(tmp_path / "states"), KEY, interval_seconds=1e-6)


def kept_step(resumption: Resumption) -> int:
    """Of the state that is there; 0: there is none."""
    with suppress(FileNotFoundError):
        return resume.facts_of(path_of(resumption).read_bytes()).step
    return 0


# As they are written


@pytest.mark.parametrize("missing_bytes", [TAG_BYTES, 10_000])
def test_a_volume_that_is_full_keeps_the_state_before_and_takes_the_next_one(
    resumption: Resumption, caplog: pytest.LogCaptureFixture, missing_bytes: int
) -> None:
    caplog.set_level(logging.WARNING)
    with suppress(type(BROKEN)), opened(resumption) as state:
        state.begin_denoising()
        state.offer(some_state(1))
        wait_until(lambda: kept_step(resumption) == 1)
        with no_file_above(path_of(resumption).stat().st_size - missing_bytes):
            state.offer(some_state(2))
            wait_until(lambda: "step 2 was not kept" in caplog.text)
        assert os.strerror(errno.EFBIG) in caplog.text
        assert NAME not in caplog.text
        assert list(path_of(resumption).parent.iterdir()) == [path_of(resumption)]
        assert kept_step(resumption) == 1
        state.offer(some_state(3))
        wait_until(lambda: kept_step(resumption) == 3)
        raise BROKEN
    assert opened(resumption).first_step == 3


class SlowStore(DirectoryStore):
    """Has each state nearly kept, and waits then."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.is_writing, self.may_end = threading.Event(), threading.Event()

    def put(self, name: str, write: Callable[[Path], object], num_bytes: int) -> None:
        def write_slowly(path: Path) -> None:
            write(path)
            self.is_writing.set()
            assert self.may_end.wait(WAIT_SECONDS)

        super().put(name, write_slowly, num_bytes)


@pytest.fixture
def slow(tmp_path: Path) -> SlowStore:
    return SlowStore(tmp_path / "states")


def test_a_sigterm_while_a_state_is_written_has_the_newest_one_written_after_it(
    slow: SlowStore,
) -> None:
    resumption = Resumption(slow, KEY, interval_seconds=1e-6)
    with suppress(type(BROKEN)), opened(resumption) as state:
        state.begin_denoising()
        state.offer(some_state(1))
        assert slow.is_writing.wait(WAIT_SECONDS)
        resumption.interval_seconds = 1000.0
        resumption.is_ending = True
        state.offer(some_state(2))
        assert kept_step(resumption) == 0
        slow.may_end.set()
        wait_until(lambda: kept_step(resumption) == 2)
        raise BROKEN
    assert opened(resumption).first_step == 2


def test_a_job_that_is_done_while_its_state_is_written_leaves_none(
    slow: SlowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "CLOSE_SECONDS", 0.01)
    resumption = Resumption(slow, KEY, interval_seconds=1e-6)
    with opened(resumption) as state:
        state.begin_denoising()
        state.offer(some_state(NUM_STEPS))
        assert slow.is_writing.wait(WAIT_SECONDS)
    [writer] = [thread for thread in threading.enumerate() if thread.name == "state"]
    slow.may_end.set()
    writer.join(WAIT_SECONDS)
    assert list(path_of(resumption).parent.iterdir()) == []


WRITES_HALF = """
import sys
from pathlib import Path
from worker.media.state_store import DirectoryStore

def write(path):
    path.write_bytes(bytes(1000))
    print("half", flush=True)
    sys.stdin.read()

DirectoryStore(Path(sys.argv[1])).put(sys.argv[2], write, 2000)
"""


def test_a_worker_that_is_killed_as_it_writes_leaves_the_state_before(
    resumption: Resumption,
) -> None:
    leave(resumption, BROKEN)
    with subprocess.Popen(
        [sys.executable, "-c", WRITES_HALF, str(resumption.store), NAME],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    parts = [path for path in path_of(resumption).parent.iterdir() if path != path_of(resumption)]
    assert [part.stat().st_size for part in parts] == [1000]
    assert opened(resumption).first_step == STEP
    resumption.store.sweep(-1.0)  # of any age
    assert list(path_of(resumption).parent.iterdir()) == []


# As they are read


def meddle_while_read(
    monkeypatch: pytest.MonkeyPatch, path: Path, meddle: Callable[[Path], object]
) -> None:
    """Has it done once the file is open, before its content is read."""
    number, fstat = path.stat().st_ino, os.fstat

    def fstat_and_meddle(descriptor: int) -> os.stat_result:
        found = fstat(descriptor)
        if found.st_ino == number:
            meddle(path)
        return found

    monkeypatch.setattr(os, "fstat", fstat_and_meddle)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(500))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    "tear",
    [lambda path: os.truncate(path, 1000), lambda path: os.truncate(path, 0), overwrite, append],
    ids=["cut", "emptied", "overwritten", "grown"],
)
def test_a_state_that_is_torn_as_it_is_read_is_refused_and_the_job_begins_anew(
    resumption: Resumption, monkeypatch: pytest.MonkeyPatch, tear: Callable[[Path], object]
) -> None:
    leave(resumption, BROKEN)
    meddle_while_read(monkeypatch, path_of(resumption), tear)
    with opened(resumption) as state:
        require_refused(state, "damaged")
    assert not path_of(resumption).exists()  # it is done


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_state_that_is_replaced_or_removed_as_it_is_read_is_the_one_that_was_opened(
    resumption: Resumption, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    leave(resumption, BROKEN)

    def replace(path: Path) -> None:
        path.unlink()
        if not is_removed:
            path.write_bytes(b"another")

    meddle_while_read(monkeypatch, path_of(resumption), replace)
    state = opened(resumption)
    assert state.first_step == STEP
    assert state.warnings == ()


def test_a_state_that_cannot_be_read_has_the_job_begun_anew(
    resumption: Resumption, caplog: pytest.LogCaptureFixture
) -> None:
    path_of(resumption).mkdir(parents=True)
    with opened(resumption) as state:
        assert state.restored is None
        assert "could not be found out" in str(state.warnings)
        state.begin_denoising()
        state.offer(some_state(1))
        wait_until(lambda: "step 1 was not kept" in caplog.text)
    assert list(path_of(resumption).parent.iterdir()) == [path_of(resumption)]


def test_a_state_that_was_out_of_reach_goes_with_the_job_that_was_begun_anew(
    resumption: Resumption, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "out of reach")

    leave(resumption, BROKEN)
    with monkeypatch.context() as patches:
        patches.setattr(DirectoryStore, "get", fail)
        state = opened(resumption)
    with state:
        assert state.restored is None
    assert not path_of(resumption).exists()
