"""Workers that are killed in the middle of a job of the demo model: it goes on in the next one."""

import base64
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest

from local_endpoint import JobRecord, LocalEndpoint, WorkerProcess, job_queue
from tests.conftest import ONE_THREAD, BucketServer
from worker.media.state_store import SUFFIX
from worker.service import resume
from worker.service.worker import OUT_OF_TOUCH_SECONDS

JOB_SECONDS = 300.0  # far more than a small job takes
NUM_STEPS = 10
PREFIX = "killed"  # of all objects: other tests leave states in the bucket
BOUNDARIES = (1, 2, 3, 8, 9, 10)  # steps after which a computed one follows, or none
MAX_LAG_STEPS = 2  # of a state behind the step that the client was told of

pytestmark = pytest.mark.slow


@pytest.fixture
def start(
    own_endpoint: LocalEndpoint, object_store: BucketServer, tmp_path: Path
) -> Iterator[Callable[[], WorkerProcess]]:
    """Starts a worker of the demo model that keeps its states in the bucket, ten a second."""
    environment = {
        "AVATAR_MODEL": "demo",
        "RESUME_INTERVAL_SECONDS": "0.1",
        **ONE_THREAD,
        **object_store.environment,
        "BUCKET_PREFIX": PREFIX,
    }
    with ExitStack() as ending:
        started = 0

        def start() -> WorkerProcess:
            nonlocal started
            started += 1
            directory = tmp_path / str(started)
            worker = WorkerProcess(own_endpoint, directory, environment=environment)
            ending.enter_context(worker)
            worker.wait_until_polling(JOB_SECONDS)
            return worker

        yield start


def state_keys(store: BucketServer) -> list[str]:
    keys = store.keys()
    return [key for key in keys if key.startswith(PREFIX) and key.endswith(SUFFIX)]


def kept_step(store: BucketServer) -> int:
    """The step that the only state in the bucket is of; 0: there is none."""
    keys = state_keys(store)
    if not keys:
        return 0
    content = store.client.get_object(Bucket=store.bucket, Key=keys[0])["Body"].read()
    return resume.facts_of(content).step


def is_at(step: int) -> Callable[[JobRecord], bool]:
    return lambda job: bool(job.output) and (job.output.get("step") or 0) >= step


def test_a_worker_that_stood_still_leaves_its_state_to_whoever_has_its_job_now(
    own_endpoint: LocalEndpoint,
    object_store: BucketServer,
    start: Callable[[], WorkerProcess],
    smallest_input: dict[str, Any],
) -> None:
    """As a machine that is paused or cut off: its job is handed on, and it is told to stop."""
    worker = start()
    job_id = own_endpoint.submit({"input": smallest_input | {"num_inference_steps": 100}})
    own_endpoint.wait_until(job_id, is_at(3), JOB_SECONDS)
    process = psutil.Process(worker.pid)
    process.suspend()
    kept = kept_step(object_store)
    own_endpoint.requeue(job_id)
    time.sleep(OUT_OF_TOUCH_SECONDS + 1.0)
    process.resume()

    again = own_endpoint.wait_until(
        job_id, lambda job: job.num_claims == 2 and is_at(1)(job), JOB_SECONDS
    )

    assert again.output["step"] > kept > 0
    own_endpoint.cancel(job_id)
    deadline = time.monotonic() + JOB_SECONDS
    while state_keys(object_store):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_job_of_workers_that_are_killed_becomes_the_video_of_one_that_was_not(
    own_endpoint: LocalEndpoint,
    object_store: BucketServer,
    start: Callable[[], WorkerProcess],
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_queue, "MAX_CLAIMS", 10)
    job: dict[str, Any] = {
        "input": {
            "image": base64.b64encode(make_portrait()).decode(),
            "audio": base64.b64encode(make_speech(seconds=0.6)).decode(),
            "resolution": 256,
            "num_inference_steps": NUM_STEPS,
            "guidance_scale": 1.0,  # half the time
            "seed": 7,
        }
    }
    worker = start()
    undisturbed = own_endpoint.wait(own_endpoint.submit(job), JOB_SECONDS).output
    assert state_keys(object_store) == []
    job_id = own_endpoint.submit(job)

    for step in (1, 5, 9):  # 10, 50 and 90 %
        own_endpoint.wait_until(job_id, is_at(step), JOB_SECONDS)
        worker.kill()
        kept = kept_step(object_store)
        assert kept >= max([0, *(each for each in BOUNDARIES if each <= step - MAX_LAG_STEPS)])
        worker = start()
        own_endpoint.requeue(job_id)
        resumed_at = own_endpoint.wait_until(job_id, is_at(1), JOB_SECONDS).output["step"]
        assert resumed_at > kept  # nothing that was kept is done again
    own_endpoint.wait_until(
        job_id,
        lambda job: job.output["stage"] == "decode" and kept_step(object_store) == NUM_STEPS,
        JOB_SECONDS,
    )
    assert own_endpoint.state(job_id).status == "IN_PROGRESS"
    worker.kill()
    start()
    own_endpoint.requeue(job_id)

    done = own_endpoint.wait(job_id, JOB_SECONDS)

    assert done.status == "COMPLETED"
    assert done.output["metrics"]["resumed_from_step"] == NUM_STEPS
    assert done.output["metrics"]["seconds_saved"] > undisturbed["metrics"]["denoise_seconds"] / 4
    assert done.output["sha256"] == undisturbed["sha256"]
    assert done.output["warnings"] == undisturbed["warnings"]
    with urlopen(done.output["video_url"], timeout=10) as answer:
        assert hashlib.sha256(answer.read()).hexdigest() == undisturbed["sha256"]
    assert state_keys(object_store) == []
