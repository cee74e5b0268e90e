"""Receivers of webhooks that do not let go: each call ends, and so does the calling."""

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from local_endpoint import webhooks
from local_endpoint.job_queue import WEBHOOK_ATTEMPTS, JobQueue, Webhook
from local_endpoint.webhooks import call

TIMEOUT_SECONDS = 1.0
OK = b"HTTP/1.1 200 OK\r\n"


def endless(connection: socket.socket, head: bytes, part: bytes, pause: float = 0.0) -> None:
    connection.sendall(head)
    while True:
        connection.sendall(part)
        time.sleep(pause)


def bomb(connection: socket.socket) -> None:
    """A MiB of zeros, compressed, a thousand times over: one stream that becomes a GiB."""
    member = gzip.compress(bytes(2**20))
    head = OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % (1024 * len(member))
    connection.sendall(head)
    for _ in range(1024):
        connection.sendall(member)


# What the receiver does with the connection, and whether its 200 counts.
RECEIVERS: dict[str, tuple[Callable[[socket.socket], Any], bool]] = {
    "an endless body": (lambda c: endless(c, OK + b"\r\n", bytes(65536)), True),
    "endless chunks": (
        lambda c: endless(c, OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        True,
    ),
    "a dripping body": (lambda c: endless(c, OK + b"Content-Length: 999\r\n\r\n", b"x", 0.1), True),
    "a gzip bomb": (bomb, True),
    "a body of a length that never comes": (
        lambda c: endless(c, OK + b"Content-Length: 1000000000000000\r\n\r\n", b"", 5),
        True,
    ),
    "endless headers": (lambda c: endless(c, OK, b"X-A: " + b"a" * 1000 + b"\r\n"), False),
    "a header without end": (lambda c: endless(c, OK + b"X-A: ", b"a" * 65536), False),
    "dripping headers": (lambda c: endless(c, OK, b"X", 0.1), False),
    "endless continues": (
        lambda c: endless(c, b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
        False,
    ),
    "early hints": (lambda c: endless(c, b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.01), False),
    "no answer": (lambda c: time.sleep(5), False),
    "a hang-up": (lambda c: None, False),
    "no HTTP": (lambda c: c.sendall(b"\x00" * 100), False),
    "a status of its own": (lambda c: c.sendall(b"HTTP/1.1 999 ?\r\n\r\n"), False),
    "a redirect": (
        lambda c: c.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\n\r\n"),
        False,
    ),
    "a redirect to itself": (
        lambda c: c.sendall(b"HTTP/1.1 308 Again\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"),
        False,
    ),
    "no content": (lambda c: c.sendall(b"HTTP/1.1 204 No Content\r\n\r\n"), False),
    "another protocol": (
        lambda c: c.sendall(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
        False,
    ),
}


@contextlib.contextmanager
def receiver(answer: Callable[[socket.socket], Any]) -> Iterator[str]:
    """The address of a socket that reads a request and then does as it likes."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/hook"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("kind", RECEIVERS)
def test_a_call_ends_whatever_the_receiver_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    answer, counts = RECEIVERS[kind]
    tracemalloc.start()
    try:
        with receiver(answer) as url:
            begun = time.monotonic()
            taken = asyncio.run(call(Webhook("job", url, {"id": "job"})))
            took_seconds = time.monotonic() - begun
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert taken is counts
    assert took_seconds < 10 * TIMEOUT_SECONDS  # the machine may be busy; without a limit: for ever
    assert peak_bytes < 64 * 2**20


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://0.0.0.0:9/",
        "http://[::]:9/",
        "http://[fe80::1]/",
        "http://[fec0::1]/",
        "http://[64:ff9b::a00:1]/",
        "http://[2002:a00:1::]/",
        "http://100.64.0.1/",
        "http://192.0.0.8/",
        "http://[3fff::1]/",
        "http://167772161/",
        "http://0x0a.1/",
        "http://012.0.0.1/",
        "http://10.0.0.1./",
        "http://user:m4rk@10.0.0.1/",
        "http://" + "a" * 300 + ".example/",
        "http://a..b/",
        "http://\u2488/",
        "http://[::1",
        "http://host:99999/",
        "http://host:port/",
        "gopher://example.com/",
        "http:///path",
        "",
    ],
)
def test_an_address_that_must_not_be_called_is_not(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert asyncio.run(call(Webhook("job", url, {}))) is False
    assert "m4rk" not in caplog.text
    assert "HTTP" not in caplog.messages[0]  # nobody has answered


def test_a_body_that_is_no_json_is_a_call_that_failed() -> None:
    assert asyncio.run(call(Webhook("job", "http://127.0.0.1:9/", {"x": object()}))) is False


def test_an_address_is_called_three_times_even_if_each_call_ends_the_process(
    tmp_path: Path,
) -> None:
    for _ in range(WEBHOOK_ATTEMPTS):
        queue = JobQueue(tmp_path / "queue")  # of a new process
        if queue.get("job") is None:
            queue.add({"input": {}, "webhook": "http://127.0.0.1:9/"}, job_id="job")
            queue.cancel("job")
        assert [each.job_id for each in queue.claim_webhooks(8, ())] == ["job"]
        queue.close()

    queue = JobQueue(tmp_path / "queue")
    assert queue.claim_webhooks(8, ()) == []
    queue.close()


def test_no_more_calls_are_under_way_than_may_be(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "queue")
    for number in range(20):
        queue.add({"input": {}, "webhook": "http://127.0.0.1:9/"}, job_id=f"job-{number}")
        queue.cancel(f"job-{number}")

    first = queue.claim_webhooks(8, ())
    assert len(first) == 8
    assert queue.claim_webhooks(8, {each.job_id for each in first}) == []
    queue.webhook_answered(first[0].job_id, taken=True, retry_seconds=60)
    [another] = queue.claim_webhooks(8, {each.job_id for each in first[1:]})
    assert another.job_id not in {each.job_id for each in first}
    queue.close()


@pytest.mark.parametrize("place", ["top", "input"])
def test_a_webhook_tells_of_a_job_without_its_bucket(tmp_path: Path, place: str) -> None:
    bucket = {"accessSecret": "m4rked-secret"}
    names = ("s3Config", "S3config", "s3_config", "bucketConfig")
    given = dict.fromkeys(names, bucket)
    request = {"input": {"prompt": "x"}, "webhook": "http://127.0.0.1:9/"}
    request = (
        {**request, **given} if place == "top" else {**request, "input": {"prompt": "x", **given}}
    )
    queue = JobQueue(tmp_path / "queue")
    queue.add(request, job_id="job")
    assert "m4rked-secret" in json.dumps(queue.claim("worker"))  # who needs it
    queue.post("job", "worker", {"error": "E: why"}, lost=False)
    [webhook] = queue.claim_webhooks(8, ())
    assert webhook.body["input"] == {"prompt": "x"}
    assert "m4rked-secret" not in json.dumps(webhook.body)
    queue.close()
