"""A server between a worker and another one, through which requests and answers get lost.

How it fails follows a plan of calm, stormy and dead times, drawn beforehand from a seed; which
request is hit in a stormy time is drawn as they come.
"""

import contextlib
import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

from tests.support.loopback_server import LoopbackServer

HANG_SECONDS = 3.0  # longer than anybody here waits for an answer
UPSTREAM_SECONDS = 30.0
HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive", "expect"}


@dataclass(frozen=True)
class Fault:
    """What becomes of a request.

    Attributes:
        answer: status and body that come instead of the server's.
        cut: the connection is closed: before the server has heard of it, when it has done it, or
            in the middle of its answer.
        hang_seconds: before that.
    """

    name: str
    answer: tuple[int, bytes] | None = None
    cut: Literal["before", "after", "inside"] | None = None
    hang_seconds: float = 0.0


CUTS = (
    Fault("cut before", cut="before"),
    Fault("cut after", cut="after"),
    Fault("cut inside", cut="inside"),
    Fault("never answered", cut="after", hang_seconds=HANG_SECONDS),
)


@dataclass(frozen=True)
class Period:
    """A stretch of time, and the share of requests that fails in it."""

    seconds: float
    fault_share: float


def drawn_periods(dice: random.Random, total_seconds: float) -> list[Period]:
    """Calm, stormy and dead stretches, as long together as `total_seconds`."""
    periods: list[Period] = []
    while (left := total_seconds - sum(period.seconds for period in periods)) > 0:
        share = dice.choices((0.03, 0.4, 1.0), (4, 4, 2))[0]
        seconds = dice.uniform(0.01, 0.08) * total_seconds
        periods.append(Period(min(seconds, left), share))
    return periods


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *_: object) -> None: ...  # of a worker that was killed in a request


class FaultyProxy(LoopbackServer):
    """Passes requests on inside its context, but for those that the plan lets fail.

    Without a plan, and after its end, all are passed on. The kinds of `faults` come in their order
    first, later in one that is drawn anew each time, so that few failures meet many kinds.
    """

    server_class = _Server

    def __init__(self, target_url: str, faults: Mapping[str, Sequence[Fault]], seed: int) -> None:
        self.faults_met: Counter[str] = Counter()
        self.num_requests = 0
        self._target = urlsplit(target_url)
        self._faults = faults  # by a part of the path; the first that fits
        self._to_come = {part: list(reversed(some)) for part, some in faults.items()}
        self._dice = random.Random(seed)  # noqa: S311  # repeatable
        self._lock = threading.Lock()
        self._periods: Sequence[Period] = ()
        self._begun = 0.0

    def begin(self, periods: Sequence[Period]) -> None:
        """Fails by this plan from now on."""
        self._periods, self._begun = periods, time.monotonic()

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(ConnectionError):  # the worker may be killed meanwhile
            self._serve(request)

    def _fault_for(self, path: str) -> Fault | None:
        with self._lock:
            self.num_requests += 1
            if self._dice.random() >= self._fault_share():
                return None
            part = next(part for part in self._faults if part in path)
            fault = self._to_come[part].pop()
            if not self._to_come[part]:
                kinds = self._faults[part]
                self._to_come[part] = self._dice.sample(kinds, len(kinds))
            self.faults_met[fault.name] += 1
            return fault

    def _fault_share(self) -> float:
        elapsed = time.monotonic() - self._begun
        for period in self._periods:
            if elapsed < period.seconds:
                return period.fault_share
            elapsed -= period.seconds
        return 0.0

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        fault = self._fault_for(request.path) or Fault("none")
        if fault.answer is not None:
            _send(request, fault.answer[0], {"Content-Type": "text/html"}, fault.answer[1])
            return
        if fault.cut != "before":
            status, headers, content = self._ask(request, body)
        time.sleep(fault.hang_seconds)
        if fault.cut in ("before", "after"):
            request.close_connection = True
            return
        _send(request, status, headers, content, cut=fault.cut == "inside")

    def _ask(
        self, request: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        assert self._target.hostname is not None
        upstream = http.client.HTTPConnection(
            self._target.hostname, self._target.port, timeout=UPSTREAM_SECONDS
        )
        with contextlib.closing(upstream):
            headers = dict(_passed_on(request.headers.items()))
            upstream.request(request.command, request.path, body, headers)
            answer = upstream.getresponse()
            return answer.status, dict(_passed_on(answer.getheaders())), answer.read()


def _passed_on(headers: Any) -> Iterator[tuple[str, str]]:
    for name, value in headers:
        if name.lower() not in HOP_HEADERS:
            yield name, value


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    body: bytes,
    *,
    cut: bool = False,
) -> None:
    request.send_response_only(status)
    length = headers.get("content-length") or headers.get("Content-Length") or str(len(body))
    rest = {name: value for name, value in headers.items() if name.lower() != "content-length"}
    for name, value in {**rest, "Content-Length": length}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD" and status != 204:
        request.wfile.write(body[: len(body) // 2] if cut else body)
    if cut:
        request.close_connection = True
