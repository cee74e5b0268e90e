"""Workers that are killed in the middle of a job of the demo model: it goes on in the next one."""

import base64
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest

from local_endpoint import LocalEndpoint, WorkerProcess, job_queue
from tests.conftest import ONE_THREAD, BucketServer
from tests.support.waiting import wait_until
from worker.media.state_store import SUFFIX
from worker.service import resume
from worker.service.worker import OUT_OF_TOUCH_SECONDS

JOB_SECONDS = 300.0  # far more than a small job takes
NUM_STEPS = 10  # of these a state is kept after 1, 2, 3, 8, 9 and 10, if there is time

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class States:
    """What the workers of one test have kept in the bucket."""

    store: BucketServer
    prefix: str  # of all objects of the test: others leave states too

    def keys(self) -> list[str]:
        return [key for key in self.store.keys(self.prefix) if key.endswith(SUFFIX)]

    def step(self) -> int:
        """The step that the only state is of; 0: there is none."""
        keys = self.keys()
        if not keys:
            return 0
        content = self.store.client.get_object(Bucket=self.store.bucket, Key=keys[0])["Body"].read()
        return resume.facts_of(content).step

    def wait_for(self, step: int) -> None:
        """Returns when the state is of this step or a later one."""
        wait_until(lambda: self.step() >= step, self.keys)


@pytest.fixture
def states(object_store: BucketServer) -> States:
    return States(object_store, prefix=f"killed-{secrets.token_hex(4)}")


@pytest.fixture
def start(
    own_endpoint: LocalEndpoint, states: States, tmp_path: Path
) -> Iterator[Callable[[], WorkerProcess]]:
    """Starts a worker of the demo model that keeps its states in the bucket, ten a second."""
    environment = {
        "AVATAR_MODEL": "demo",
        "RESUME_INTERVAL_SECONDS": "0.1",
        **ONE_THREAD,
        **states.store.environment,
        "BUCKET_PREFIX": states.prefix,
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


def wait_for_line(worker: WorkerProcess, pattern: str) -> re.Match[str]:
    """What the pattern has matched in the worker's log, as soon as it is there."""
    return wait_until(lambda: re.search(pattern, worker.log), lambda: worker.log)


def test_a_worker_that_stood_still_leaves_its_state_to_whoever_has_its_job_now(
    own_endpoint: LocalEndpoint,
    states: States,
    start: Callable[[], WorkerProcess],
    smallest_input: dict[str, Any],
) -> None:
    """As a machine that is paused or cut off: another has its job, and it is told to stop."""
    first = start()
    job_id = own_endpoint.submit({"input": smallest_input | {"num_inference_steps": 100}})
    states.wait_for(1)
    process = psutil.Process(first.pid)
    process.suspend()
    suspended_at = time.monotonic()
    kept = states.step()
    own_endpoint.requeue(job_id)
    second = start()

    again = own_endpoint.wait_until(
        job_id, lambda job: bool(job.output and job.output["step"]), JOB_SECONDS
    )
    assert again.worker_id == second.worker_id
    assert again.output["step"] > kept > 0

    second.kill()  # so that none but the first can change what is kept
    left = states.keys()
    time.sleep(max(0.0, suspended_at + OUT_OF_TOUCH_SECONDS + 1.0 - time.monotonic()))
    process.resume()
    wait_for_line(first, f"{job_id}: stopped after")
    assert states.keys() == left != []


def test_a_job_of_workers_that_are_killed_becomes_the_video_of_one_that_was_not(
    own_endpoint: LocalEndpoint,
    states: States,
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
    assert states.keys() == []
    job_id = own_endpoint.submit(job)

    for step in (1, 3, 8):
        states.wait_for(step)
        worker.kill()
        kept = states.step()
        worker = start()
        own_endpoint.requeue(job_id)
        found = wait_for_line(worker, rf"{job_id}: goes on after step (\d+) of {NUM_STEPS}")
        assert int(found[1]) >= kept  # nothing that was kept is done again
    states.wait_for(NUM_STEPS)  # while the frames are decoded
    assert own_endpoint.state(job_id).status == "IN_PROGRESS"
    worker.kill()
    start()
    own_endpoint.requeue(job_id)

    done = own_endpoint.wait(job_id, JOB_SECONDS)

    assert done.status == "COMPLETED"
    assert done.output["metrics"]["resumed_from_step"] == NUM_STEPS
    assert done.output["metrics"]["seconds_saved"] > 0.0
    assert done.output["sha256"] == undisturbed["sha256"]
    assert done.output["warnings"] == undisturbed["warnings"]
    with urlopen(done.output["video_url"], timeout=10) as answer:
        assert hashlib.sha256(answer.read()).hexdigest() == undisturbed["sha256"]
    assert states.keys() == []
