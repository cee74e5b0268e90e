"""A worker whose own disk, memory or GPU is the cause says so, and is told apart from others'."""

import asyncio
import errno
import os
import socket
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av.error
import pytest

from avatar_client.contract import job_errors
from avatar_client.contract.job_errors import WorkerError
from tests.conftest import MediaServer
from tests.support.full_disk import no_file_above
from worker.generation.engine import Engine
from worker.media import inputs, video
from worker.service import machine, production
from worker.service.job import JobRun
from worker.service.worker import Worker
from worker.settings import Settings

FFMPEG_IS_FULL = av.error.OSError(errno.ENOSPC, "No space left on device")
FFMPEG_READS_NOTHING = av.error.OSError(errno.EIO, "Input/output error")
FFMPEG_WANTS_TOO_MUCH = av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")


def system(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


DISK = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE]
OWN: list[tuple[type[WorkerError] | None, BaseException, str]] = [
    *((job_errors.InputDownloadError, system(number), "disk") for number in DISK),
    *((None, system(number), "disk") for number in DISK),
    (job_errors.UnsupportedMediaError, system(errno.EIO), "disk failed"),
    (job_errors.EncodeError, FFMPEG_IS_FULL, "disk is full"),
    (job_errors.EncodeError, FFMPEG_WANTS_TOO_MUCH, "memory"),
    (None, system(errno.EACCES, "/tmp/avatar-job-1/video.mp4"), "disk failed"),
    (job_errors.InputDownloadError, system(errno.EMFILE), "files open"),
    (None, system(errno.ENFILE), "files open"),
    (None, MemoryError(), "memory"),
    (None, system(errno.ENOMEM), "memory"),
    (
        job_errors.GenerationError,
        RuntimeError("[..] DefaultCPUAllocator: can't allocate"),
        "memory",
    ),
]
NOT_OWN: list[tuple[type[WorkerError] | None, BaseException]] = [
    (job_errors.InputDownloadError, system(errno.ECONNRESET)),
    (job_errors.InputDownloadError, system(errno.EACCES)),  # a firewall's, of a socket
    (job_errors.InputDownloadError, system(errno.ENETUNREACH)),
    (job_errors.InputDownloadError, ssl.SSLError(5, "whose numbers are OpenSSL's")),
    (job_errors.InputDownloadError, socket.gaierror(5, "whose numbers are the resolver's")),
    (job_errors.UploadError, TimeoutError()),
    (job_errors.UnsupportedMediaError, OSError("image file is truncated")),
    (job_errors.UnsupportedMediaError, FFMPEG_READS_NOTHING),
    (job_errors.UnsupportedMediaError, FFMPEG_WANTS_TOO_MUCH),
    (job_errors.UnsupportedMediaError, MemoryError()),
    (job_errors.GenerationError, RuntimeError("mat1 and mat2 shapes cannot be multiplied")),
    (None, FileNotFoundError(errno.ENOENT, "no such file", "/models/index.json")),
    (None, LookupError("anything")),
]


def failure(kind: type[WorkerError] | None, cause: BaseException) -> BaseException:
    """What a job fails with: a code of ours that came from it, or the cause itself."""
    try:
        try:
            raise cause
        except type(cause):
            if kind is None:
                raise
            raise kind("as the client is told") from cause
    except BaseException as error:
        return error


@pytest.mark.parametrize(("kind", "cause", "told"), OWN, ids=repr)
def test_a_fault_of_this_machine_is_told_as_one(
    kind: type[WorkerError] | None, cause: BaseException, told: str
) -> None:
    own = machine.as_own_fault(failure(kind, cause))

    assert own is not None
    assert (own.code, own.retryable, own.refresh_worker) == ("WORKER_FAILED", True, True)
    assert told in own.message
    assert "/tmp" not in str(own)


@pytest.mark.parametrize(("kind", "cause"), NOT_OWN, ids=repr)
def test_a_fault_of_others_is_not(kind: type[WorkerError] | None, cause: BaseException) -> None:
    assert machine.as_own_fault(failure(kind, cause)) is None


@pytest.mark.parametrize("kind", [None, job_errors.GenerationError])
@pytest.mark.parametrize(
    "said", ["CUDA error: unspecified launch failure", "cuDNN error: X", "NCCL error: Y"]
)
def test_the_gpus_fault_is_its_own_wherever_it_shows(
    kind: type[WorkerError] | None, said: str
) -> None:
    own = machine.as_own_fault(failure(kind, RuntimeError(said)))

    assert isinstance(own, job_errors.GpuFaultError)
    assert (own.retryable, own.refresh_worker) == (True, True)


# Through a whole job


@pytest.fixture
def worker(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Worker(Settings(runpod_allow_private_download_urls=True), engine)


def handle(worker: Worker, job_input: Any) -> dict[str, Any]:
    return asyncio.run(worker.handle({"id": "job-1", "input": job_input}))


def require_own_failure(
    worker: Worker, output: dict[str, Any], stage: str, directory: Path
) -> None:
    assert output["error"].startswith("WORKER_FAILED: ")
    assert output["error_info"]["retryable"] is True
    assert output["error_info"]["stage"] == stage
    assert output["refresh_worker"] is True
    assert worker.damaged
    assert list(directory.iterdir()) == []


def test_a_disk_that_cannot_take_an_input_is_not_the_servers_fault(
    worker: Worker, make_input: Callable[..., Any], media_server: MediaServer, tmp_path: Path
) -> None:
    url = media_server.add("/face.png", bytes(300_000))

    with no_file_above(100_000):
        output = handle(worker, make_input(image=url))

    require_own_failure(worker, output, "download", tmp_path)


@pytest.mark.parametrize("thumbnail", [False, True])
def test_a_disk_that_cannot_take_the_video_is_not_the_encoders_fault(
    worker: Worker,
    make_input: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    thumbnail: bool,
) -> None:
    def write_on_a_full_disk(*arguments: Any, **named: Any) -> object:
        with no_file_above(1000):
            return video.write_video(*arguments, **named)

    monkeypatch.setattr(production, "write_video", write_on_a_full_disk)
    output = handle(worker, make_input(output={"thumbnail": thumbnail}))

    require_own_failure(worker, output, "decode", tmp_path)


def test_memory_that_ends_while_a_picture_is_read_is_the_workers(
    worker: Worker,
    make_input: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(inputs, "_open", fail)

    require_own_failure(worker, handle(worker, make_input()), "download", tmp_path)


def statvfs(free_bytes: int, free_files: int = 1000, num_files: int = 1000) -> Callable[[str], Any]:
    return lambda path: SimpleNamespace(
        f_bavail=free_bytes // 4096, f_frsize=4096, f_files=num_files, f_favail=free_files
    )


@pytest.mark.parametrize(
    ("disk", "is_served"),
    [
        (statvfs(300 * 2**20), True),  # the portrait's limit, and the video's megabytes
        (statvfs(200 * 2**20), False),
        (statvfs(300 * 2**20, free_files=3), False),
        (statvfs(300 * 2**20, free_files=0, num_files=0), True),  # a file system that counts none
    ],
)
def test_room_is_asked_for_before_anything_is_fetched(
    worker: Worker,
    make_input: Callable[..., Any],
    make_portrait: Callable[..., bytes],
    media_server: MediaServer,
    monkeypatch: pytest.MonkeyPatch,
    disk: Callable[[str], Any],
    *,
    is_served: bool,
) -> None:
    monkeypatch.setattr(os, "statvfs", disk)

    output = handle(worker, make_input(image=media_server.add("/face.png", make_portrait())))

    assert ("error" not in output) is is_served
    assert bool(media_server.requests) is is_served
    assert worker.damaged is not is_served


def test_a_video_that_the_disk_cannot_hold_is_not_generated(
    worker: Worker, make_input: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "statvfs", statvfs(2**20))  # the inputs came with the request

    output = handle(worker, make_input())

    require_own_failure(worker, output, "download", tmp_path)
    assert "room" in output["error"]


def test_a_disk_that_takes_no_copy_of_a_result_does_not_keep_it_from_being_sent(
    worker: Worker, make_input: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise system(errno.ENOSPC)

    output = handle(worker, make_input(dry_run=True))
    for name in ("keep_result", "drop_kept_result"):
        monkeypatch.setattr(JobRun, name, fail)

    assert asyncio.run(worker.keep_result("job-1", {"output": output})) is None
    asyncio.run(worker.drop_kept_result("job-1"))
