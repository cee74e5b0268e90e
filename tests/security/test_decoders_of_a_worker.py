"""A whole worker and the same files: a cancel frees it during each, and the next job is made."""

import base64
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from local_endpoint import JobRecord, LocalEndpoint, WorkerProcess
from tests.conftest import MediaServer
from tests.security import bombs
from tests.support.pictures import encoded
from tests.support.recordings import voice, write

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 120.0  # far more than anything here takes
FREED_SECONDS = 5.0
BUSY_FACTOR = 4  # how much longer a machine may take that has other things to do
# Of these even the caps on what a file may hold leave enough to be met in.
LONG: dict[str, tuple[str, Callable[[], bytes]]] = {
    "progressive scans, as many as are allowed": (
        "image",
        lambda: bombs.progressive_scans(2500, 490),
    ),
    "PPM comments, many": ("image", lambda: bombs.portable_comments(60_000_000)),
    "AMR without data, much": ("audio", lambda: bombs.amr_without_data(200_000_000)),
}
BOMBS = (
    {name: ("image", make) for name, make in bombs.PICTURES.items()}
    | {name: ("audio", make) for name, make in bombs.RECORDINGS.items()}
    | LONG
)


@contextmanager
def drawing_worker(directory: Path) -> Iterator[tuple[LocalEndpoint, WorkerProcess]]:
    """An endpoint, and a worker whose model draws at once; its decoders are every worker's."""
    environment = {"PYTHONPATH": str(ROOT), "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true"}
    script = ROOT / "benchmarks" / "drawing_worker.py"
    with (
        LocalEndpoint(lost_after_seconds=WAIT_SECONDS) as endpoint,
        WorkerProcess(endpoint, directory, script=script, environment=environment) as worker,
    ):
        worker.wait_until_polling(WAIT_SECONDS)
        yield endpoint, worker


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[LocalEndpoint, WorkerProcess]]:
    with drawing_worker(tmp_path_factory.mktemp("worker")) as both:
        yield both


def healthy(**changes: Any) -> dict[str, Any]:
    media = {
        "image": encoded(Image.new("RGB", (64, 64), "teal"), "JPEG"),  # square, as what is drawn
        "audio": write(voice(0.5, 48_000), 48_000),
    }
    inputs = {name: base64.b64encode(content).decode() for name, content in media.items()}
    return {"input": {"resolution": 256, **inputs, **changes}}


def decoders_at_work(worker: WorkerProcess) -> int:
    """How many processes of the worker decode a file: children of its template process."""
    count = 0
    for template in psutil.Process(worker.pid).children():
        with suppress(psutil.NoSuchProcess):
            if "sandbox_process" in " ".join(template.cmdline()):
                count += len(template.children())
    return count


def met_in_its_decoder(endpoint: LocalEndpoint, worker: WorkerProcess, job_id: str) -> bool:
    """Waits until the job's file is being decoded; False if the job is over before."""
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        if endpoint.state(job_id).is_over:
            return False
        if decoders_at_work(worker):
            return True
        time.sleep(0.02)
    raise AssertionError(worker.log)


def was_claimed(job: JobRecord) -> bool:
    return job.claimed_at_seconds is not None


@pytest.mark.parametrize("name", BOMBS)
def test_a_cancel_frees_the_worker_and_the_next_job_is_made(
    name: str, shared: tuple[LocalEndpoint, WorkerProcess], media_server: MediaServer
) -> None:
    endpoint, worker = shared
    field, make = BOMBS[name]
    job_id = endpoint.submit(healthy(**{field: media_server.add("/bomb", make())}))
    next_id = endpoint.submit(healthy())
    was_met = met_in_its_decoder(endpoint, worker, job_id)
    if was_met:
        time.sleep(0.3)  # in the middle of it
    endpoint.cancel(job_id)
    cancelled_at = time.monotonic()

    endpoint.wait_until(next_id, was_claimed, WAIT_SECONDS)

    assert time.monotonic() - cancelled_at < BUSY_FACTOR * FREED_SECONDS
    following = endpoint.wait(next_id, WAIT_SECONDS)
    assert following.status == "COMPLETED", following.error
    assert decoders_at_work(worker) == 0
    assert list(worker.temporary_directory.iterdir()) == []
    if name in LONG:
        assert was_met
        assert endpoint.state(job_id).status == "CANCELLED"


def test_a_worker_that_is_told_to_end_is_freed_of_a_bomb_by_a_cancel(
    tmp_path: Path, media_server: MediaServer
) -> None:
    with drawing_worker(tmp_path) as (endpoint, worker):
        url = media_server.add("/bomb", bombs.portable_comments(60_000_000))
        job_id = endpoint.submit(healthy(image=url))
        assert met_in_its_decoder(endpoint, worker, job_id)
        family = psutil.Process(worker.pid).children(recursive=True)

        worker.terminate()  # the job that runs may end
        time.sleep(0.3)
        endpoint.cancel(job_id)
        cancelled_at = time.monotonic()

        assert worker.wait(WAIT_SECONDS) == 0
        assert time.monotonic() - cancelled_at < BUSY_FACTOR * FREED_SECONDS
        assert psutil.wait_procs(family, WAIT_SECONDS)[1] == []
        assert list(worker.temporary_directory.iterdir()) == []
