"""The finished video on its way to a file: the whole one that the worker made, or none at all."""

import base64
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from avatar_client.endpoint_errors import DownloadError

ATTEMPTS = 5
MAX_VIDEO_BYTES = 4 * 2**30  # some minutes are some 100 MB: more is no video of a worker


@dataclass(frozen=True, slots=True)
class Video:
    """Where the video of a result is, and what proves it."""

    size_bytes: int
    sha256: str
    url: str = field(default="", repr=False)  # signed: whoever has it has the video
    content: bytes = field(default=b"", repr=False)

    @classmethod
    def parse(cls, output: dict[str, Any] | None) -> Self:
        """The video of a result.

        Raises:
            DownloadError: the result holds none.
        """
        output = output or {}
        size_bytes, sha256 = output.get("size_bytes"), output.get("sha256")
        if type(size_bytes) is not int or not isinstance(sha256, str):  # no bool
            raise DownloadError("the result holds no video")
        if not 0 < size_bytes <= MAX_VIDEO_BYTES or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise DownloadError("the result holds no video that a worker can have made")
        url, encoded = output.get("video_url"), output.get("video_base64")
        if isinstance(encoded, str):
            try:
                return cls(size_bytes, sha256, content=base64.b64decode(encoded, validate=True))
            except ValueError:  # binascii.Error, or characters that are not ASCII
                raise DownloadError("the video in the result is no base64") from None
        if not isinstance(url, str) or not _is_web_address(url):
            raise DownloadError("the address of the video is no URL")
        return cls(size_bytes, sha256, url=url)


def _is_web_address(url: str) -> bool:
    try:
        address = httpx.URL(url)
        return address.scheme in ("https", "http") and bool(address.host)
    except (httpx.InvalidURL, UnicodeError):  # UnicodeError: of a name that no host can have
        return False


class _UnsignedInText(httpx.URL):
    """A URL whose text lacks the query, though the query is sent."""

    def __str__(self) -> str:
        return str(self.copy_with(query=None))


def hide_query(request: httpx.Request) -> None:
    """Keeps a signature out of what httpx logs of the request: each address, at INFO.

    For the hook of a client's requests, which are those after a redirect as well. At DEBUG httpcore
    logs the headers of answers, and with them where a redirect leads.
    """
    request.url = _UnsignedInText(request.url)


async def hide_query_async(request: httpx.Request) -> None:
    """`hide_query` for an asynchronous client."""
    hide_query(request)


class VideoDownload:
    """A file that grows under a temporary name, and takes its own once it is the video.

    Leaving the context checks size and sha256; after any failure nothing is left.

    Raises:
        DownloadError: it is not the video, or it cannot be written.
    """

    def __init__(self, path: Path, video: Video) -> None:
        self._path = path
        self._video = video
        self._partial = path.with_name(f".{secrets.token_hex(8)}.part")
        self._num_bytes = 0
        self._problem = ""

    def __enter__(self) -> Self:
        with self._on_disk():
            self._file = self._partial.open("xb")
        self._hash = hashlib.sha256()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            with self._on_disk():
                self._file.close()
                if kind is None:
                    self._check()
                    self._partial.replace(self._path)
        finally:
            self._partial.unlink(missing_ok=True)

    def attempts(self, pause_seconds: float) -> Iterator[float]:
        """The pause before each attempt to fetch what is missing, until nothing is.

        Raises:
            DownloadError: too many have failed.
        """
        for attempt in range(ATTEMPTS):
            yield pause_seconds * 2 ** (attempt - 1) if attempt else 0.0
            if self._num_bytes == self._video.size_bytes:
                return
        raise DownloadError(
            f"{self._num_bytes} of {self._video.size_bytes} bytes of the video arrived"
            f"{self._problem}"
        )

    @contextmanager
    def attempt(self) -> Iterator[dict[str, str]]:
        """The headers of a request for what is missing. A connection that fails ends it quietly."""
        headers = {"Accept-Encoding": "identity"}  # the bytes as they were stored
        if self._num_bytes:
            headers["Range"] = f"bytes={self._num_bytes}-"
        self._problem = ""
        try:
            yield headers
        except (httpx.RequestError, UnicodeError) as error:
            self._problem = f" ({type(error).__name__})"

    def accepts(self, response: httpx.Response) -> bool:
        """Whether the body that follows belongs here; False: another attempt may help.

        Raises:
            DownloadError: none will.
        """
        code = response.status_code
        if code == 206:
            begin = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if begin and int(begin[1]) == self._num_bytes:
                return True
        if code in (200, 206, 416):  # no part, or not the one asked for: from the start again
            self._start_again()
            return code == 200
        self._problem = f" (HTTP {code})"
        if code == 429 or response.is_server_error:
            return False
        hint = ": its address may have expired" if code in (401, 403) else ""
        raise DownloadError(f"the store answered HTTP {code}{hint}")

    def write(self, chunk: bytes) -> None:
        """Appends a part of the body.

        Raises:
            DownloadError: there is more of it than the worker made.
        """
        self._num_bytes += len(chunk)
        if self._num_bytes > self._video.size_bytes:
            raise DownloadError(f"more than the {self._video.size_bytes} bytes of the video came")
        self._hash.update(chunk)
        with self._on_disk():
            self._file.write(chunk)

    def _start_again(self) -> None:
        self._num_bytes = 0
        self._hash = hashlib.sha256()
        with self._on_disk():
            self._file.seek(0)
            self._file.truncate()

    def _check(self) -> None:
        if self._num_bytes != self._video.size_bytes:
            raise DownloadError(f"{self._num_bytes} bytes are not {self._video.size_bytes}")
        if self._hash.hexdigest() != self._video.sha256:
            raise DownloadError("what arrived is not what the worker made: its sha256 differs")

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
            raise DownloadError(f"{self._path} cannot be written: {reason}") from None
