"""`handler.py` with two ranks for two GPUs, as it runs on the platform."""

import base64
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from local_endpoint import JobRecord, LocalEndpoint, WorkerProcess
from tests.multi_gpu.jobs import rank_process_of
from worker.settings import SECRET_NAMES

ROOT = Path(__file__).parents[2]
JOB_SECONDS = 300.0  # far more than a small job takes
MANY_STEPS = 100  # for a job that has to be met while it runs


@pytest.fixture(scope="session")
def make_job(
    make_portrait: Callable[..., bytes], make_speech: Callable[..., bytes]
) -> Callable[..., Any]:
    portrait = base64.b64encode(make_portrait()).decode()
    speech = base64.b64encode(make_speech(seconds=0.4)).decode()

    def make(**changes: Any) -> dict[str, dict[str, Any]]:
        small = {"resolution": 256, "num_inference_steps": 1, "image": portrait, "audio": speech}
        return {"input": small | changes}

    return make


@pytest.fixture
def start_worker(
    own_endpoint: LocalEndpoint, worker_environment: Mapping[str, str], tmp_path: Path
) -> Iterator[Callable[..., WorkerProcess]]:
    """Starts a worker of two ranks, ready for jobs of `own_endpoint`."""
    workers = []

    def start(script: Path = ROOT / "handler.py", **environment: str) -> WorkerProcess:
        two = {**worker_environment, "NUM_GPUS": "2", **environment}
        worker = WorkerProcess(own_endpoint, tmp_path / "w", script=script, environment=two)
        workers.append(worker)
        worker.start()
        worker.wait_until_polling(JOB_SECONDS)
        return worker

    yield start
    for worker in workers:
        worker.kill()


def meet_denoising(endpoint: LocalEndpoint, job_id: str) -> None:
    def is_denoising(job: JobRecord) -> bool:
        return any(payload["step"] for payload in job.progress)

    endpoint.wait_until(job_id, is_denoising, JOB_SECONDS)


def require_gone(process: psutil.Process, seconds: float = 60.0) -> None:
    _, alive = psutil.wait_procs([process], seconds)
    assert alive == []


def require_retry_and_a_new_worker(job: JobRecord, worker: WorkerProcess) -> None:
    assert job.status == "FAILED"
    assert job.error is not None
    assert job.error.startswith("GENERATION_FAILED: ")
    assert job.output["error_info"]["retryable"] is True
    assert job.output["error_info"]["stage"] == "denoise"
    assert job.stop_pod
    assert worker.wait(timeout_seconds=60.0) == 1
    assert list(worker.temporary_directory.iterdir()) == []


def test_jobs_are_made_cancelled_and_lost_with_a_rank_process(
    own_endpoint: LocalEndpoint,
    start_worker: Callable[..., WorkerProcess],
    make_job: Callable[..., Any],
) -> None:
    worker = start_worker()
    rank_process = rank_process_of(worker.pid)
    assert not [name for name in rank_process.environ() if SECRET_NAMES.search(name)]
    assert "BUCKET_SECRET_ACCESS_KEY" in psutil.Process(worker.pid).environ()
    cancelled_id = own_endpoint.submit(make_job(num_inference_steps=MANY_STEPS))
    next_id = own_endpoint.submit(make_job(seed=7))
    meet_denoising(own_endpoint, cancelled_id)
    own_endpoint.cancel(cancelled_id)
    following = own_endpoint.wait(next_id, JOB_SECONDS)
    assert own_endpoint.state(cancelled_id).status == "CANCELLED"
    assert following.status == "COMPLETED"
    assert following.output["metrics"]["num_gpus"] == 2

    lost_id = own_endpoint.submit(make_job(num_inference_steps=MANY_STEPS))
    meet_denoising(own_endpoint, lost_id)
    rank_process.kill()
    killed_at = time.monotonic()
    lost = own_endpoint.wait(lost_id, JOB_SECONDS)
    assert time.monotonic() - killed_at < 30.0
    require_retry_and_a_new_worker(lost, worker)
    assert "GPU 1: its process was killed by signal 9" in worker.log


@pytest.mark.slow
def test_a_job_is_given_up_though_its_thread_waits_for_the_other_gpu_for_ever(
    own_endpoint: LocalEndpoint,
    start_worker: Callable[..., WorkerProcess],
    make_job: Callable[..., Any],
) -> None:
    script = ROOT / "tests" / "multi_gpu" / "hanging_handler.py"
    worker = start_worker(script, RANK_FAULT="hang", PYTHONPATH=str(ROOT))
    family = psutil.Process(worker.pid).children(recursive=True)
    job = own_endpoint.wait(
        own_endpoint.submit(make_job(num_inference_steps=MANY_STEPS)), JOB_SECONDS
    )
    require_retry_and_a_new_worker(job, worker)
    for process in family:
        require_gone(process)


@pytest.mark.slow
def test_a_worker_that_loses_a_rank_process_between_jobs_ends(
    own_endpoint: LocalEndpoint, start_worker: Callable[..., WorkerProcess]
) -> None:
    worker = start_worker()
    rank_process_of(worker.pid).kill()
    assert worker.wait(timeout_seconds=60.0) == 1


@pytest.mark.slow
def test_sigterm_lets_the_running_job_finish_and_no_process_stays(
    own_endpoint: LocalEndpoint,
    start_worker: Callable[..., WorkerProcess],
    make_job: Callable[..., Any],
) -> None:
    worker = start_worker()
    family = psutil.Process(worker.pid).children(recursive=True)
    job_id = own_endpoint.submit(make_job(num_inference_steps=6))
    meet_denoising(own_endpoint, job_id)
    for process in (psutil.Process(worker.pid), rank_process_of(worker.pid)):
        process.terminate()  # as a terminal does: all of them get it
    assert own_endpoint.wait(job_id, JOB_SECONDS).status == "COMPLETED"
    assert worker.wait(timeout_seconds=60.0) == 0
    for process in family:
        require_gone(process)
    assert list(worker.temporary_directory.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("when", ["idle", "at work"])
def test_a_worker_that_is_killed_takes_its_rank_process_with_it(
    own_endpoint: LocalEndpoint,
    start_worker: Callable[..., WorkerProcess],
    make_job: Callable[..., Any],
    when: str,
) -> None:
    worker = start_worker()
    rank_process = rank_process_of(worker.pid)
    if when == "at work":
        meet_denoising(own_endpoint, own_endpoint.submit(make_job(num_inference_steps=MANY_STEPS)))
    psutil.Process(worker.pid).kill()
    require_gone(rank_process)
