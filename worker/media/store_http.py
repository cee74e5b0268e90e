"""What carries botocore's requests: the worker's own connections instead of its session.

A client may name the store. So the addresses that are dialled are checked as those of downloads
are, an answer has a deadline and a size however it is sent, a stop is met meanwhile, and no other
host is contacted than the store's: botocore chooses one by itself for some names of buckets.
"""

import io
import ssl
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpcore
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.compat import HTTPHeaders
from botocore.exceptions import (
    ConnectionClosedError,
    EndpointConnectionError,
    ReadTimeoutError,
    SSLError,
)

from avatar_client.contract.job_errors import InputDownloadError, InputUrlBlockedError, UploadError
from worker.media.connection import Rule, Wait, connection_pool, nothing_to_check

ANSWER_SECONDS = 60.0  # for one request with its answer ...
BYTES_PER_SECOND = 100_000  # ... beside the time that a slow line takes for a file
MAX_ANSWER_BYTES = 2**20  # none that is read is longer than a few kB
CHUNK_BYTES = 256 * 1024
# What h11 or the store's signature knows better, or what would make botocore wait for a `100`.
OWN_HEADERS = ("expect", "connection", "host")


class StoreHttp:
    """Sends the requests of one client of botocore.

    Args:
        host: that may be contacted, with its port as it stands in an address.
        field: of the request that named the store; None: the operator did.
        allow_private: whether the store may be at a private address or speak plain http.
    """

    def __init__(self, host: str, *, field: str | None, allow_private: bool) -> None:
        self._host = host
        self._field = field
        self._wait = Wait(ANSWER_SECONDS, nothing_to_check)
        self._max_content_bytes = 0
        self._pool = connection_pool(Rule(field, allow_private), self._wait)
        weakref.finalize(self, self._pool.close)  # botocore's clients are not closed by hand

    def begin(self, num_bytes: int, check: Callable[[], None], max_content_bytes: int = 0) -> None:
        """Sets the deadline of the next call and all its requests, and what may stop it.

        Args:
            num_bytes: that are sent with it.
            check: is asked at least every half second; what it raises ends the call.
            max_content_bytes: of an object; 0: none of it is read.
        """
        self._max_content_bytes = max_content_bytes
        self._wait.begin(ANSWER_SECONDS + num_bytes / BYTES_PER_SECOND, check)

    def end(self) -> None:
        """Forgets what may stop a call, which is a job's: `finalize` keeps the connections."""
        self._wait.begin(ANSWER_SECONDS, nothing_to_check)

    def send(self, request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        """The answer to a request: botocore's `before-send` event, whose answer is the response.

        Raises:
            ReadTimeoutError, SSLError, EndpointConnectionError, ConnectionClosedError: botocore's
                own, in the cases in which its session raises them.
            InputUrlBlockedError: the store's name leads to an address that must not be contacted.
            UploadError: the object is larger than may be read.
        """
        try:
            return self._send(request)
        except InputDownloadError as error:  # no such name
            raise EndpointConnectionError(endpoint_url="", error=error) from error
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url="", error=error) from error
        except ssl.SSLError as error:
            raise SSLError(endpoint_url="", error=error) from error
        except ConnectionRefusedError as error:
            raise EndpointConnectionError(endpoint_url="", error=error) from error
        except (OSError, httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise ConnectionClosedError(endpoint_url="", error=error) from error

    def _send(self, request: AWSPreparedRequest) -> AWSResponse:
        address = urlsplit(request.url)
        if address.netloc != self._host:
            raise InputUrlBlockedError("leads to another host than the store's", field=self._field)
        headers = [
            (name, value)
            for name, value in request.headers.items()
            if name.lower() not in OWN_HEADERS
        ]
        target = f"{address.path or '/'}?{address.query}" if address.query else address.path or "/"
        sent = httpcore.Request(
            request.method,
            httpcore.URL(
                scheme=address.scheme,
                host=address.hostname or "",
                port=address.port,
                target=target,
            ),
            headers=[("Host", address.netloc), *headers],
            content=_pieces(request.body),
        )
        response = self._pool.handle_request(sent)
        try:
            if not request.stream_output or response.status >= 300:
                content = _read(response, MAX_ANSWER_BYTES, ConnectionAbortedError())
            else:
                content = self._object(response)
        finally:
            response.close()
        told = HTTPHeaders.from_pairs(_text(response.headers))
        return AWSResponse(request.url, response.status, told, _Raw(content))

    def _object(self, response: httpcore.Response) -> bytes:
        max_bytes = self._max_content_bytes
        if max_bytes == 0:
            return b""
        # none of botocore's errors: it will be as large when it is asked for again
        too_large = UploadError(f"the object has more than {max_bytes} bytes", field=self._field)
        return _read(response, max_bytes, too_large)


class _Raw(io.BytesIO):
    """A body that has been read, as urllib3 hands one to botocore."""

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self.read()


def _read(response: httpcore.Response, max_bytes: int, too_large: Exception) -> bytes:
    content = bytearray()
    for chunk in response.iter_stream():
        content += chunk
        if len(content) > max_bytes:
            raise too_large
    return bytes(content)


def _pieces(body: Any) -> Iterator[bytes]:
    """A request's body: bytes, or a file that may be sent again from its start."""
    if isinstance(body, bytes | bytearray):
        yield bytes(body)
    elif body is not None:
        while piece := body.read(CHUNK_BYTES):
            yield piece


def _text(headers: list[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
