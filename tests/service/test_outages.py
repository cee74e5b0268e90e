"""An hour of a platform and a store that fail at random, in a minute: no job is lost."""

import base64
import collections
import contextlib
import hashlib
import inspect
import io
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import pytest

from benchmarks.drawing_worker import Drawing
from benchmarks.faulty_proxy import CUTS, Fault, FaultyProxy, drawn_periods
from local_endpoint import JobRecord, LocalEndpoint, WorkerProcess, job_queue
from tests.conftest import BucketServer
from tests.service.outage_worker import HOUR_SECONDS, TIME_LAPSE

SEED = 14
NUM_JOBS = 200
NUM_WORKERS = 3
NUM_KILLS = 4
END_SECONDS = 240.0  # for the rest, on a busy machine
SCRIPT = Path(__file__).with_name("outage_worker.py")
SERVICE = SCRIPT.parents[2] / "worker" / "service"


def statuses(*numbers: int, body: bytes = b"<html>an error</html>") -> tuple[Fault, ...]:
    return tuple(Fault(f"{number} {body[:12]!r}", answer=(number, body)) for number in numbers)


def s3_error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>".encode()


PLATFORM_FAULTS: dict[str, tuple[Fault, ...]] = {
    "/job-take/": (
        *CUTS,
        *statuses(200, 204, 400, 401, 429, 500, 502, 503),
        *statuses(200, body=b""),
    ),
    "/job-done/": (*CUTS, *statuses(302, 401, 404, 408, 429, 500, 502, 503, 504, 524)),
    "/": (*CUTS, *statuses(429, 500, 502)),  # pings and stops
}
STORE_FAULTS: dict[str, tuple[Fault, ...]] = {
    # a URL that is looked up: 403 and 409 say there that nobody can read it
    "X-Amz-Signature": (*CUTS, *statuses(500, 502, 503, 504, 520)),
    "/": (
        *CUTS,
        *statuses(500, 502, 503, 504, 520),
        *statuses(503, body=s3_error("SlowDown")),
        *statuses(500, body=s3_error("InternalError")),
        *statuses(403, body=s3_error("RequestTimeTooSkewed")),
        *statuses(409, body=s3_error("OperationAborted")),
    ),
}


@pytest.fixture(scope="module")
def make_job(smallest_input: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    def make(number: int) -> dict[str, Any]:
        job = smallest_input | {"seed": number, "user_data": number}
        if number % 10 == 3:
            job["nonsense"] = 1
        elif number % 10 == 5:
            job["output"] = {"delivery": "inline"}
        elif number % 10 == 7:  # only the first of them may have it
            job["output"] = {"key": "latest.mp4"}
        return {"input": job}

    return make


@contextlib.contextmanager
def outages(
    endpoint: LocalEndpoint, store: BucketServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FaultyProxy, FaultyProxy]]:
    """The platform and the store, each behind a proxy; workers are told the proxies' addresses."""
    real_environment = endpoint.worker_environment
    with (
        FaultyProxy(endpoint.origin, PLATFORM_FAULTS, SEED) as platform,
        FaultyProxy(store.endpoint_url, STORE_FAULTS, SEED + 1) as bucket,
    ):

        def environment(worker_id: str, home: Path) -> dict[str, str]:
            told = real_environment(worker_id, home)
            return {n: v.replace(endpoint.origin, platform.origin) for n, v in told.items()}

        monkeypatch.setattr(endpoint, "worker_environment", environment)
        yield platform, bucket


def wait_for_all(
    endpoint: LocalEndpoint, ids: list[str], begun: float, look_after: Callable[[], None]
) -> list[JobRecord]:
    """All jobs once they are over; `look_after` the workers is called meanwhile."""
    jobs = []
    for job_id in ids:
        while not (job := endpoint.state(job_id)).is_over:
            assert time.monotonic() < begun + END_SECONDS, job
            look_after()
            time.sleep(0.1)
        jobs.append(job)
    return jobs


def has_ended(worker: WorkerProcess) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(timeout_seconds=0)
        return True
    return False


def seed_of(video: bytes) -> int:
    with av.open(io.BytesIO(video), "r") as container:
        return int(container.metadata["comment"].split("seed: ")[1].split(";")[0])


def fate(job: JobRecord, store: BucketServer) -> str:
    """How the job ended; a video is the one that was asked for."""
    if job.status == "FAILED":
        assert job.output["error_info"]["retryable"] is (job.output["error_info"]["code"] in RETRY)
        return str(job.output["error_info"]["code"])
    assert job.status == "COMPLETED", job
    output = job.output
    assert output["seed"] == output["user_data"]
    if output["delivery"] == "inline":
        video = base64.b64decode(output["video_base64"])
    else:
        video = store.client.get_object(Bucket=store.bucket, Key=output["key"])["Body"].read()
    assert hashlib.sha256(video).hexdigest() == output["sha256"]
    assert seed_of(video) == output["seed"]
    return "COMPLETED"


RETRY = ("UPLOAD_FAILED",)


def test_the_model_that_draws_has_all_that_the_service_asks_of_an_engine() -> None:
    from worker.generation.engine import Engine  # imports torch

    service = "".join(path.read_text() for path in sorted(SERVICE.glob("*.py")))
    asked = set(re.findall(r"\bengine\.(\w+)\b(?! import)", service)) - {"import"}
    assert asked <= set(dir(Drawing))
    for name in asked:
        if inspect.isfunction(own := getattr(Drawing, name)):
            expected = inspect.signature(getattr(Engine, name)).parameters
            assert list(inspect.signature(own).parameters) == list(expected), name


@pytest.mark.slow
def test_an_hour_of_outages_loses_no_job_and_mixes_up_none(
    object_store: BucketServer,
    make_job: Callable[[int], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # how often a job is handed out is the platform's matter, and here it is handed out often
    monkeypatch.setattr(job_queue, "MAX_CLAIMS", 1000)
    dice = random.Random(SEED)
    settings = {
        "PYTHONPATH": str(SCRIPT.parents[2]),
        "STORE_RETRY_SECONDS": str(300 / TIME_LAPSE),
        "RESULT_RETRY_SECONDS": str(600 / TIME_LAPSE),
        **object_store.environment,
    }
    with contextlib.ExitStack() as ending:
        endpoint = ending.enter_context(LocalEndpoint(hold_seconds=1.0, lost_after_seconds=4.0))
        platform, bucket = ending.enter_context(outages(endpoint, object_store, monkeypatch))
        settings["BUCKET_ENDPOINT_URL"] = bucket.origin
        started = 0

        def start(index: int, temporary_directory: Path | None = None) -> WorkerProcess:
            nonlocal started
            started += 1
            environment: Mapping[str, str] = settings
            if temporary_directory is not None:
                environment = {**settings, "TMPDIR": str(temporary_directory)}
            worker = WorkerProcess(
                endpoint, tmp_path / f"{index}-{started}", script=SCRIPT, environment=environment
            )
            if temporary_directory is not None:
                worker.temporary_directory = temporary_directory
            return ending.enter_context(worker)

        def start_ended_ones() -> None:
            """A killed worker, and one that found its store dead as it started."""
            for index, worker in enumerate(workers):
                if has_ended(worker):
                    workers[index] = start(index, worker.temporary_directory)

        workers = [start(index) for index in range(NUM_WORKERS)]
        for worker in workers:
            worker.wait_until_polling(timeout_seconds=120)

        begun = time.monotonic()
        for proxy in (platform, bucket):
            proxy.begin(drawn_periods(dice, HOUR_SECONDS))
        ids = [endpoint.submit(make_job(number)) for number in range(NUM_JOBS)]
        for _ in range(NUM_KILLS):
            time.sleep(dice.uniform(0.1, 0.2) * HOUR_SECONDS)
            workers[dice.randrange(NUM_WORKERS)].kill()  # as where a machine is taken away
            start_ended_ones()
        jobs = wait_for_all(endpoint, ids, begun, start_ended_ones)

        fates = [fate(job, object_store) for job in jobs]
        for number, job in enumerate(jobs):
            assert sum(post.accepted for post in job.results) == 1, job
            if number % 10 == 3:
                assert fates[number] == "INVALID_INPUT"
        # one that was made while another took the key goes into the reply
        named = [job for number, job in enumerate(jobs) if number % 10 == 7]
        assert sum(job.output.get("delivery") == "s3" for job in named) <= 1
        assert collections.Counter(fates)["COMPLETED"] > NUM_JOBS / 2
        assert set(fates) <= {"COMPLETED", "INVALID_INPUT", *RETRY}
        assert platform.faults_met.keys() >= {fault.name for fault in CUTS}
        assert bucket.faults_met.keys() >= {fault.name for fault in CUTS}

        for proxy in (platform, bucket):
            proxy.begin(())
        deadline = time.monotonic() + END_SECONDS
        while not all(endpoint.wait_for_worker(each.worker_id, 0.2) for each in workers):
            assert time.monotonic() < deadline
            start_ended_ones()
        for worker in workers:
            worker.terminate()
        for worker in workers:
            assert worker.wait(timeout_seconds=300) == 0, worker.log
            assert list(worker.temporary_directory.iterdir()) == []
