"""Contact with addresses that a client chose: the only module that fetches one.

The SDK's rule says which addresses are public (`rp_ssrf.is_safe_address`). Its `safe_get` is not
used: it follows a redirect from https to http, and it has no deadline for the whole download, so
that a server which sends one byte of a header now and then holds the worker for ever.
"""

import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Timer
from urllib.parse import urljoin

import certifi
from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from avatar_client.contract.job_errors import (
    InputDownloadError,
    InputTooLargeError,
    InputUrlBlockedError,
    InvalidInputError,
)
from avatar_client.version import __version__

MAX_REDIRECTS = 5
CHUNK_BYTES = 64 * 1024


def download(
    url: str,
    target: Path,
    *,
    max_bytes: int,
    timeout_seconds: float,
    field: str,
    allow_private: bool,
) -> None:
    """Writes what the address serves to `target`.

    Raises:
        InputUrlBlockedError: the address, or one it redirects to, is not https or not public.
        InputDownloadError: DNS, TLS, HTTP status, or the deadline passed.
        InputTooLargeError: more than `max_bytes`.
        InvalidInputError: not a URL.
    """
    deadline = time.monotonic() + timeout_seconds
    try:
        for _ in range(1 + MAX_REDIRECTS):
            address = _parse(url, field, allow_private)
            with _get(address, _resolve(address, field, allow_private), deadline) as response:
                location = response.getheader("Location")
                if response.status not in (301, 302, 303, 307, 308) or location is None:
                    _save(response, target, max_bytes, field)
                    if time.monotonic() > deadline:  # a cut connection can look like the end
                        raise TimeoutError
                    return
            url = urljoin(address.url, location)
    except (OSError, http.client.HTTPException, ValueError) as error:  # a Location that is no URL
        if time.monotonic() > deadline:
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
    _resolve(_parse(url, field, allow_private), field, allow_private)


def _parse(url: str, field: str, allow_private: bool) -> Url:
    try:
        address = parse_url(url)
    except LocationParseError as error:
        raise InvalidInputError("is not a well-formed URL", field=field) from error
    if address.scheme != "https" and not (allow_private and address.scheme == "http"):
        raise InputUrlBlockedError("only https URLs are fetched", field=field)
    if not address.host:
        raise InvalidInputError("is not a well-formed URL", field=field)
    return address


def _resolve(address: Url, field: str, allow_private: bool) -> list[str]:
    from runpod.serverless.utils.rp_ssrf import is_safe_address  # 1.5 s: the whole SDK

    try:
        found = socket.getaddrinfo(*_host_and_port(address), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise InputDownloadError("the host could not be resolved", field=field) from error
    except UnicodeError as error:  # a label that no host name can have
        raise InvalidInputError("is not a well-formed URL", field=field) from error
    ips = list(dict.fromkeys(str(socket_address[0]) for *_, socket_address in found))
    if not allow_private and not all(is_safe_address(ip) for ip in ips):
        raise InputUrlBlockedError("leads to an address that is not public", field=field)
    return ips


def _host_and_port(address: Url) -> tuple[str, int]:
    return str(address.host).strip("[]"), address.port or (443 if address.scheme == "https" else 80)


@contextmanager
def _get(address: Url, ips: list[str], deadline: float) -> Iterator[http.client.HTTPResponse]:
    with ExitStack() as stack:
        connected = stack.enter_context(_dial(address, ips, deadline))
        # a timeout of the socket starts anew with each byte; only a cut ends a slow drip
        timer = Timer(_seconds_left(deadline), _cut, [connected])
        timer.daemon = True
        timer.start()
        stack.callback(timer.cancel)
        connection = http.client.HTTPConnection(str(address.host))
        connection.sock = connected  # so it neither resolves nor dials
        headers = {
            "Host": str(address.netloc),
            "User-Agent": f"avatar-worker/{__version__}",
            "Accept": "*/*",
            "Connection": "close",
        }
        connection.request("GET", address.request_uri, headers=headers)
        yield stack.enter_context(connection.getresponse())


def _dial(address: Url, ips: list[str], deadline: float) -> socket.socket:
    """A connection to the first of the checked IPs that answers, with TLS for the host's name."""
    host, port = _host_and_port(address)
    for ip in ips:
        try:
            connected = socket.create_connection((ip, port), timeout=_seconds_left(deadline))
            break
        except OSError:  # an IPv6 address, for example, on a host without a route to it
            if ip == ips[-1]:
                raise
    if address.scheme == "http":
        return connected
    context = ssl.create_default_context(cafile=certifi.where())
    return context.wrap_socket(connected, server_hostname=host)


def _seconds_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _cut(connected: socket.socket) -> None:
    with suppress(OSError):  # closed meanwhile
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # below TLS, whose own waits


def _save(response: http.client.HTTPResponse, target: Path, max_bytes: int, field: str) -> None:
    if response.status != 200:
        raise InputDownloadError(f"the server answered HTTP {response.status}", field=field)
    too_large = InputTooLargeError(f"is larger than the limit of {max_bytes} bytes", field=field)
    if (response.length or 0) > max_bytes:
        raise too_large
    num_bytes = 0
    buffer = memoryview(bytearray(CHUNK_BYTES))  # read() takes a chunk of -1 bytes for "everything"
    with target.open("wb") as file:
        while num_read := response.readinto(buffer):
            num_bytes += num_read
            if num_bytes > max_bytes:
                raise too_large
            file.write(buffer[:num_read])
    if response.length:  # of the length that was announced, this much never came
        raise ConnectionError
