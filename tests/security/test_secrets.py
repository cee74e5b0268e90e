"""A hostile batch with marked secrets through one worker: afterwards they stand nowhere."""

import asyncio
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from local_endpoint.job_queue import JobQueue
from tests.security.conftest import SMALL_INPUT
from tests.support.scripted_server import CLOSED, Answer, ScriptedServer
from worker.service import serve
from worker.service.worker import Worker
from worker.settings import Settings

MARK = "m4rkedS3cret"  # in each of them, so that one search finds all
KEY, SECRET, SIGNATURE = f"AKID{MARK}1", f"{MARK}/+=2~'\"", f"{MARK}3"


def s3(origin: str, **changes: Any) -> dict[str, Any]:
    fixed = {
        "endpointUrl": origin,
        "accessId": KEY,
        "accessSecret": SECRET,
        "bucketName": "bucket",
        "region": "us-east-1",
    }
    return {name: value for name, value in {**fixed, **changes}.items() if value is not None}


def signed(origin: str, path: str) -> str:
    return f"{origin}/{path}?X-Amz-Credential={KEY}&X-Amz-Signature={SIGNATURE}"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """Stores and media servers, each of which tells on its client in its own way."""
    error = f"<Error><Code>{MARK}</Code><Message>{KEY} {SECRET}</Message></Error>".encode()
    with ScriptedServer() as server:
        for method in ("GET", "HEAD", "PUT"):
            for kind, answer in {
                "denied": Answer(status=403, body=error),
                "broken": Answer(status=400, body=error),
                "garbage": Answer(body=SIGNATURE.encode() * 100),
                "closed": CLOSED,
                "moved": Answer(status=301, headers={"Location": signed("http://10.0.0.1", "x")}),
                "loop": Answer(status=302, headers={"Location": f"/loop?{SIGNATURE}"}),
                "odd": Answer(headers={"Last-Modified": SIGNATURE, "x-amz-meta-avatar": SIGNATURE}),
                "cut": Answer(body=bytes(1000), cut_after=10),
            }.items():
                server.on(f"{method} /{kind}", answer)
                server.on(f"{method} /{kind}/bucket/avatar/job-1.mp4", answer)
        yield server


def hostile_jobs(origin: str) -> Iterator[dict[str, Any]]:
    """Jobs that fail in all kinds of ways, each with a secret in it."""

    def job(top: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        return {"id": "job-1", "input": {**SMALL_INPUT, **fields}, **(top or {})}

    for kind in ("denied", "broken", "garbage", "closed", "moved", "loop", "odd", "cut"):
        yield job({"s3Config": s3(f"{origin}/{kind}")})
        yield job(s3Config=s3(f"{origin}/{kind}"))
        yield job(image=signed(origin, kind))
        yield job(audio=signed(origin, kind))
    for host in ("127.0.0.1:9", "10.255.255.1:9", "no-such-host.invalid", "[::1]:9", "x y"):
        yield job({"s3Config": s3(f"http://{host}")})
        yield job(image=f"http://user:{SECRET}@{host}/x?sig={SIGNATURE}")
    for name in ("secretAccessKey", "AccessSecret", "access_secret", "password", "note", "x"):
        yield job({"s3Config": s3(origin, accessSecret=None, **{name: SECRET})})
        yield job(s3Config=s3(origin, **{name: SECRET}))
        yield job(None, **{name: SECRET})
    for value in (SECRET, [SECRET], {"a": {"b": [SECRET]}}, [[SECRET]] * 5):
        yield job({"s3Config": value})
        yield job(s3Config=value)
        yield job({"s3Config": s3(origin, accessId=value)})
        yield job(s3Config=s3(origin, region=value))
        yield job(output={"key": value, "secret": value})
        yield job(image=value, s3Config=s3(origin))
        yield job(seed=value)
    yield job(webhook=signed(origin, "hook"), token=SECRET)
    yield job(s3Config=s3(origin), user_data="\ud800")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Worker:
    """A worker whose engine is never reached: the jobs end before."""
    monkeypatch.setattr(Worker, "_load_once", lambda worker: None)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return Worker(
        Settings(
            runpod_allow_private_download_urls=True,
            store_retry_seconds=0.0,
            download_timeout_seconds=2.0,
        )
    )


@pytest.mark.slow
def test_no_marked_secret_is_in_results_webhooks_logs_process_lists_or_files(
    worker: Worker, server: ScriptedServer, log: Callable[[], str], tmp_path: Path
) -> None:
    queue = JobQueue(tmp_path / "queue")
    jobs = list(hostile_jobs(server.origin))
    assert all(MARK in json.dumps(job) for job in jobs)
    commands = set()
    told: list[str] = []
    for number, job in enumerate(jobs):
        name = f"job-{number}"
        queue.add({**job, "webhook": "https://example.com/"}, job_id=name)
        queue.claim("worker")

        output = asyncio.run(worker.handle(job))

        commands |= {
            " ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)
        }
        assert "error" in output, job
        told.append(json.dumps(output))
        queue.post(name, "worker", {"output": {}} | output, lost=False)
        [webhook] = queue.claim_webhooks(1, ())
        told.append(json.dumps({**webhook.body, "input": None}))
        told.append(json.dumps(webhook.body["input"].get("s3Config")))
        queue.webhook_answered(name, taken=True, retry_seconds=0)
        queue.cancel(name)

    assert len(jobs) > 80
    assert not [text for text in told if MARK in text]
    assert not [line for line in log().splitlines() if MARK in line]
    assert "Traceback" not in "".join(told)
    assert not [command for command in commands if MARK in command]
    files = [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]
    assert not [path for path in files if MARK.encode() in path.read_bytes()]
    queue.close()


def test_an_exception_with_a_secret_in_its_text_tells_it_to_nobody(
    worker: Worker, log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        logging.getLogger("botocore").error("signing with %s", SECRET)
        raise RuntimeError(f"oddly {SECRET!r} and {KEY}")

    monkeypatch.setattr("worker.service.delivery.Storage", fail)
    output = asyncio.run(
        worker.handle({"id": "a", "input": SMALL_INPUT, "s3Config": s3("https://example.com")})
    )
    assert output["error_info"]["code"] == "INTERNAL"
    assert MARK not in json.dumps(output)
    assert "RuntimeError" in log()  # the operator's, without the secret
    assert MARK not in log()


def test_what_fails_around_the_worker_is_no_traceback_for_the_client_either(
    worker: Worker, log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("no session")

    monkeypatch.setattr(serve, "AsyncClientSession", fail)

    async def run() -> dict[str, Any]:
        return await serve.make_handler(worker)({"id": "a", "input": SMALL_INPUT})

    output = asyncio.run(run())
    assert output["error_info"]["code"] == "INTERNAL"
    assert "no session" not in json.dumps(output)
    assert "no session" in log()
