"""The client against an endpoint that answers as it is told, blocking and for asyncio alike."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avatar_client import (
    AsyncAvatarEndpoint,
    AuthenticationError,
    AvatarEndpoint,
    DownloadError,
    EndpointError,
    EndpointUnavailableError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    JobStatus,
    JobTimedOutError,
    RequestRefusedError,
    SignatureError,
    WaitTimeoutError,
    protocol,
)
from avatar_client.contract import signature
from tests.avatar_client.answers import (
    AUDIO,
    CANCEL,
    DONE,
    IMAGE,
    QUEUED,
    RUN,
    RUNNING,
    SECRET_URL,
    STATUS,
)
from tests.avatar_client.client_kinds import KEY, KINDS, clients
from tests.support.scripted_server import CLOSED, Answer, ScriptedServer


@pytest.mark.parametrize("kind", [AvatarEndpoint, AsyncAvatarEndpoint])
def test_the_key_stands_in_no_text_of_the_objects(kind: type[Any]) -> None:
    endpoint = kind("abc", KEY)
    assert KEY not in f"{endpoint!r} {endpoint} {endpoint.job('x')!r} {vars(endpoint)}"


def test_a_result_that_the_worker_did_not_sign_is_no_result(server: ScriptedServer) -> None:
    signing_key = "0123456789abcdef" * 2
    signed = {"seed": 7, "signature": signature.sign(signing_key, "job-1", {"seed": 7}, 60)}
    for kind in KINDS:
        with clients(kind) as make:
            client = make(f"{server.origin}/v2/local", signing_key=signing_key)
            assert signing_key not in f"{client!r} {vars(client)}"
            server.on(STATUS, RUNNING, DONE | {"output": signed})
            assert client.job("job-1").wait().output == signed
            server.on(STATUS, RUNNING, DONE)
            with pytest.raises(SignatureError, match="is not signed"):
                client.job("job-1").wait()
            with pytest.raises(ValueError, match="openssl"):
                make("abc", signing_key="short")


def test_health_is_what_the_endpoint_says(client: Any, server: ScriptedServer) -> None:
    server.on("GET /v2/local/health", {"jobs": {"inQueue": 1}, "workers": {"idle": 2}})
    assert client.health() == {"jobs": {"inQueue": 1}, "workers": {"idle": 2}}


def test_a_job_is_submitted_once_with_the_key(client: Any, server: ScriptedServer) -> None:
    server.on(RUN, QUEUED)
    job = client.submit(IMAGE, AUDIO, prompt="Grüße 🙂")
    (sent,) = server.requests
    assert job.id == "job-1"
    assert sent.headers["Authorization"] == f"Bearer {KEY}"
    assert sent.headers["Content-Type"] == "application/json"
    assert sent.json["input"]["prompt"] == "Grüße 🙂"


@pytest.mark.parametrize("answer", [CLOSED, Answer(500), Answer(503, {"error": "busy"})])
def test_a_job_that_may_have_arrived_is_not_sent_again(
    client: Any, server: ScriptedServer, answer: Answer
) -> None:
    server.on(RUN, answer)
    with pytest.raises(EndpointUnavailableError, match="not known whether the job was queued"):
        client.submit(IMAGE, AUDIO)
    assert len(server.requests) == 1


def test_a_job_that_was_turned_away_is_sent_again_after_the_time_named(
    client: Any, server: ScriptedServer
) -> None:
    server.on(RUN, Answer(429, headers={"Retry-After": "1"}), QUEUED)
    begun = time.monotonic()
    assert client.submit(IMAGE, AUDIO).id == "job-1"
    assert time.monotonic() - begun >= 1.0
    assert len(server.requests) == 2


def test_an_endpoint_that_is_not_there_is_said_to_be_so(make_client: Callable[..., Any]) -> None:
    with ScriptedServer() as server:
        address = f"{server.origin}/v2/local"  # closed when the client protocol
    client = make_client(address)
    with pytest.raises(EndpointUnavailableError) as caught:
        client.submit(IMAGE, AUDIO)
    assert "could not be reached" in str(caught.value)
    assert "not known" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (Answer(401, {"error": f"Bearer {KEY} is wrong"}), AuthenticationError, "API key"),
        (Answer(403), AuthenticationError, "API key"),
        (Answer(404), RequestRefusedError, "no such endpoint"),
        (Answer(413, {"error": "over 10 MB"}), RequestRefusedError, "HTTP 413: over 10 MB"),
        (Answer(400, {"detail": "bad\x1b[31m\nbody"}), RequestRefusedError, "400: bad.* body"),
        (Answer(400, {"error": SECRET_URL}), RequestRefusedError, "example.com/a.mp4"),
        (Answer(400, ["odd"]), RequestRefusedError, "HTTP 400$"),
        (Answer(200, b"<html>"), EndpointUnavailableError, "no JSON object"),
        (
            Answer(200, {"id": "../x", "status": "IN_QUEUE"}),
            EndpointUnavailableError,
            "about a job",
        ),
        (Answer(200, {}), EndpointUnavailableError, "about a job"),
    ],
)
def test_a_refusal_says_why_and_shows_no_secret(
    client: Any, server: ScriptedServer, answer: Answer, kind: type[Exception], text: str
) -> None:
    server.on(RUN, answer)
    with pytest.raises(kind, match=text) as caught:
        client.submit(IMAGE, AUDIO)
    assert isinstance(caught.value, EndpointError)
    for secret in (KEY, "0123secret", "\x1b", "\n"):
        assert secret not in str(caught.value)
    assert len(server.requests) == 1


def test_the_key_follows_no_redirect(client: Any, server: ScriptedServer) -> None:
    elsewhere = server.on("POST /elsewhere", QUEUED)
    server.on(RUN, Answer(307, headers={"Location": elsewhere}))
    with pytest.raises(EndpointUnavailableError, match="redirects"):
        client.submit(IMAGE, AUDIO)
    assert server.asked("POST /elsewhere") == []


def test_a_status_carries_the_progress_of_a_running_job(
    client: Any, server: ScriptedServer
) -> None:
    server.on(STATUS, RUNNING)
    status = client.job("job-1").status()
    assert (status.status, status.is_over, status.output) == ("IN_PROGRESS", False, None)
    assert status.delay_seconds == 1.5
    assert status.progress is not None
    assert (status.progress.progress, status.progress.step) == (0.42, 21)
    assert (status.progress.eta_seconds, status.progress.message) == (236.0, "Denoising 21/50")


def test_a_wait_ends_with_the_result_and_tells_each_status(
    client: Any, server: ScriptedServer
) -> None:
    server.on(STATUS, QUEUED, RUNNING, DONE)
    seen: list[JobStatus] = []
    result = client.job("job-1").wait(on_status=seen.append)
    assert [status.status for status in seen] == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    assert result == seen[-1]
    assert (result.output, result.execution_seconds) == ({"seed": 7}, 2.5)


def test_a_callback_may_be_a_coroutine(server: ScriptedServer) -> None:
    server.on(STATUS, RUNNING, DONE)
    seen: list[str] = []

    async def note(status: JobStatus) -> None:
        await asyncio.sleep(0)
        seen.append(status.status)

    async def wait() -> None:
        url = f"{server.origin}/v2/local"
        async with AsyncAvatarEndpoint(url, KEY, poll_seconds=0.005) as endpoint:
            await endpoint.job("job-1").wait(on_status=note)

    asyncio.run(wait())
    assert seen == ["IN_PROGRESS", "COMPLETED"]


def test_updates_come_one_by_one(client: Any, server: ScriptedServer) -> None:
    server.on(STATUS, QUEUED, RUNNING, DONE)
    statuses = [status.status for status in client.job("job-1").updates()]
    assert statuses == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]


@pytest.mark.parametrize("fault", [CLOSED, Answer(500), Answer(502), Answer(429)])
def test_a_wait_survives_a_few_faults_in_a_row(
    client: Any, server: ScriptedServer, fault: Answer
) -> None:
    server.on(STATUS, RUNNING, fault, fault, fault, fault, DONE)
    assert client.job("job-1").wait().status == "COMPLETED"


@pytest.mark.parametrize("fault", [CLOSED, Answer(500)])
def test_a_wait_ends_when_the_faults_do_not(
    client: Any, server: ScriptedServer, fault: Answer
) -> None:
    server.on(STATUS, fault)
    with pytest.raises(EndpointUnavailableError):
        client.job("job-1").wait()
    assert len(server.requests) == protocol.ATTEMPTS


def test_a_wait_ends_at_the_limit_of_the_caller_and_the_job_goes_on(
    client: Any, server: ScriptedServer
) -> None:
    server.on(STATUS, RUNNING)
    with pytest.raises(WaitTimeoutError, match=r"IN_PROGRESS after 0\.05 s; it goes on") as caught:
        client.job("job-1").wait(timeout_seconds=0.05)
    assert isinstance(caught.value, TimeoutError)
    assert {asked.method for asked in server.requests} == {"GET"}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"status": "FAILED", "error": "INTERNAL: x"}, JobFailedError),
        ({"status": "CANCELLED"}, JobCancelledError),
        ({"status": "TIMED_OUT"}, JobTimedOutError),
    ],
)
def test_a_wait_for_a_job_without_a_result_says_which_end_it_had(
    client: Any, server: ScriptedServer, body: dict[str, str], kind: type[Exception]
) -> None:
    server.on(STATUS, {"id": "job-1", **body})
    with pytest.raises(kind, match="job-1"):
        client.job("job-1").wait()
    with pytest.raises(kind):
        client.job("job-1").download("never.mp4")


def test_a_failed_job_says_what_the_worker_said(client: Any, server: ScriptedServer) -> None:
    error = "INPUT_DOWNLOAD_FAILED: audio: the server answered HTTP 404"
    server.on(STATUS, {"id": "job-1", "status": "FAILED", "error": error})
    with pytest.raises(JobFailedError, match=error) as caught:
        client.job("job-1").wait()
    assert caught.value.code == "INPUT_DOWNLOAD_FAILED"
    assert caught.value.field == "audio"
    assert caught.value.message == "the server answered HTTP 404"
    assert caught.value.retryable


def test_a_job_that_is_forgotten_is_said_to_be_so(client: Any, server: ScriptedServer) -> None:
    server.on(STATUS, Answer(404, {"error": "no"}))
    with pytest.raises(JobNotFoundError, match="no job job-1: a result is kept for 30 minutes"):
        client.job("job-1").status()


@pytest.mark.parametrize(
    "job_id", ["", "../health", "a/b", "a?b", "a%2fb", "a b", "a\n", "x" * 129]
)
def test_what_cannot_be_the_id_of_a_job_never_reaches_a_path(
    client: Any, server: ScriptedServer, job_id: str
) -> None:
    with pytest.raises(JobNotFoundError, match="not the id of a job"):
        client.job(job_id)
    assert server.requests == []


def test_a_job_is_cancelled(client: Any, server: ScriptedServer) -> None:
    server.on(CANCEL, CLOSED, {"id": "job-1", "status": "CANCELLED"})
    assert client.job("job-1").cancel().status == "CANCELLED"


def test_a_job_that_is_not_over_has_no_video(
    client: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    server.on(STATUS, RUNNING)
    with pytest.raises(DownloadError, match="no video yet: it is IN_PROGRESS"):
        client.job("job-1").download(tmp_path / "video.mp4")
