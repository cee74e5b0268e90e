"""`python -m local_endpoint`, its processes killed: no job is lost, none has two results."""

import json
import os
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from local_endpoint import Fleet, LocalEndpoint
from tests.conftest import ONE_THREAD
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
STEPS = 8  # a job that can be met while it runs
JOB_SECONDS = 300.0


class Served:
    """The command in a process of its own, on a port that it keeps when it starts again."""

    def __init__(self, state: Path, model_dir: Path, *, workers: int) -> None:
        with LocalEndpoint() as free:
            self.port = int(free.origin.rpartition(":")[2])
        self.state = state
        self.model_dir = model_dir
        self.workers = workers
        self.url = f"http://127.0.0.1:{self.port}/v2/local"
        self.start()

    def start(self) -> None:
        arguments = ["--port", str(self.port), "--state", str(self.state)]
        environment = {
            "PATH": os.defpath,
            "MODEL_DIR": str(self.model_dir),
            "RUNPOD_API_KEY": "a-key",
            **ONE_THREAD,
        }
        with (self.state.parent / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "local_endpoint",
                    *arguments,
                    "--workers",
                    str(self.workers),
                ],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.client = httpx.Client(base_url=self.url, headers={"Authorization": "Bearer a-key"})
        self.until(lambda: self.client.get("/health").status_code == 200)

    def kill(self) -> None:
        """Ends the endpoint alone, as an accident would."""
        self.process.kill()
        self.process.wait()
        self.client.close()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(300)
        self.client.close()

    def until(self, condition: Any, timeout_seconds: float = 300.0) -> Any:
        deadline = time.monotonic() + timeout_seconds
        while True:
            with suppress(httpx.TransportError):
                if result := condition():
                    return result
            assert time.monotonic() < deadline, (self.state.parent / "log").read_text()
            time.sleep(0.1)

    def submit(self, job: dict[str, Any]) -> Any:
        return self.client.post("/run", json=job).json()["id"]

    def status(self, job_id: str) -> Any:
        return self.client.get(f"/status/{job_id}").json()

    def until_denoising(self, job_id: str) -> Any:
        """The job once it has made a step."""

        def denoising() -> Any:
            state = self.status(job_id)
            step = state["status"] == "IN_PROGRESS" and state.get("output", {}).get("step")
            return state if step else None

        return self.until(denoising)

    def until_over(self, job_id: str) -> Any:
        def over() -> Any:
            state = self.status(job_id)
            return None if state["status"].startswith("IN_") else state

        return self.until(over, JOB_SECONDS)

    def worker_process(self, worker_id: str) -> psutil.Process:
        for process in psutil.process_iter(["environ"]):
            found = (process.info["environ"] or {}).get("RUNPOD_POD_ID") == worker_id
            if found and process.parent().pid in (self.process.pid, 1):
                return process
        raise AssertionError(worker_id)


@pytest.fixture
def job(
    make_portrait: Callable[..., bytes], make_speech: Callable[..., bytes]
) -> dict[str, dict[str, Any]]:
    media = {"image": make_portrait(), "audio": make_speech(seconds=1.0)}
    encoded = {name: b64encode(content).decode() for name, content in media.items()}
    return {"input": {"resolution": 256, "num_inference_steps": STEPS, **encoded}}


@pytest.fixture
def served(tmp_path: Path, random_model: Path) -> Iterator[Served]:
    served = Served(tmp_path / "state", random_model, workers=2)
    yield served
    served.stop()


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def require_video(state: Any) -> None:
    assert (state["status"], state.get("error")) == ("COMPLETED", None)
    content = httpx.get(state["output"]["video_url"]).raise_for_status().content
    assert sha256(content).hexdigest() == state["output"]["sha256"]


@pytest.mark.slow
def test_the_job_of_a_killed_worker_is_finished_by_another_one(
    served: Served, job: dict[str, dict[str, Any]]
) -> None:
    served.until(lambda: served.client.get("/health").json()["workers"]["idle"] == 2)
    job_id = served.submit(job)
    first = served.until_denoising(job_id)

    served.worker_process(first["workerId"]).send_signal(signal.SIGKILL)

    done = served.until_over(job_id)
    require_video(done)
    assert done["workerId"] != first["workerId"]
    served.until(lambda: served.client.get("/health").json()["workers"]["idle"] >= 2)


@pytest.mark.slow
def test_a_killed_endpoint_starts_again_with_its_jobs_and_its_workers(
    served: Served, job: dict[str, dict[str, Any]]
) -> None:
    earlier_id = served.submit({**job, "input": {**job["input"], "num_inference_steps": 1}})
    earlier = served.until_over(earlier_id)
    require_video(earlier)
    running_id = served.submit(job)
    waiting_ids = [
        served.submit({**job, "input": {**job["input"], "num_inference_steps": 1}})
        for _ in range(3)
    ]
    running = served.until_denoising(running_id)

    served.kill()
    time.sleep(1.0)
    served.start()

    assert served.status(earlier_id) == earlier
    assert httpx.get(earlier["output"]["video_url"]).status_code == 404  # it went with the store
    done = served.until_over(running_id)
    require_video(done)
    assert done["workerId"] == running["workerId"]  # it went on meanwhile
    for job_id in waiting_ids:
        require_video(served.until_over(job_id))
    counts = served.client.get("/health").json()["jobs"]
    assert (counts["completed"], counts["failed"], counts["inQueue"]) == (5, 0, 0)


@pytest.mark.slow
def test_a_stopped_endpoint_leaves_no_process_and_finishes_its_jobs_after_the_next_start(
    served: Served, job: dict[str, dict[str, Any]]
) -> None:
    job_id = served.submit(job)
    worker_id = served.until_denoising(job_id)["workerId"]
    worker = served.worker_process(worker_id)
    family = [worker, *worker.children(recursive=True)]

    served.stop()
    assert not [process for process in family if is_alive(process)]
    served.start()

    require_video(served.until_over(job_id))


def test_a_handler_that_ends_at_once_is_not_started_again_and_again(tmp_path: Path) -> None:
    script = tmp_path / "handler.py"
    script.write_text("raise SystemExit(1)")
    begun = time.monotonic()
    started = tmp_path / "state" / "workers"
    with (
        LocalEndpoint(tmp_path / "state") as endpoint,
        Fleet(endpoint, 1, environment={}, script=script),
    ):
        wait_until(lambda: len(list(started.iterdir())) >= 3)
        assert time.monotonic() - begun > 2.0  # pauses of 1, 2, 4 seconds


@pytest.mark.parametrize("store_url", ["http://127.0.0.1:1", "http://127.0.0.1:2", None])
def test_a_worker_is_kept_only_if_it_delivers_where_the_next_ones_do(
    tmp_path: Path, store_url: Any
) -> None:
    """The fleet's notes tell of a worker that outlived its endpoint: here, one that sleeps."""
    script = tmp_path / "handler.py"
    script.write_text("import time; time.sleep(60)")
    earlier = subprocess.Popen([sys.executable, script], start_new_session=True)
    environment = {"BUCKET_ENDPOINT_URL": store_url} if store_url else {}
    with LocalEndpoint(tmp_path / "state") as endpoint:
        note = {"worker_id": "earlier", "pid": earlier.pid}
        note["created"] = psutil.Process(earlier.pid).create_time()
        note["urls"] = [endpoint.url, "http://127.0.0.1:1"]
        (endpoint.directory / "workers.json").write_text(json.dumps([note]))
        with Fleet(endpoint, 1, environment=environment, script=script) as fleet:
            is_kept = "earlier" in fleet.processes
            # whoever ends it may also have read its status: then there is no such process
            is_there = psutil.pid_exists(earlier.pid) and is_alive(psutil.Process(earlier.pid))
            assert is_there == is_kept
    assert is_kept == (store_url == "http://127.0.0.1:1")
    earlier.wait(10)
