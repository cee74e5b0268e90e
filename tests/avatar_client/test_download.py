"""The client's way of a video from a store, or from the answer, to a file."""

import base64
import hashlib
import logging
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from avatar_client import DownloadError
from tests.avatar_client.client_kinds import KEY
from tests.support.scripted_server import CLOSED, Answer, ScriptedServer

ROOT = Path(__file__).parents[2]
VIDEO = bytes(range(256)) * 400
SIGNATURE = "X-Amz-Signature=0123secret&X-Amz-Credential=4567secret"
STATUS, GET = "GET /v2/local/status/job-1", "GET /store/video.mp4"


def finish(server: Any, **output: Any) -> None:
    """Lets the job be completed, with the video in the store unless the output says otherwise."""
    facts = {
        "video_url": f"{server.origin}/store/video.mp4?{SIGNATURE}",
        "video_base64": None,
        "size_bytes": len(VIDEO),
        "sha256": hashlib.sha256(VIDEO).hexdigest(),
    }
    body = {"id": "job-1", "status": "COMPLETED", "output": {**facts, **output}}
    server.on(STATUS, body)


def test_the_video_is_fetched_whole_without_the_key(
    client: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    finish(server)
    server.on(GET, Answer(body=VIDEO))

    path = client.job("job-1").download(tmp_path / "video.mp4")

    assert path == tmp_path / "video.mp4"
    assert path.read_bytes() == VIDEO
    assert list(tmp_path.iterdir()) == [path]
    (asked,) = server.asked(GET)
    assert KEY not in str(asked.headers)
    assert asked.path.endswith(SIGNATURE)


def test_the_file_is_as_readable_as_any_other_new_file(
    client: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    finish(server)
    server.on(GET, Answer(body=VIDEO))
    (tmp_path / "other").touch()
    path = client.job("job-1").download(tmp_path / "video.mp4")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_in_a_directory_the_video_takes_the_name_of_the_job(
    client: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    finish(server)
    server.on(GET, Answer(body=VIDEO))
    assert client.job("job-1").download(str(tmp_path)) == tmp_path / "job-1.mp4"
    finish(server, content_type="video/webm")
    assert client.job("job-1").download(str(tmp_path)) == tmp_path / "job-1.webm"
    finish(server, content_type="../x")  # of anybody's endpoint
    assert client.job("job-1").download(str(tmp_path)) == tmp_path / "job-1.mp4"


def test_a_video_inside_the_answer_is_checked_too(
    client: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    finish(server, video_url=None, video_base64=base64.b64encode(VIDEO).decode())
    assert client.job("job-1").download(tmp_path / "video.mp4").read_bytes() == VIDEO

    finish(server, video_url=None, video_base64=base64.b64encode(VIDEO[::-1]).decode())
    with pytest.raises(DownloadError, match="sha256"):
        client.job("job-1").download(tmp_path / "other.mp4")


def test_a_redirect_is_followed(client: Any, server: ScriptedServer, tmp_path: Path) -> None:
    finish(server)
    server.on(GET, Answer(302, headers={"Location": "/elsewhere.mp4?token=5678secret"}))
    server.on("GET /elsewhere.mp4", Answer(body=VIDEO))
    assert client.job("job-1").download(tmp_path / "video.mp4").read_bytes() == VIDEO


def test_a_cut_connection_is_taken_up_where_it_broke(
    client: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    finish(server)
    server.on(
        GET,
        Answer(body=VIDEO, cut_after=30_000),
        CLOSED,
        Answer(503),
        Answer(body=VIDEO, serves_ranges=True),
    )
    assert client.job("job-1").download(tmp_path / "video.mp4").read_bytes() == VIDEO
    assert [asked.headers.get("Range") for asked in server.asked(GET)] == [
        None,
        *["bytes=30000-"] * 3,
    ]


@pytest.mark.parametrize(
    "second",
    [
        [Answer(body=VIDEO)],
        [Answer(206, VIDEO, {"Content-Range": "bytes 5-9/10"}), Answer(body=VIDEO)],
        [Answer(416), Answer(body=VIDEO)],
    ],
    ids=["no ranges", "another range", "no such range"],
)
def test_a_store_that_cannot_go_on_is_asked_from_the_start(
    client: Any, server: ScriptedServer, tmp_path: Path, second: list[Answer]
) -> None:
    finish(server)
    server.on(GET, Answer(body=VIDEO, cut_after=30_000), *second)
    assert client.job("job-1").download(tmp_path / "video.mp4").read_bytes() == VIDEO


@pytest.mark.parametrize(
    ("answer", "output", "text"),
    [
        (Answer(body=VIDEO[::-1]), {}, "sha256 differs"),
        (Answer(body=VIDEO + b"x"), {}, "more than the 102400 bytes"),
        (Answer(body=VIDEO[:-1]), {}, "102399 of 102400 bytes"),
        (Answer(403, b"<Error>expired</Error>"), {}, "HTTP 403: its address may have expired"),
        (Answer(404), {}, "HTTP 404"),
        (Answer(500), {}, r"0 of 102400 bytes .* \(HTTP 500\)"),
        (CLOSED, {}, r"0 of 102400 bytes .* \(RemoteProtocolError\)"),
        (Answer(302, headers={"Location": f"/store/video.mp4?{SIGNATURE}"}), {}, "TooManyRedir"),
        (Answer(302, headers={"Location": f"ftp://x/?{SIGNATURE}"}), {}, "UnsupportedProtocol"),
        (Answer(), {"video_url": f"https://x:port/?{SIGNATURE}"}, "no URL"),
        (Answer(), {"video_url": f"file:///etc/passwd?{SIGNATURE}"}, "no URL"),
        (Answer(), {"video_url": f"https://xn--/?{SIGNATURE}"}, "no URL"),
        (Answer(), {"video_url": f"https://xn--a.com/?{SIGNATURE}"}, "no URL"),
        (Answer(302, headers={"Location": f"https://xn--/?{SIGNATURE}"}), {}, "IDNAError"),
        (
            Answer(302, headers={"Location": f"https://{'a' * 70}/?{SIGNATURE}"}),
            {},
            "UnicodeError|ConnectError",
        ),
        (Answer(), {"video_url": None}, "no URL"),
        (Answer(), {"video_base64": "?"}, "no base64"),
        (Answer(), {"sha256": None}, "holds no video"),
        (Answer(), {"size_bytes": "1"}, "holds no video"),
    ],
)
def test_what_is_not_the_video_leaves_nothing_behind(
    client: Any,
    server: ScriptedServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    answer: Answer,
    output: dict[str, Any],
    text: str,
) -> None:
    finish(server, **output)
    server.on(GET, answer)
    target = tmp_path / "video.mp4"
    target.write_bytes(b"of yesterday")

    with caplog.at_level(logging.DEBUG), pytest.raises(DownloadError, match=text) as caught:
        client.job("job-1").download(target)

    assert target.read_bytes() == b"of yesterday"
    assert list(tmp_path.iterdir()) == [target]
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("level", [logging.INFO, 1])
def test_no_signature_and_no_key_is_logged(
    client: Any,
    server: ScriptedServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    level: int,
) -> None:
    finish(server)
    server.on(GET, Answer(body=VIDEO, cut_after=9, serves_ranges=False), Answer(500))
    with caplog.at_level(level), pytest.raises(DownloadError):
        client.job("job-1").download(tmp_path / "video.mp4")
    assert "/store/video.mp4 " in caplog.text  # it was logged, in parts
    assert "secret" not in caplog.text
    assert KEY not in caplog.text
    assert all(asked.path.endswith(SIGNATURE) for asked in server.asked(GET))


def test_no_signature_of_a_redirect_is_logged_by_a_program_that_logs_at_info(
    client: Any, server: ScriptedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finish(server)
    server.on(GET, Answer(307, headers={"Location": f"{server.origin}/two.mp4?{SIGNATURE}"}))
    server.on("GET /two.mp4", Answer(body=VIDEO))
    with caplog.at_level(logging.INFO):
        client.job("job-1").download(tmp_path / "video.mp4")
    assert "/store/video.mp4 " in caplog.text
    assert "/two.mp4 " in caplog.text
    assert "secret" not in caplog.text
    assert server.asked("GET /two.mp4")[0].path.endswith(SIGNATURE)


def test_no_logger_of_another_library_is_changed() -> None:
    script = (
        "import logging\n"
        "import httpx, httpcore\n"
        "def loggers():\n"
        "    return {\n"
        "        name: (logger.level, logger.filters, logger.handlers, logger.propagate)\n"
        "        for name, logger in logging.root.manager.loggerDict.items()\n"
        "        if isinstance(logger, logging.Logger)\n"
        "    }\n"
        "before = loggers()\n"
        "from avatar_client import *\n"
        "AvatarEndpoint('abc', 'key').close()\n"
        "assert {name: loggers()[name] for name in before} == before\n"
        "assert 'httpx' in before\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_other_uses_of_the_http_library_log_as_they_did(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.on("GET /mine", Answer())
    with caplog.at_level(logging.INFO):
        httpx.get(f"{url}?page=2")
    assert "/mine?page=2" in caplog.text


def test_a_result_that_is_known_outlives_the_memory_of_the_platform(
    client: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    finish(server)
    server.on(GET, Answer(body=VIDEO))
    job = client.job("job-1")
    job.wait()
    server.on(STATUS, Answer(404))
    assert job.download(tmp_path / "video.mp4").read_bytes() == VIDEO


def test_a_directory_that_is_not_there_is_named(
    client: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    finish(server)
    server.on(GET, Answer(body=VIDEO))
    with pytest.raises(DownloadError, match=r"nowhere/video.mp4 cannot be written: No such file"):
        client.job("job-1").download(tmp_path / "nowhere" / "video.mp4")


def test_a_file_that_cannot_grow_is_said_so_and_removed(
    client: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    finish(server)
    server.on(GET, Answer(body=VIDEO))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(VIDEO) // 2, limits[1]))
    try:
        with pytest.raises(DownloadError, match=r"video.mp4 cannot be written: File too large"):
            client.job("job-1").download(tmp_path / "video.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
