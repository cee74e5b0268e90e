"""Contact with addresses that a client chose: the only module that fetches one.

`connection` has the sockets: a download dials addresses that were checked, and has one deadline.
"""

import ssl
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin

import httpcore
import httpx

from avatar_client.contract.job_errors import (
    InputDownloadError,
    InputTooLargeError,
)
from avatar_client.version import __version__
from worker.media.connection import Rule, Transport, Wait, nothing_to_check

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 64 * 1024
HEADERS = {
    "User-Agent": f"avatar-worker/{__version__}",
    "Accept": "*/*",
    # what is stored compressed comes so all the same, and is undone
    "Accept-Encoding": "identity",
    "Connection": "close",
}


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
    with _answer(url, HEADERS, timeout_seconds, field, allow_private, check) as response:
        _save(response, target, max_bytes, field)


def require_readable(
    url: str,
    *,
    timeout_seconds: float,
    field: str | None,
    allow_private: bool,
    check: Callable[[], None] = nothing_to_check,
) -> None:
    """Returns if a byte can be fetched from the address. All but that byte stays where it is.

    Raises:
        RefusedError: the server answered something else.
        InputUrlBlockedError, InputDownloadError, InvalidInputError: as `download`.
    """
    headers = {**HEADERS, "Range": "bytes=0-0"}
    with _answer(url, headers, timeout_seconds, field, allow_private, check) as response:
        if response.status_code not in (200, 206):
            reason = next(response.iter_raw(CHUNK_BYTES), b"")
            raise RefusedError(response.status_code, field, reason)


class RefusedError(InputDownloadError):
    """A server answered, but not with what was asked for."""

    def __init__(self, status: int, field: str | None, reason: bytes = b"") -> None:
        super().__init__(f"the server answered HTTP {status}", field=field)
        self.status = status
        self.reason = reason  # the beginning of its answer


@contextmanager
def _answer(
    url: str,
    headers: Mapping[str, str],
    timeout_seconds: float,
    field: str | None,
    allow_private: bool,
    check: Callable[[], None],
) -> Iterator[httpx.Response]:
    """The answer at the end of all redirects, its body not yet read. Arguments as of `download`."""
    wait = Wait(timeout_seconds, check)
    rule = Rule(field, allow_private)
    address = rule.parse(url)
    try:
        for _ in range(1 + MAX_REDIRECTS):
            with (
                Transport(rule, wait) as transport,
                httpx.Client(transport=transport, trust_env=False, headers=headers) as client,
                client.stream("GET", address) as response,
            ):
                if response.status_code not in REDIRECTS or "Location" not in response.headers:
                    yield response
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


def check_endpoint(url: str, *, field: str) -> None:
    """Returns unless an address is one that is never contacted.

    A name is looked up again, and checked again, whenever it is dialled.

    Raises:
        InputUrlBlockedError: not https, or not a public address.
        InputDownloadError: the host cannot be resolved.
        InvalidInputError: not a URL.
    """
    rule = Rule(field, allow_private=False)
    address = rule.parse(url)
    host = address.raw_host.decode("ascii")
    rule.resolve(host, address.port or _default_port(address))


def _default_port(address: httpx.URL) -> int:
    return 443 if address.scheme == "https" else 80


def _location(response: httpx.Response) -> str:
    """Where a redirect leads: servers send UTF-8 there, though no header may hold it."""
    raw = next(value for name, value in response.headers.raw if name.lower() == b"location")
    return raw.decode("utf-8", "replace")


def _save(response: httpx.Response, target: Path, max_bytes: int, field: str) -> None:
    if response.status_code != 200:
        raise RefusedError(response.status_code, field)
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
