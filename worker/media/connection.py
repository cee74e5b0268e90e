"""Sockets to addresses that a client chose, for downloads and for stores.

httpx and httpcore speak HTTP. What they know nothing of stands between them and the socket: a name
is resolved once, its addresses are checked, and one of these very addresses is dialled; and the
whole exchange has one deadline, which each operation on the socket heeds, so that a server which
sends a byte now and then holds nobody. `worker.addresses` says which
addresses are public.
"""

import base64
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any
from urllib.parse import SplitResult, unquote

import certifi
import httpcore
import httpx

from avatar_client.contract.job_errors import (
    InputDownloadError,
    InputUrlBlockedError,
    InvalidInputError,
)
from worker import addresses
from worker.settings import proxy_for

# An IP in a form that httpx refuses (octal, too few numbers) and a resolver may take.
NUMBERS_FOR_HOST = re.compile(r"[a-z]+://(?:[^/@]*@)?[0-9.]+(?::[0-9]*)?(?:[/?#]|$)", re.IGNORECASE)
SLICE_SECONDS = 0.5  # of a wait, after which the caller's check is asked
CONNECT_SECONDS = 10.0  # for one of several addresses
MAX_PROXY_ANSWER_BYTES = 16 * 1024
KEEP_ALIVE_SECONDS = 15.0  # of a connection that nothing uses


def nothing_to_check() -> None:
    """For exchanges that nobody stops."""


class Rule:
    """Which addresses may be contacted for a field of a request."""

    def __init__(self, field: str | None, allow_private: bool) -> None:
        self._field = field
        self.allow_private = allow_private

    def parse(self, url: str) -> httpx.URL:
        """The address, every escape in it as the client wrote it."""
        try:
            address = httpx.URL(url)
            host = address.host  # decoded: a label that is no encoded one is found here
        except (httpx.InvalidURL, ValueError) as error:
            if NUMBERS_FOR_HOST.match(url):
                raise self._not_public() from error
            raise InvalidInputError("is not a well-formed URL", field=self._field) from error
        allowed = ("https", "http") if self.allow_private else ("https",)
        if address.scheme not in allowed:
            raise InputUrlBlockedError("only https URLs are fetched", field=self._field)
        if "\\" in url:  # which some readers take for a slash, and so see another host
            raise InputUrlBlockedError("holds a backslash", field=self._field)
        if not host or (address.port or 0) > 65_535:
            raise InvalidInputError("is not a well-formed URL", field=self._field)
        return address

    def resolve(self, host: str, port: int) -> list[str]:
        """The IPs of a host, all of which may be contacted."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            message = "the host could not be resolved"
            raise InputDownloadError(message, field=self._field) from error
        except UnicodeError as error:  # a label that no host name can have
            raise InvalidInputError("is not a well-formed URL", field=self._field) from error
        ips = list(dict.fromkeys(str(address[0]) for *_, address in found))
        if not self.allow_private and not all(addresses.is_public(ip) for ip in ips):
            raise self._not_public()
        return ips

    def _not_public(self) -> InputUrlBlockedError:
        return InputUrlBlockedError("leads to an address that is not public", field=self._field)


class Wait:
    """How long an operation may take: until the deadline, and as long as the check says nothing."""

    def __init__(self, seconds: float, check: Callable[[], None]) -> None:
        self.begin(seconds, check)

    def begin(self, seconds: float, check: Callable[[], None]) -> None:
        """Counts anew, for a further exchange over the same connections."""
        self._deadline = time.monotonic() + seconds
        self._check = check

    def slices(self) -> Iterator[float]:
        """Seconds to wait, again and again.

        Raises:
            TimeoutError: the deadline has passed; or whatever the check raises.
        """
        while True:
            self._check()
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            yield min(left, SLICE_SECONDS)

    def resolve(self, rule: Rule, host: str, port: int) -> list[str]:
        """The rule's answer. A resolver that does not answer is left behind in its thread."""
        outcome: list[Any] = []

        def ask() -> None:
            try:
                outcome.append(rule.resolve(host, port))
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=ask, name="resolve", daemon=True)
        thread.start()
        for seconds in self.slices():
            thread.join(seconds)
            if outcome:
                break
        [answer] = outcome
        if isinstance(answer, Exception):
            raise answer
        return list(answer)


class Network(httpcore.NetworkBackend):
    """Connects to checked IPs alone."""

    def __init__(self, rule: Rule, wait: Wait) -> None:
        self._rule = rule
        self._wait = wait

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore.NetworkStream:
        is_here = host == "localhost" or addresses.is_loopback(host)
        proxy = None if is_here else proxy_for(host, port)
        if proxy is not None:
            return self._tunnel(proxy, host, port)
        return self._connect(self._wait.resolve(self._rule, host, port), port)

    def _tunnel(self, proxy: SplitResult, host: str, port: int) -> "_Stream":
        """A connection by way of the operator's proxy: to an address that was checked, here too."""
        if not self._rule.allow_private:
            [host, *_] = self._wait.resolve(self._rule, host, port)
        proxy_port = proxy.port or 3128
        ips = self._wait.resolve(Rule(None, allow_private=True), proxy.hostname or "", proxy_port)
        stream = self._connect(ips, proxy_port)
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if proxy.username:
            user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(user).decode()}")
        stream.write("\r\n".join([*lines, "", ""]).encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            received = stream.read(4096)
            answer += received
            if not received or len(answer) > MAX_PROXY_ANSWER_BYTES:
                break
        if re.match(rb"HTTP/1\.[01] 2\d\d ", answer) is None:
            stream.close()
            raise ConnectionError
        return stream

    def _connect(self, ips: list[str], port: int) -> "_Stream":
        for ip in ips:
            try:
                return _Stream(self._dial(ip, port), self._wait)
            except TimeoutError:
                raise
            except OSError:  # an IPv6 address, for example, on a host without a route to it
                if ip == ips[-1]:
                    raise
        raise ConnectionError

    def _dial(self, ip: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        dialled = socket.socket(family, socket.SOCK_STREAM)
        try:
            dialled.setblocking(False)
            with suppress(BlockingIOError):
                dialled.connect((ip, port))
            give_up = time.monotonic() + CONNECT_SECONDS
            for seconds in self._wait.slices():
                if select.select([], [dialled], [], seconds)[1]:
                    break
                if time.monotonic() > give_up:
                    raise ConnectionError
            if code := dialled.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise ConnectionError(code)
        except BaseException:
            dialled.close()
            raise
        return dialled


class _Stream(httpcore.NetworkStream):
    """A socket whose operations end at the deadline."""

    def __init__(self, connected: socket.socket, wait: Wait) -> None:
        self._socket = connected
        self._wait = wait

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        for seconds in self._wait.slices():
            self._socket.settimeout(seconds)
            with suppress(TimeoutError):
                return self._socket.recv(max_bytes)
        raise AssertionError

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        view = memoryview(buffer)
        for seconds in self._wait.slices():
            if not view:
                return
            self._socket.settimeout(seconds)
            try:
                view = view[self._socket.send(view) :]
            except TimeoutError:
                continue
            except OSError as error:  # the answer may be there all the same, and is read then
                raise httpcore.WriteError from error

    def close(self) -> None:
        self._socket.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        wrapped = ssl_context.wrap_socket(
            self._socket, server_hostname=server_hostname, do_handshake_on_connect=False
        )
        self._socket = wrapped  # which has taken the other's place
        try:
            for seconds in self._wait.slices():
                wrapped.settimeout(seconds)
                with suppress(TimeoutError):
                    wrapped.do_handshake()
                    break
        except BaseException:
            wrapped.close()
            raise
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # of a connection that nothing is read from: the server ended it
            return bool(select.select([self._socket], [], [], 0)[0])
        return {"socket": self._socket}.get(info)


def connection_pool(rule: Rule, wait: Wait) -> httpcore.ConnectionPool:
    """Connections that heed the rule and the wait."""
    return httpcore.ConnectionPool(
        ssl_context=_certificates(certifi.where()),
        network_backend=Network(rule, wait),
        keepalive_expiry=KEEP_ALIVE_SECONDS,
    )


@cache
def _certificates(path: str) -> ssl.SSLContext:
    """Who is trusted: certifi's and the system's. It takes 0.1 s to read them."""
    context = ssl.create_default_context(cafile=path)
    context.load_default_certs()  # an operator's own, by SSL_CERT_FILE
    return context


class Transport(httpx.BaseTransport):
    """What httpx's own does, over such a network."""

    def __init__(self, rule: Rule, wait: Wait) -> None:
        self._pool = connection_pool(rule, wait)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        assert isinstance(request.stream, httpx.SyncByteStream)
        response = self._pool.handle_request(
            httpcore.Request(
                request.method, url, headers=request.headers.raw, content=request.stream
            )
        )
        return httpx.Response(
            response.status, headers=response.headers, stream=_Body(response.stream)
        )

    def close(self) -> None:
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        self._stream.close()
