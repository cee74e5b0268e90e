"""An endpoint and a store that mean the client ill: bounded, and an error that says so."""

import gzip
import hashlib
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from avatar_client import DownloadError, EndpointError, EndpointUnavailableError, protocol
from avatar_client.download import MAX_VIDEO_BYTES, Video
from avatar_client.responses import JobError, JobStatus, Progress, plain
from studio import views
from tests.avatar_client.client_kinds import KINDS, clients
from tests.support.scripted_server import Answer, ScriptedServer

STATUS = "GET /v2/local/status/job-1"
SHA256 = hashlib.sha256(b"video").hexdigest()
DEEP = "[" * 50_000 + "]" * 50_000


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, server: ScriptedServer) -> Iterator[Any]:
    with clients(request.param) as make:
        yield make(f"{server.origin}/v2/local")


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=bytes(40 * 2**20)),
        Answer(body=gzip.compress(bytes(400_000_000), 9), headers={"Content-Encoding": "gzip"}),
        Answer(body=DEEP.encode()),
        Answer(body=b'{"id": ' + b"9" * 100_000 + b"}"),
        Answer(body=b"\xff\xfe"),
        Answer(body=b"[]"),
        Answer(body={"id": {"a": 1}, "status": []}),
        Answer(body={"id": "../../etc", "status": "COMPLETED"}),
        Answer(body=b"x", headers={"Content-Encoding": "gzip"}),
    ],
    ids=range(9),
)
def test_an_answer_that_is_none_is_an_error_and_takes_no_memory(
    client: Any, server: ScriptedServer, answer: Answer
) -> None:
    server.on(STATUS, answer)
    tracemalloc.start()
    try:
        with pytest.raises(EndpointError):
            client.job("job-1").status()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 300 * 2**20  # of 400 MB that one of them unpacks to


def test_an_answer_that_drips_has_an_end(
    client: Any, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_ANSWER_SECONDS", 0.3)
    server.on(STATUS, Answer(body=b" " * 10_000, byte_seconds=0.05))
    with pytest.raises(EndpointUnavailableError):
        client.job("job-1").status()


@pytest.mark.parametrize(
    "size", [10**15, MAX_VIDEO_BYTES + 1, 0, -1, 10**400, True, 1.5, "5", None], ids=range(9)
)
def test_a_video_of_a_size_that_none_has_is_not_fetched(size: Any) -> None:
    output = {"size_bytes": size, "sha256": SHA256, "video_url": "https://example.com/v.mp4"}
    with pytest.raises(DownloadError):
        Video.parse(output)


@pytest.mark.parametrize("sha256", ["", "x", SHA256[:-1], SHA256.upper(), SHA256 + "\n", 7, None])
def test_a_hash_that_is_none_proves_nothing(sha256: Any) -> None:
    output = {"size_bytes": 5, "sha256": sha256, "video_url": "https://example.com/v.mp4"}
    with pytest.raises(DownloadError):
        Video.parse(output)


@pytest.mark.parametrize("text", ["ü" * 100, "\ud800", "====", "a"])
def test_base64_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(DownloadError):
        Video.parse({"size_bytes": 5, "sha256": SHA256, "video_base64": text})


def test_more_than_the_announced_size_is_not_written(
    client: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    url = server.on("GET /video.mp4", Answer(body=bytes(30_000_000)))
    output = {"size_bytes": 1000, "sha256": SHA256, "video_url": url}
    server.on(STATUS, {"id": "job-1", "status": "COMPLETED", "output": output})
    with pytest.raises(DownloadError, match="more than the 1000 bytes"):
        client.job("job-1").download(tmp_path / "video.mp4")
    assert list(tmp_path.iterdir()) == []


ODD: list[Any] = [
    None,
    True,
    -1,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x" * 1_000_000,
    "<script>alert(1)</script>",
    "\x1b[2J\x07\n\u202e",
    "\ud800",
    [],
    [[[]]],
    {},
    {"a": {"b": 1}},
]
FIELDS: list[Callable[[Any], dict[str, Any]]] = [
    lambda odd: {"delayTime": odd},
    lambda odd: {"executionTime": odd},
    lambda odd: {"output": odd},
    lambda odd: {"status": "FAILED", "error": odd},
    lambda odd: {"status": "FAILED", "output": {"error_info": odd}},
    lambda odd: {"status": "FAILED", "output": {"error_info": {"code": odd, "message": odd}}},
    lambda odd: {"output": {"stage": odd, "progress": 0.5, "message": "x"}},
    lambda odd: {"output": {"stage": "x", "progress": odd, "message": "x"}},
    lambda odd: {"output": {"stage": "x", "progress": 0.5, "message": odd}},
    lambda odd: {
        "output": {
            "stage": "denoise",
            "progress": 0.5,
            "message": "x",
            "step": odd,
            "total_steps": odd,
            "eta_seconds": odd,
            "elapsed_seconds": odd,
            "preview": odd,
        }
    },
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("fields", FIELDS, ids=range(len(FIELDS)))
def test_odd_values_in_an_answer_are_told_in_a_line_or_left_out(
    fields: Callable[[Any], dict[str, Any]], odd: Any
) -> None:
    status = JobStatus.parse({"id": "job-1", "status": "IN_PROGRESS", **fields(odd)})
    texts = [status.status, str(status.error or "")]
    if isinstance(status.progress, Progress):
        texts += [status.progress.stage, status.progress.message]
        assert status.progress.preview is None
        for seconds in (status.progress.eta_seconds, status.progress.elapsed_seconds):
            assert views.duration(seconds or 0.0)
    for text in texts:
        assert text.isprintable()
        assert len(text) < 3000


def test_a_reason_that_is_json_of_any_depth_is_read() -> None:
    assert JobError.parse('{"error_message": ' + DEEP + "}").code == "UNKNOWN"
    assert JobError.parse(json.dumps({"error_message": "why"})).message == "why"
    assert len(plain("word " * 2_000_000)) == 1000
