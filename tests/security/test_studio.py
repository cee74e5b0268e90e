"""The studio between a hostile endpoint, hostile files and other pages of the same browser."""

import asyncio
import json
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.responses import FileResponse, PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from avatar_client import Progress
from avatar_client.contract.preview import read
from studio import preview, views
from studio.connection import Connection
from studio.guard import GuardMiddleware, is_own_host
from studio.history import History, Record, stored_output
from studio.tracker import JobState
from tests.support.pictures import jpeg
from tests.support.scripted_server import ScriptedServer

SCRIPTS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</p><svg onload=alert(1)>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<!--><script>alert(1)</script>",
    "<a href=javascript:alert(1)>x</a>",
    "\u003cscript\u003ealert(1)\u003c/script\u003e",
]
ALLOWED_TAGS = {"div", "p", "strong", "span", "video"}
ALLOWED_ATTRIBUTES = {"class", "role", "style", "aria-label", "aria-valuemin", "aria-valuemax"}


def elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    found: list[tuple[str, dict[str, str | None]]] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, dict(attrs)))

    parser = Parser()
    parser.feed(html)
    parser.close()
    return found


def record(**changes: Any) -> Record:
    fixed: dict[str, Any] = {
        "id": "20260131-120000-abc",
        "created_at": "2026-01-31T12:00:00+00:00",
        "endpoint": "local",
        "portrait": "portrait.png",
        "speech": "speech.wav",
        "fields": {},
        "status": "IN_PROGRESS",
    }
    return Record(**{**fixed, **changes})


def pieces(text: str) -> list[str]:
    """Everything that the page shows with a text of the endpoint in it."""
    progress = Progress(stage=text, progress=0.5, message=text)
    error = {"code": text, "message": text, "field": text, "retryable": True}
    running = JobState(record(), True, progress, note="")
    waiting = JobState(record(), True, progress, note=text)
    failed = JobState(record(status="FAILED", error=error), False)
    done = record(status="COMPLETED", output={"warnings": [text], "seed": 1})
    return [
        *(views.status(state) for state in (running, waiting, failed)),
        *(views.headline(state) for state in (running, waiting, failed)),
        views.caption(done),
        views.connected(text),
        views.note(text),
        views.failure(text, text),
        views.field_error(text, text),
        views.video(Path(f"/jobs/{text}/video.mp4")),
    ]


@pytest.mark.parametrize("text", SCRIPTS)
def test_no_text_of_an_endpoint_or_a_file_becomes_an_element(text: str) -> None:
    for html in pieces(text):
        for tag, attributes in elements(html):
            assert tag in ALLOWED_TAGS, html
            odd = attributes.keys() - ALLOWED_ATTRIBUTES
            assert odd <= {"aria-valuenow", "controls", "playsinline", "src"}, html


def test_a_preview_is_drawn_anew_and_an_image_alone() -> None:
    secret = b"<script>alert(1)</script>"
    redrawn = preview.redrawn(jpeg(comment=secret))
    assert redrawn is not None
    assert secret not in read(redrawn)
    html = views.status(JobState(record(), True, None, preview=redrawn))
    [image] = [attributes for tag, attributes in elements(html) if tag == "img"]
    assert image.keys() == {"class", "src", "decoding", "alt"}
    assert image["src"] == redrawn
    assert preview.redrawn(secret) is None
    assert preview.redrawn(jpeg()[:60]) is None


HOSTILE_HEALTH: list[Any] = [
    {"workers": {"idle": "<script>alert(1)</script>"}, "jobs": {"inQueue": "<img src=x>"}},
    {"workers": "<script>", "jobs": []},
    {"workers": {"idle": {"a": 1}, "running": [1]}, "jobs": None},
    {"workers": {"idle": 10**400, "running": -1}, "jobs": {"inQueue": 1.5}},
    {},
]


@pytest.mark.parametrize("health", HOSTILE_HEALTH, ids=range(len(HOSTILE_HEALTH)))
def test_what_an_endpoint_says_of_itself_is_numbers(health: Any) -> None:
    with ScriptedServer() as server:
        server.on("GET /v2/x/health", health)
        connection = Connection(name="x", url=f"{server.origin}/v2/x", api_key=SecretStr("key"))
        words = asyncio.run(connection.health())
    assert words == "Connected. Workers: 0 idle, 0 busy. Jobs waiting: 0."


@pytest.mark.parametrize(
    "odd", ["<b>", -1, float("nan"), float("inf"), 10**400, [], {}, None, True]
)
def test_a_result_is_kept_as_far_as_it_can_be_shown(odd: Any) -> None:
    names = ("duration_seconds", "fps", "width", "height", "seed", "metrics", "warnings")
    output = dict.fromkeys(names, odd)
    kept = stored_output(output | {"parameters": odd, "video_url": "https://h/?signature"})
    assert kept.keys() <= {"warnings"}
    assert json.dumps(kept, allow_nan=False)
    assert views.caption(record(status="COMPLETED", output=kept))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("face.PNG", ".png"),
        ("speech.m4a", ".m4a"),
        ("face.html", ""),
        ("face.svg", ""),
        ("face.xhtml", ""),
        ("face.js", ""),
        ("face.mht", ""),
        ("face.xml", ""),
        ("face.pdf", ""),
        ("face.png.html", ""),
        ("face", ""),
        ("face.<script>", ""),
    ],
)
def test_a_file_is_kept_under_a_name_of_media_or_of_nothing(
    tmp_path: Path, name: str, kept: str
) -> None:
    given = tmp_path / name
    given.write_bytes(b"<script>alert(1)</script>")
    history = History(tmp_path / "jobs")
    made = history.add(given, given, {}, endpoint="x")
    assert Path(made.portrait).suffix == kept
    assert stat.S_IMODE(history.directory.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "<script>"},
        {"portrait": "../../../etc/passwd"},
        {"portrait": "/etc/passwd"},
        {"speech": ".."},
        {"output": []},
        {"fields": 7},
        {"id": 7},
        {"error": "text"},
    ],
    ids=range(8),
)
def test_a_record_that_somebody_has_changed_is_none(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    history = History(tmp_path / "jobs")
    made = history.add(tmp_path / "a.png", tmp_path / "a.png", {}, endpoint="x")
    path = history.directory / made.id / "record.json"
    assert history.get(made.id) is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert history.get(made.id) is None
    assert history.all() == []


# Who is answered


async def page(scope: Scope, receive: Receive, send: Send) -> None:
    """Stands for gradio: serves a file inline as it does, and anything else as text."""
    if "file=" in scope["path"]:
        path = Path(scope["path"].partition("file=")[2])
        await FileResponse(path, filename=path.name, content_disposition_type="inline")(
            scope, receive, send
        )
    else:
        await PlainTextResponse("the page")(scope, receive, send)


def ask(
    path: str = "/", *, host: str = "127.0.0.1", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str]]:
    """Status and headers of the answer to a request, which `host` is served at."""
    given = {
        "host": f"{host}:7860",
        **{key.replace("_", "-"): text for key, text in headers.items()},
    }
    scope: Scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(key.encode(), text.encode()) for key, text in given.items()],
        "query_string": b"",
    }
    sent: list[Message] = []
    given_messages: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        while not given_messages:  # the browser stays
            await asyncio.sleep(60)
        return given_messages.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(GuardMiddleware(page, host)(scope, receive, send))
    answer = {key.decode().lower(): text.decode() for key, text in sent[0]["headers"]}
    return sent[0]["status"], answer


@pytest.mark.parametrize(
    ("served", "name", "is_own"),
    [
        ("127.0.0.1", "127.0.0.1:7860", True),
        ("127.0.0.1", "localhost:7860", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("127.0.0.1", "[::1]:7860", True),
        ("127.0.0.1", "evil.example:7860", False),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "192.168.1.5", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "127.0.0.1@evil.example", False),
        ("127.0.0.1", "127.0.0.1:x", False),
        ("localhost", "evil.example", False),
        ("0.0.0.0", "192.168.1.5:7860", True),
        ("0.0.0.0", "[fd00::1]:7860", True),
        ("0.0.0.0", "evil.example:7860", False),
        ("0.0.0.0", "192.168.1.5.nip.example", False),
        ("::", "192.168.1.5", True),
        ("::", "evil.example", False),
        ("192.168.1.5", "192.168.1.5:7860", True),
        ("192.168.1.5", "evil.example", False),
        ("studio.lan", "studio.lan:7860", True),
        ("studio.lan", "STUDIO.lan", True),
        ("studio.lan", "evil.lan", False),
    ],
)
def test_a_name_that_is_not_the_studios_own_is_not_answered(
    served: str, name: str, *, is_own: bool
) -> None:
    assert is_own_host(name, served) is is_own
    status, _ = ask(host=served) if name == f"{served}:7860" else (None, {})
    assert status in (200, None)


@pytest.mark.parametrize("method", ["POST", "GET", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example", "sec_fetch_site": "cross-site"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:7860"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://127.0.0.1:7860.evil.example"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "strange"},
    ],
)
def test_nothing_is_taken_from_another_page(method: str, headers: dict[str, str]) -> None:
    for path in ("/gradio_api/upload", "/gradio_api/run/predict", "/gradio_api/file=/etc/passwd"):
        status, answer = ask(path, method=method, **headers)
        assert status == 403
        assert "access-control-allow-origin" not in answer


def test_the_page_itself_is_served_to_its_person() -> None:
    for headers in ({}, {"sec_fetch_site": "none"}, {"sec_fetch_site": "cross-site"}):
        assert ask("/", **headers)[0] == 200  # a link to it may stand anywhere
    own = {"origin": "http://127.0.0.1:7860", "sec_fetch_site": "same-origin"}
    assert ask("/gradio_api/upload", method="POST", **own)[0] == 200


@pytest.mark.parametrize("name", ["a.mp4", "a.html", "a.svg", "a.png", "a"])
def test_a_file_is_a_download_of_its_own_type(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<script>alert(1)</script>")
    status, answer = ask(f"/gradio_api/file={tmp_path / name}", sec_fetch_site="same-origin")
    assert status == 200
    assert answer["content-disposition"].startswith("attachment")
    assert name in answer["content-disposition"]
    assert answer["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer["content-security-policy"]
    assert "default-src 'none'" in answer["content-security-policy"]


def test_a_socket_of_another_page_is_closed() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:7860"), (b"origin", b"https://evil.example")]
    scope: Scope = {"type": "websocket", "path": "/x", "headers": headers}
    asyncio.run(GuardMiddleware(page, "127.0.0.1")(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
