"""An endpoint and its jobs: the part that waits, once blocking and once for asyncio.

Both read alike, line by line. Whatever needs no waiting is in the modules that they call.
"""

import asyncio
import functools
import inspect
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
from pydantic import SecretStr

from avatar_client import protocol
from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.formats import suffix_of
from avatar_client.download import Video, VideoDownload, hide_query, hide_query_async
from avatar_client.endpoint_errors import DownloadError, JobNotFoundError
from avatar_client.protocol import Answer, Call, Outcome, Pace, Pause
from avatar_client.request_body import Media, build_request
from avatar_client.responses import JobStatus, checked_id
from avatar_client.version import __version__

EXECUTION_TIMEOUT_SECONDS = 3600.0  # the platform's own default of 10 minutes ends most jobs
USER_AGENT = f"avatar-client/{__version__}"
STORE_TIMEOUT = httpx.Timeout(30.0, connect=10.0)

_certificates = functools.cache(httpx.create_ssl_context)  # read once, and shared

OnStatus = Callable[[JobStatus], object]


class _Endpoint:
    """What both endpoints are made of.

    Args:
        url: the base URL, or the bare id of an endpoint on RunPod.
        api_key: is sent to the endpoint and to nobody else.
        uploads: a bucket for inputs that are too large for a request.
        poll_seconds: the shortest pause between two questions about a job; it grows with time.
        signing_key: the endpoint's `RESULT_SIGNING_KEY`: a result must then be signed with it.

    Raises:
        ValueError: an address or a key that cannot be one.
    """

    def __init__(
        self,
        url: str,
        api_key: str | SecretStr,
        uploads: BucketSettings | None = None,
        *,
        poll_seconds: float = 1.0,
        signing_key: str | SecretStr | None = None,
    ) -> None:
        self.url = protocol.base_url(url)
        self.uploads = uploads
        self.poll_seconds = poll_seconds
        self.signing_key = protocol.checked_signing_key(signing_key)
        key = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key
        self._api_options: dict[str, Any] = {
            "base_url": self.url,
            # httpx.Headers does not show a key in its own text
            "headers": httpx.Headers(
                {"Authorization": f"Bearer {protocol.checked_key(key)}", "User-Agent": USER_AGENT}
            ),
            "verify": _certificates(),
        }
        self._store_options: dict[str, Any] = {
            "headers": {"User-Agent": USER_AGENT},
            "verify": _certificates(),
            "timeout": STORE_TIMEOUT,
            "follow_redirects": True,
            "max_redirects": 5,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class _Job:
    """What both jobs are made of."""

    def __init__(self, job_id: str, signing_key: SecretStr | None) -> None:
        self._signing_key = signing_key
        try:
            self.id = checked_id(job_id)
        except ValueError as error:
            raise JobNotFoundError(str(error)) from None
        self._result: JobStatus | None = None  # outlives the platform's memory of it

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    def _remember(self, answer: dict[str, Any]) -> JobStatus:
        status = protocol.read_status(answer, self._signing_key)
        if status.is_over:
            self._result = status
        return status

    def _target(self, status: JobStatus, path: Path | str) -> tuple[Video, Path]:
        """The video of a job, and the file for it."""
        if not status.is_over:
            raise DownloadError(f"job {self.id} has no video yet: it is {status.status}")
        output = protocol.completed(status).output or {}
        video, path = Video.parse(output), Path(path)
        if path.is_dir():
            path /= f"{self.id}{suffix_of(output.get('content_type'))}"
        return video, path


class AvatarEndpoint(_Endpoint):
    """An endpoint of the avatar worker; leaving the context closes its connections."""

    def __init__(
        self,
        url: str,
        api_key: str | SecretStr,
        uploads: BucketSettings | None = None,
        *,
        poll_seconds: float = 1.0,
        signing_key: str | SecretStr | None = None,
    ) -> None:
        super().__init__(url, api_key, uploads, poll_seconds=poll_seconds, signing_key=signing_key)
        self._api = httpx.Client(**self._api_options)
        self._store = httpx.Client(**self._store_options, event_hooks={"request": [hide_query]})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._api.close()
        self._store.close()

    def request(
        self,
        image: Media,
        audio: Media | None = None,
        *,
        webhook: str | None = None,
        execution_timeout_seconds: float = EXECUTION_TIMEOUT_SECONDS,
        **input_fields: Any,
    ) -> dict[str, Any]:
        """The JSON body that `submit` sends. Too large files go to the bucket of `uploads`.

        Args:
            image: a path or bytes, sent inside the request; or an https URL or a data: URI.
            audio: the same; None where there are `speakers`, each of which has an `audio` of its
                own in these forms.
            webhook: is called by the platform when the job is over.
            execution_timeout_seconds: after so long the platform ends the job.
            input_fields: the other fields of `input`, as in `contract.request.JobInput`.

        Raises:
            InvalidInputError: a value that no worker would take; names the field.
            UploadError: the bucket refused a file or did not answer.
        """
        return build_request(
            image,
            audio,
            webhook=webhook,
            execution_timeout_seconds=execution_timeout_seconds,
            input_fields=input_fields,
            uploads=self.uploads,
        )

    def submit(
        self,
        image: Media,
        audio: Media | None = None,
        *,
        webhook: str | None = None,
        execution_timeout_seconds: float = EXECUTION_TIMEOUT_SECONDS,
        **input_fields: Any,
    ) -> "AvatarJob":
        """The job, which is now in the queue; see `request`.

        It is sent again only if it has certainly not arrived. With a `request_id` it is sent again
        in any case, and one video is made of it.

        Raises:
            InvalidInputError: a value that no worker would take; nothing was sent.
            EndpointError: the endpoint did not take it; the text says if that is not certain.
        """
        body = self.request(
            image,
            audio,
            webhook=webhook,
            execution_timeout_seconds=execution_timeout_seconds,
            **input_fields,
        )
        return self.job(protocol.read_status(self._ask(protocol.submit(body))).id)

    def job(self, job_id: str) -> "AvatarJob":
        """The job of an earlier `submit`.

        Raises:
            JobNotFoundError: no job can have this id.
        """
        return AvatarJob(self, job_id)

    def health(self) -> dict[str, Any]:
        """How many jobs wait and run, and on how many workers."""
        return self._ask(protocol.health())

    def _ask(self, call: Call) -> dict[str, Any]:
        attempts = itertools.count(1)
        while True:
            answer = protocol.read(call, self._send(call), next(attempts), self.poll_seconds)
            if not isinstance(answer, Pause):
                return answer
            time.sleep(answer.seconds)

    def _send(self, call: Call) -> Outcome:
        try:
            with self._api.stream(call.method, call.path, **call.options) as response:
                answer = Answer(response)
                for chunk in response.iter_bytes():
                    answer.add(chunk)
                return answer.whole()
        except httpx.RequestError as error:
            return error

    def _fetch(self, video: Video, path: Path) -> None:
        with VideoDownload(path, video) as file:
            if video.content:
                file.write(video.content)
            for pause_seconds in file.attempts(self.poll_seconds):
                time.sleep(pause_seconds)
                with (
                    file.attempt() as headers,
                    self._store.stream("GET", video.url, headers=headers) as response,
                ):
                    if file.accepts(response):
                        for chunk in response.iter_raw():
                            file.write(chunk)


class AvatarJob(_Job):
    """One job of an endpoint."""

    def __init__(self, endpoint: AvatarEndpoint, job_id: str) -> None:
        super().__init__(job_id, endpoint.signing_key)
        self._endpoint = endpoint

    def status(self) -> JobStatus:
        """The job as it is now.

        Raises:
            JobNotFoundError: the endpoint does not know it, or no longer.
            SignatureError: its result is not signed with the endpoint's `signing_key`.
            EndpointError: the endpoint did not answer, after several attempts.
        """
        return self._remember(self._endpoint._ask(protocol.status(self.id)))

    def updates(self, timeout_seconds: float | None = None) -> Iterator[JobStatus]:
        """The job as it is now, and again after each pause, until it is over.

        Raises:
            WaitTimeoutError: it is not over in time; it goes on.
        """
        pace = Pace(self._endpoint.poll_seconds, timeout_seconds)
        while not (status := self.status()).is_over:
            yield status
            time.sleep(pace.pause_after(status))
        yield status

    def wait(
        self, on_status: OnStatus | None = None, timeout_seconds: float | None = None
    ) -> JobStatus:
        """The job once it is completed. `on_status` is told each status on the way.

        Raises:
            JobFailedError: it failed; the error says why, and whether another attempt may help.
            JobCancelledError: somebody cancelled it.
            JobTimedOutError: the platform ended it at its limit.
            WaitTimeoutError: it is not over in time; it goes on.
        """
        for status in self.updates(timeout_seconds):
            if on_status is not None:
                on_status(status)
        return protocol.completed(status)

    def cancel(self) -> JobStatus:
        """The job after the platform was told to end it."""
        return self._remember(self._endpoint._ask(protocol.cancel(self.id)))

    def download(self, path: Path | str) -> Path:
        """The file with the video, of the size and the sha256 that the worker named.

        In a directory it takes the name of the job. A connection that breaks off is taken up again.

        Raises:
            DownloadError: there is no video, or it did not arrive whole; nothing was written.
            JobFailedError, JobCancelledError, JobTimedOutError: the job has none.
        """
        video, target = self._target(self._result or self.status(), path)
        self._endpoint._fetch(video, target)
        return target


class AsyncAvatarEndpoint(_Endpoint):
    """`AvatarEndpoint` for asyncio."""

    def __init__(
        self,
        url: str,
        api_key: str | SecretStr,
        uploads: BucketSettings | None = None,
        *,
        poll_seconds: float = 1.0,
        signing_key: str | SecretStr | None = None,
    ) -> None:
        super().__init__(url, api_key, uploads, poll_seconds=poll_seconds, signing_key=signing_key)
        self._api = httpx.AsyncClient(**self._api_options)
        self._store = httpx.AsyncClient(
            **self._store_options, event_hooks={"request": [hide_query_async]}
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._api.aclose()
        await self._store.aclose()

    async def request(
        self,
        image: Media,
        audio: Media | None = None,
        *,
        webhook: str | None = None,
        execution_timeout_seconds: float = EXECUTION_TIMEOUT_SECONDS,
        **input_fields: Any,
    ) -> dict[str, Any]:
        """As `AvatarEndpoint.request`; files are read and uploaded in a thread."""
        return await asyncio.to_thread(
            build_request,
            image,
            audio,
            webhook=webhook,
            execution_timeout_seconds=execution_timeout_seconds,
            input_fields=input_fields,
            uploads=self.uploads,
        )

    async def submit(
        self,
        image: Media,
        audio: Media | None = None,
        *,
        webhook: str | None = None,
        execution_timeout_seconds: float = EXECUTION_TIMEOUT_SECONDS,
        **input_fields: Any,
    ) -> "AsyncAvatarJob":
        """As `AvatarEndpoint.submit`."""
        body = await self.request(
            image,
            audio,
            webhook=webhook,
            execution_timeout_seconds=execution_timeout_seconds,
            **input_fields,
        )
        return self.job(protocol.read_status(await self._ask(protocol.submit(body))).id)

    def job(self, job_id: str) -> "AsyncAvatarJob":
        """As `AvatarEndpoint.job`; nothing to await."""
        return AsyncAvatarJob(self, job_id)

    async def health(self) -> dict[str, Any]:
        """As `AvatarEndpoint.health`."""
        return await self._ask(protocol.health())

    async def _ask(self, call: Call) -> dict[str, Any]:
        attempts = itertools.count(1)
        while True:
            answer = protocol.read(call, await self._send(call), next(attempts), self.poll_seconds)
            if not isinstance(answer, Pause):
                return answer
            await asyncio.sleep(answer.seconds)

    async def _send(self, call: Call) -> Outcome:
        try:
            async with self._api.stream(call.method, call.path, **call.options) as response:
                answer = Answer(response)
                async for chunk in response.aiter_bytes():
                    answer.add(chunk)
                return answer.whole()
        except httpx.RequestError as error:
            return error

    async def _fetch(self, video: Video, path: Path) -> None:
        with VideoDownload(path, video) as file:
            if video.content:
                file.write(video.content)
            for pause_seconds in file.attempts(self.poll_seconds):
                await asyncio.sleep(pause_seconds)
                with file.attempt() as headers:
                    async with self._store.stream("GET", video.url, headers=headers) as response:
                        if file.accepts(response):
                            async for chunk in response.aiter_raw():
                                file.write(chunk)


class AsyncAvatarJob(_Job):
    """`AvatarJob` for asyncio. Cancelling a task that waits does not cancel the job."""

    def __init__(self, endpoint: AsyncAvatarEndpoint, job_id: str) -> None:
        super().__init__(job_id, endpoint.signing_key)
        self._endpoint = endpoint

    async def status(self) -> JobStatus:
        """As `AvatarJob.status`."""
        return self._remember(await self._endpoint._ask(protocol.status(self.id)))

    async def updates(self, timeout_seconds: float | None = None) -> AsyncIterator[JobStatus]:
        """As `AvatarJob.updates`."""
        pace = Pace(self._endpoint.poll_seconds, timeout_seconds)
        while not (status := await self.status()).is_over:
            yield status
            await asyncio.sleep(pace.pause_after(status))
        yield status

    async def wait(
        self, on_status: OnStatus | None = None, timeout_seconds: float | None = None
    ) -> JobStatus:
        """As `AvatarJob.wait`; what `on_status` returns is awaited if it can be."""
        async for status in self.updates(timeout_seconds):
            told = on_status(status) if on_status is not None else None
            if inspect.isawaitable(told):
                await told
        return protocol.completed(status)

    async def cancel(self) -> JobStatus:
        """As `AvatarJob.cancel`."""
        return self._remember(await self._endpoint._ask(protocol.cancel(self.id)))

    async def download(self, path: Path | str) -> Path:
        """As `AvatarJob.download`."""
        video, target = self._target(self._result or await self.status(), path)
        await self._endpoint._fetch(video, target)
        return target
