"""Contact with addresses that a client chose: the only module that fetches one.

httpx speaks HTTP. What it knows nothing of stands between it and the socket: a name is resolved
once, its addresses are checked, and one of these very addresses is dialled; and the whole download
has one deadline, which each operation on the socket heeds, so that a server which sends a byte now
and then holds nobody. `worker.addresses` says which addresses are public.
"""

import re
import select
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import certifi
import httpcore
import httpx

from avatar_client.contract.job_errors import (
    InputDownloadError,
    InputTooLargeError,
    InputUrlBlockedError,
    InvalidInputError,
)
from avatar_client.version import __version__
from worker import addresses

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
# An IP in a form that httpx refuses (octal, too few numbers) and a resolver may take.
NUMBERS_FOR_HOST = re.compile(r"[a-z]+://(?:[^/@]*@)?[0-9.]+(?::[0-9]*)?(?:[/?#]|$)", re.IGNORECASE)
CHUNK_BYTES = 64 * 1024
SLICE_SECONDS = 0.5  # of a wait, after which the caller's check is asked
CONNECT_SECONDS = 10.0  # for one of several addresses
HEADERS = {
    "User-Agent": f"avatar-worker/{__version__}",
    "Accept": "*/*",
    # what is stored compressed comes so all the same, and is undone
    "Accept-Encoding": "identity",
    "Connection": "close",
}


def nothing_to_check() -> None:
    """For downloads that nobody stops."""


def download(
    url: str,
    target: Path,
    *,
    max_bytes: int,
    timeout_seconds: float,
    field: str,
    allow_private: bool,
    check: Callable[[], None] = nothing_to_check,
) -> None:
    """Writes what the address serves to `target`, its Content-Encoding undone.

    Args:
        max_bytes: of the file, compressed and not.
        timeout_seconds: for all of it, redirects and names included.
        check: is asked at least every half second; what it raises ends the download.

    Raises:
        InputUrlBlockedError: the address, or one it redirects to, is not https or not public.
        InputDownloadError: DNS, TLS, HTTP status, or the deadline passed.
        InputTooLargeError: more than `max_bytes`.
        InvalidInputError: not a URL.
    """
    wait = _Wait(time.monotonic() + timeout_seconds, check)
    rule = _Rule(field, allow_private)
    address = rule.parse(url)
    try:
        for _ in range(1 + MAX_REDIRECTS):
            with (
                _Transport(rule, wait) as transport,
                httpx.Client(transport=transport, trust_env=False, headers=HEADERS) as client,
                client.stream("GET", address) as response,
            ):
                if response.status_code not in REDIRECTS or "Location" not in response.headers:
                    _save(response, target, max_bytes, field)
                    return
                location = _location(response)
            address = rule.parse(urljoin(str(address), location))
    except (OSError, httpx.HTTPError, httpcore.ProtocolError, zlib.error, ValueError) as error:
        if isinstance(error, TimeoutError):
            message = f"the download took longer than the limit of {timeout_seconds:g} s"
        elif isinstance(error, ssl.SSLError):
            message = "the server has no valid TLS certificate"
        else:
            message = "the server could not be reached or broke off"
        raise InputDownloadError(message, field=field) from error
    raise InputDownloadError(f"more than {MAX_REDIRECTS} redirects", field=field)


def check_endpoint(url: str, *, field: str, allow_private: bool) -> None:
    """Returns if the worker may talk to a store at this address.

    The store's client resolves the name again, and a hostile name may then lead to a private
    address. It gains nothing there: without a certificate for that name the TLS handshake fails.

    Raises:
        InputUrlBlockedError: not https, or not a public address.
        InputDownloadError: the host cannot be resolved.
        InvalidInputError: not a URL.
    """
    rule = _Rule(field, allow_private)
    address = rule.parse(url)
    rule.resolve(address.host, address.port or _default_port(address))


class _Rule:
    """Which addresses may be contacted for a field of a request."""

    def __init__(self, field: str, allow_private: bool) -> None:
        self._field = field
        self._allow_private = allow_private

    def parse(self, url: str) -> httpx.URL:
        """The address, every escape in it as the client wrote it."""
        try:
            address = httpx.URL(url)
        except (httpx.InvalidURL, ValueError) as error:
            if NUMBERS_FOR_HOST.match(url):
                raise self._not_public() from error
            raise InvalidInputError("is not a well-formed URL", field=self._field) from error
        allowed = ("https", "http") if self._allow_private else ("https",)
        if address.scheme not in allowed:
            raise InputUrlBlockedError("only https URLs are fetched", field=self._field)
        if "\\" in url:  # which some readers take for a slash, and so see another host
            raise InputUrlBlockedError("holds a backslash", field=self._field)
        if not address.host or (address.port or 0) > 65_535:
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
        if not self._allow_private and not all(addresses.is_public(ip) for ip in ips):
            raise self._not_public()
        return ips

    def _not_public(self) -> InputUrlBlockedError:
        return InputUrlBlockedError("leads to an address that is not public", field=self._field)


class _Wait:
    """How long an operation may take: until the deadline, and as long as the check says nothing."""

    def __init__(self, deadline: float, check: Callable[[], None]) -> None:
        self._deadline = deadline
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

    def resolve(self, rule: _Rule, host: str, port: int) -> list[str]:
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


class _Network(httpcore.NetworkBackend):
    """Connects to checked IPs alone."""

    def __init__(self, rule: _Rule, wait: _Wait) -> None:
        self._rule = rule
        self._wait = wait

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore.NetworkStream:
        ips = self._wait.resolve(self._rule, host, port)
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

    def __init__(self, connected: socket.socket, wait: _Wait) -> None:
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
            with suppress(TimeoutError):
                view = view[self._socket.send(view) :]

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
        return {"socket": self._socket}.get(info)


class _Transport(httpx.BaseTransport):
    """What httpx's own does, over such a network."""

    def __init__(self, rule: _Rule, wait: _Wait) -> None:
        context = ssl.create_default_context(cafile=certifi.where())
        network = _Network(rule, wait)
        self._pool = httpcore.ConnectionPool(ssl_context=context, network_backend=network)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        response = self._pool.handle_request(
            httpcore.Request(request.method, url, headers=request.headers.raw)
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


def _default_port(address: httpx.URL) -> int:
    return 443 if address.scheme == "https" else 80


def _location(response: httpx.Response) -> str:
    """Where a redirect leads: servers send UTF-8 there, though no header may hold it."""
    raw = next(value for name, value in response.headers.raw if name.lower() == b"location")
    return raw.decode("utf-8", "replace")


def _save(response: httpx.Response, target: Path, max_bytes: int, field: str) -> None:
    if response.status_code != 200:
        raise InputDownloadError(f"the server answered HTTP {response.status_code}", field=field)
    too_large = InputTooLargeError(f"is larger than the limit of {max_bytes} bytes", field=field)
    if int(response.headers.get("Content-Length", 0)) > max_bytes:
        raise too_large
    num_read = num_written = 0
    decoder = _decoder(response, field)
    with target.open("wb") as file:
        for chunk in response.iter_raw(CHUNK_BYTES):
            num_read += len(chunk)
            for part in decoder(chunk) if decoder else (chunk,):
                num_written += len(part)
                if max(num_read, num_written) > max_bytes:
                    raise too_large
                file.write(part)


def _decoder(response: httpx.Response, field: str) -> Callable[[bytes], Iterator[bytes]] | None:
    """What undoes the Content-Encoding, in parts that are small however well it was compressed."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity", "aws-chunked"):
        return None
    if encoding not in ("gzip", "x-gzip", "deflate"):
        message = f"is compressed by a way that is not undone ({encoding[:20]!r}); store it plain"
        raise InputDownloadError(message, field=field)
    reader = zlib.decompressobj(wbits=zlib.MAX_WBITS + 32)  # tells gzip and zlib by their heads

    def undo(chunk: bytes) -> Iterator[bytes]:
        while chunk:
            yield reader.decompress(chunk, CHUNK_BYTES)
            chunk = reader.unconsumed_tail

    return undo
