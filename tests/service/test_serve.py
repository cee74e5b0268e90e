"""The SDK's own loop as the worker uses it: its classes, over HTTP, in this process."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from runpod.serverless.modules import rp_http, rp_job

from local_endpoint import JobRecord, LocalEndpoint
from tests.support.scripted_server import Answer, ScriptedServer
from worker.generation.engine import Engine
from worker.service import serve
from worker.service.serve import Scaler, make_handler
from worker.service.worker import Worker
from worker.settings import Settings, keep_logs_from_clients

WORKER_ID = "worker-1"
JOB_SECONDS = 300.0  # far more than a small job takes
END_SECONDS = 20.0  # an idle worker's, on a busy machine: a poll is held for 30


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalEndpoint]:
    """An endpoint that the SDK of this process takes its jobs from; polls are held for 30 s.

    No heartbeats are sent, and none is missed.
    """
    with LocalEndpoint(lost_after_seconds=3600.0) as endpoint:
        take_jobs_from(endpoint, tmp_path, monkeypatch)
        yield endpoint


def take_jobs_from(endpoint: LocalEndpoint, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = endpoint.worker_environment(WORKER_ID, home)
    monkeypatch.setenv("RUNPOD_AI_API_KEY", told["RUNPOD_AI_API_KEY"])
    # the SDK reads these once, when it is imported
    take_url = told["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", WORKER_ID)
    done_url = told["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$RUNPOD_POD_ID", WORKER_ID)
    monkeypatch.setattr(rp_job, "JOB_GET_URL", take_url)
    monkeypatch.setattr(rp_http, "JOB_DONE_URL", done_url)
    monkeypatch.setattr(serve, "IS_LOCAL_TEST", False)


@pytest.fixture
def failing_platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    """A platform whose answer to a poll is an error."""
    with ScriptedServer() as server:
        take_url = server.on(f"GET /job-take/{WORKER_ID}", Answer(status=500))
        monkeypatch.setattr(rp_job, "JOB_GET_URL", f"{take_url}?gpu=local")
        yield server


@pytest.fixture
def worker(engine: Engine) -> Worker:
    return Worker(Settings(), engine)


def serve_during(
    worker: Worker, act: Callable[[Scaler], Awaitable[Any]], timeout_seconds: float
) -> None:
    """Runs the loop beside `act`, and waits so long after it for the loop's own end."""

    async def run() -> None:
        scaler = Scaler(worker, {"handler": make_handler(worker)})
        serving = asyncio.create_task(scaler.run())
        await act(scaler)
        await asyncio.wait_for(serving, timeout_seconds)

    asyncio.run(run())


def break_gpu(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has each job end as one whose GPU context is lost."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.pipeline, "denoise", fail)


async def until_polling(platform: LocalEndpoint) -> None:
    assert await asyncio.to_thread(platform.wait_for_worker, WORKER_ID, JOB_SECONDS)


def test_a_job_is_run_with_its_progress_and_its_result(
    platform: LocalEndpoint, worker: Worker, make_input: Callable[..., dict[str, Any]]
) -> None:
    job_id = platform.submit({"input": make_input()})

    async def act(scaler: Scaler) -> None:
        await asyncio.to_thread(platform.wait, job_id, JOB_SECONDS)
        scaler.kill_worker()

    serve_during(worker, act, END_SECONDS)
    job = platform.state(job_id)
    assert (job.status, job.error) == ("COMPLETED", None)
    assert job.output["delivery"] == "inline"
    assert job.progress[-1]["stage"] == "upload"


def test_a_stop_ends_an_idle_worker_promptly_and_takes_no_job(
    platform: LocalEndpoint, worker: Worker, make_input: Callable[..., dict[str, Any]]
) -> None:
    async def act(scaler: Scaler) -> None:
        await until_polling(platform)
        scaler.kill_worker()

    serve_during(worker, act, END_SECONDS)  # the poll is held for 30 s
    job_id = platform.submit({"input": make_input()})
    time.sleep(0.2)
    assert platform.state(job_id).status == "IN_QUEUE"


def test_a_job_that_comes_as_the_worker_stops_is_run(
    platform: LocalEndpoint,
    worker: Worker,
    make_input: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "LAST_POLL_SECONDS", 25.0)  # a busy machine sends the job late
    ids = []

    async def act(scaler: Scaler) -> None:
        await until_polling(platform)
        scaler.kill_worker()
        ids.append(await asyncio.to_thread(platform.submit, {"input": make_input()}))

    serve_during(worker, act, JOB_SECONDS)
    assert platform.state(ids[0]).status == "COMPLETED"


def test_a_stop_lets_the_running_job_finish_and_takes_no_further_one(
    platform: LocalEndpoint, worker: Worker, make_input: Callable[..., dict[str, Any]]
) -> None:
    running, waiting = (
        platform.submit({"input": make_input(num_inference_steps=4)}) for _ in range(2)
    )

    async def act(scaler: Scaler) -> None:
        await asyncio.to_thread(platform.wait_until, running, is_told, JOB_SECONDS)
        scaler.kill_worker()

    serve_during(worker, act, JOB_SECONDS)
    assert platform.state(running).status == "COMPLETED"
    assert platform.state(waiting).status == "IN_QUEUE"


def is_told(job: JobRecord) -> bool:
    return bool(job.progress)


def test_the_sdk_attaches_no_log_to_a_failed_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_LOG_CAPTURE", "all")
    keep_logs_from_clients()
    assert os.environ["RUNPOD_LOG_CAPTURE"] == "off"
    if find_spec("runpod.serverless.modules.rp_capture"):  # from version 2.0 on
        from runpod.serverless.modules import rp_capture

        assert not rp_capture.handler_capture_enabled()
        assert rp_capture.capture_mode() == rp_capture.CAPTURE_OFF


def test_a_failing_poll_is_repeated_after_a_pause(
    failing_platform: ScriptedServer, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "RETRY_SECONDS", 0.25)

    take = f"GET /job-take/{WORKER_ID}"
    begun = time.monotonic()

    async def act(scaler: Scaler) -> None:
        while len(failing_platform.asked(take)) < 4:
            await asyncio.sleep(0.02)
        assert time.monotonic() - begun >= 3 * serve.RETRY_SECONDS
        scaler.kill_worker()

    serve_during(worker, act, JOB_SECONDS)


def test_a_worker_that_a_job_has_damaged_takes_no_further_one(
    platform: LocalEndpoint,
    worker: Worker,
    engine: Engine,
    make_input: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_gpu(engine, monkeypatch)
    first, second = (platform.submit({"input": make_input()}) for _ in range(2))

    async def act(_: Scaler) -> None:
        await asyncio.to_thread(platform.wait, first, JOB_SECONDS)

    serve_during(worker, act, END_SECONDS)
    failed = platform.state(first)
    assert (failed.status, failed.stop_pod) == ("FAILED", True)
    assert failed.error is not None
    assert failed.error.startswith("GENERATION_FAILED: ")
    assert platform.state(second).status == "IN_QUEUE"


def test_a_worker_that_is_damaged_while_it_has_no_job_of_the_queue_ends(
    platform: LocalEndpoint,
    worker: Worker,
    engine: Engine,
    make_input: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_gpu(engine, monkeypatch)

    async def act(_: Scaler) -> None:
        await until_polling(platform)
        output = await worker.handle({"id": "job-1", "input": make_input()})
        assert output["refresh_worker"]

    serve_during(worker, act, serve.WATCH_SECONDS + END_SECONDS)
