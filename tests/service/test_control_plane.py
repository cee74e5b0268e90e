"""What becomes of takes and results where the control plane is not as it should be.

The SDK's own session speaks to a scripted server over real sockets.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from runpod.http_client import AsyncClientSession, TooManyRequests
from runpod.serverless.modules import rp_http, rp_job

from tests.support.scripted_server import CLOSED, Answer, ScriptedServer
from tests.support.waiting import AT_ONCE_SECONDS
from worker.service import control_plane, serve
from worker.service.serve import Scaler

DONE = "POST /job-done/worker-1/job-1"
TAKE = "GET /job-take/worker-1"
JOB = {"id": "job-1"}
RESULT = {"output": {"key": "avatar/job-1.mp4", "user_data": "Grüße"}}


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        done = f"{server.origin}/job-done/worker-1/$ID?gpu=local"
        monkeypatch.setattr(rp_http, "JOB_DONE_URL", done)
        monkeypatch.setattr(rp_job, "JOB_GET_URL", f"{server.origin}/job-take/worker-1?gpu=local")
        monkeypatch.setattr(control_plane, "FIRST_PAUSE_SECONDS", 0.05)
        yield server


def send(retry_seconds: float = 20.0, kept: str = "in the bucket") -> tuple[Any, list[Any]]:
    """Whether a result was taken, and what was kept of it meanwhile."""
    keeps = []

    async def keep(payload: Any) -> str:
        keeps.append(payload)
        return kept

    async def run() -> bool:
        async with AsyncClientSession() as session:
            return await control_plane.send_result(
                session, RESULT, JOB, retry_seconds=retry_seconds, keep=keep
            )

    return asyncio.run(run()), keeps


def take() -> list[dict[str, Any]] | None:
    async def run() -> list[dict[str, Any]] | None:
        async with AsyncClientSession() as session:
            return await control_plane.take(session)

    return asyncio.run(run())


# Results


def test_a_result_that_is_taken_is_sent_once(platform: ScriptedServer) -> None:
    platform.on(DONE, Answer(body=b"ok"))

    assert send() == (True, [])

    [asked] = platform.asked(DONE)
    assert json.loads(asked.body) == RESULT
    assert "isStream=false" in asked.path
    assert asked.headers["X-Request-ID"] == "job-1"


FAULTS = {
    "connection cut": CLOSED,
    "a proxy's page": Answer(body=b"\n<!DOCTYPE html><p>Sign in"),
    "a redirect": Answer(status=302, headers={"Location": "/elsewhere"}),
    "answer cut in its middle": Answer(body=b"x" * 100, cut_after=10),
    **{f"HTTP {s}": Answer(status=s) for s in (401, 403, 404, 408, 429, 500, 502, 503, 504, 524)},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_sent_again_until_it_is_over(platform: ScriptedServer, fault: Answer) -> None:
    platform.on(DONE, fault, fault, fault, fault, Answer(body=b"ok"))

    is_taken, keeps = send()

    assert is_taken
    assert len(platform.asked(DONE)) == 5
    assert keeps == [RESULT]  # after the first try, since the process may be killed meanwhile


def test_a_server_that_is_gone_for_a_while_gets_the_result(
    platform: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rp_http, "JOB_DONE_URL", "http://127.0.0.1:9/done/$ID?gpu=local")

    async def come_back() -> None:
        await asyncio.sleep(0.5)
        platform.on(DONE, Answer(body=b"ok"))
        done = f"{platform.origin}/job-done/worker-1/$ID?gpu=local"
        monkeypatch.setattr(rp_http, "JOB_DONE_URL", done)

    async def run() -> bool:
        back = asyncio.create_task(come_back())
        async with AsyncClientSession() as session:
            is_taken = await control_plane.send_result(
                session, RESULT, JOB, retry_seconds=20, keep=nowhere
            )
        await back
        return is_taken

    assert asyncio.run(run())


async def nowhere(_: Any) -> None:
    return None


def test_an_answer_that_never_comes_is_not_waited_for(
    platform: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_plane, "ANSWER_SECONDS", 0.3)
    platform.on(DONE, Answer(delay_seconds=60), Answer(body=b"ok"))
    begun = time.monotonic()

    is_taken, _ = send()

    assert is_taken
    assert time.monotonic() - begun < AT_ONCE_SECONDS


def test_the_server_says_when_to_ask_again(platform: ScriptedServer) -> None:
    platform.on(DONE, Answer(status=503, headers={"Retry-After": "1"}), Answer(body=b"ok"))
    begun = time.monotonic()

    assert send()[0]

    assert time.monotonic() - begun >= 1


@pytest.mark.parametrize("status", control_plane.REFUSED)
def test_a_body_that_is_refused_is_not_sent_for_minutes(
    platform: ScriptedServer, status: int
) -> None:
    platform.on(DONE, Answer(status=status))

    assert send(retry_seconds=600) == (False, [RESULT])

    assert len(platform.asked(DONE)) == control_plane.REFUSALS


def test_when_the_time_is_over_the_log_says_where_the_result_is(
    platform: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    platform.on(DONE, CLOSED)

    is_taken, _ = send(retry_seconds=0.5, kept="in the bucket avatars under a.mp4.json")

    assert not is_taken
    assert "it is in the bucket avatars under a.mp4.json" in caplog.text
    assert "gpu=local" not in caplog.text


# Takes


def test_a_job_is_taken_as_it_comes(platform: ScriptedServer) -> None:
    platform.on(TAKE, {"id": "job-1", "input": {"a": 1}, "webhook": "https://h/x"})

    assert take() == [{"id": "job-1", "input": {"a": 1}, "webhook": "https://h/x"}]


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"id": "job-1"}, [{"id": "job-1", "input": None}]),
        ({"id": 17, "input": {}}, [{"id": "17", "input": {}}]),
        ([{"id": "a", "input": {}}], [{"id": "a", "input": {}}]),
        ({"input": {}}, None),
        ([], None),
        ("a job", None),
    ],
)
def test_a_job_that_is_not_as_it_should_be_reaches_the_handler(
    platform: ScriptedServer, job: Any, expected: Any
) -> None:
    platform.on(TAKE, Answer(body=json.dumps(job).encode()))

    assert take() == expected


EMPTY = {
    "400 under FlashBoot": Answer(status=400),
    "204": Answer(status=204),
    "nothing": Answer(body=b""),
    "a proxy's page": Answer(body=b"<html>", headers={"Content-Type": "text/html"}),
}


@pytest.mark.parametrize("answer", EMPTY.values(), ids=EMPTY)
def test_an_answer_without_a_job_takes_a_second_however_soon_it_comes(
    platform: ScriptedServer, answer: Answer
) -> None:
    platform.on(TAKE, answer)
    begun = time.monotonic()

    assert take() is None

    assert 1.0 <= time.monotonic() - begun < AT_ONCE_SECONDS


def test_too_many_requests_is_the_sdks_own_matter(platform: ScriptedServer) -> None:
    platform.on(TAKE, Answer(status=429))

    with pytest.raises(TooManyRequests):
        take()


# Stops


@pytest.mark.parametrize("waits_seconds", [0.0, serve.EARLY_STOP_SECONDS + 0.1])
def test_a_stop_that_comes_before_its_job_has_a_task_is_obeyed(
    platform: ScriptedServer, waits_seconds: float
) -> None:
    handled = []

    async def handler(job: dict[str, Any]) -> dict[Any, Any]:
        await asyncio.sleep(0)
        handled.append(job["id"])
        return {}

    whole: Any = SimpleNamespace(damaged=False)

    async def run() -> bool:
        platform.on(DONE, Answer(body=b"ok"))
        scaler = Scaler(whole, {"handler": handler})
        job = {"id": "job-1", "input": {}}
        async with AsyncClientSession() as session:
            await scaler.stop_job("job-1")
            await asyncio.sleep(waits_seconds)
            await scaler.jobs_queue.put(job)
            await scaler.jobs_queue.get()
            scaler.job_progress.add(job)
            task = asyncio.create_task(scaler.handle_job(session, job))
            await asyncio.wait({task})
        return task.cancelled()

    assert asyncio.run(run()) is (waits_seconds == 0.0)
    assert handled == ([] if waits_seconds == 0.0 else ["job-1"])
