"""An HTTP server that answers each request as the test has written down."""

import contextlib
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.loopback_server import LoopbackServer


@dataclass(frozen=True)
class Answer:
    """What comes back. `None` as status: the connection is closed instead."""

    status: int | None = 200
    body: Any = b""  # bytes as they are, anything else as JSON
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body that are sent; the length is the whole body's
    serves_ranges: bool = False
    delay_seconds: float = 0.0  # before the answer begins
    byte_seconds: float = 0.0  # between two bytes of the body


CLOSED = Answer(status=None)


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ScriptedServer(LoopbackServer):
    """Serves on the loopback interface inside its context.

    Each `METHOD /path` has its answers, given in turn; the last one is given from then on.
    """

    def __init__(self) -> None:
        self.requests: list[Asked] = []
        self._answers: dict[str, list[Answer]] = defaultdict(list)

    def on(self, route: str, *answers: Answer | dict[str, Any]) -> str:
        """The URL of the route, which answers so from now on. A dict is a JSON body."""
        self._answers[route] = [
            answer if isinstance(answer, Answer) else Answer(body=answer) for answer in answers
        ]
        return self.origin + route.partition(" ")[2]

    def asked(self, route: str) -> list[Asked]:
        """The requests of one route."""
        return [
            asked
            for asked in self.requests
            if f"{asked.method} {asked.path.partition('?')[0]}" == route
        ]

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("Content-Length", 0))
        asked = Asked(
            request.command, request.path, dict(request.headers), request.rfile.read(length)
        )
        self.requests.append(asked)
        answers = self._answers[f"{asked.method} {asked.path.partition('?')[0]}"]
        if not answers:
            answers = [Answer(status=404, body={"error": "not scripted"})]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        time.sleep(answer.delay_seconds)
        if answer.status is None:
            request.close_connection = True
            return
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        status, headers = answer.status, dict(answer.headers)
        wanted = asked.headers.get("Range") if answer.serves_ranges else None
        if wanted:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[begin:]
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has had enough
            if answer.byte_seconds:
                for byte in body:
                    request.wfile.write(bytes([byte]))
                    request.wfile.flush()
                    time.sleep(answer.byte_seconds)
            else:
                request.wfile.write(body[: answer.cut_after])
        if answer.cut_after is not None:
            request.close_connection = True
