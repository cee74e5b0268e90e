"""Tracks the studio's jobs while they run: a task for each of them, whatever the pages do."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from avatar_client import (
    AsyncAvatarEndpoint,
    AsyncAvatarJob,
    DownloadError,
    EndpointError,
    EndpointUnavailableError,
    JobError,
    JobStatus,
    Progress,
)
from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.request_body import MAX_BODY_BYTES
from studio import preview
from studio.connection import Connection
from studio.history import History, Record, stored_output

logger = logging.getLogger(__name__)

# What no person has asked for: an endpoint whose worker does not know one of these gets the job
# without it.
OWN_FIELDS: Mapping[str, Any] = {"preview": True}
UNKNOWN_FIELD = "unknown key"  # how a worker begins to say so
RETRY_SECONDS = 5.0  # after an endpoint has not answered; the job may well go on


@dataclass(frozen=True, slots=True)
class JobState:
    """One job as a page shows it."""

    record: Record
    is_tracked: bool
    progress: Progress | None = None
    left_seconds: float | None = None
    elapsed_seconds: float = 0.0  # since this process began to track it
    note: str = ""  # what it waits for
    preview: str | None = None  # a `data:` URL of the studio's own making


class TrackedJob:
    """One job that this process tracks."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.job: AsyncAvatarJob | None = None
        self.sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None]
        self.progress: Progress | None = None
        self.progress_at = 0.0
        self.started_at = time.monotonic()
        self.note = ""
        self.preview: str | None = None

    def state(self) -> JobState:
        """The job now; the remaining time counts down between two polls, unless there is a note."""
        now = time.monotonic()
        left = self.progress.eta_seconds if self.progress and not self.note else None
        if left is not None:
            left = max(0.0, left - (now - self.progress_at))
        elapsed = now - self.started_at
        return JobState(self.record, True, self.progress, left, elapsed, self.note, self.preview)


class JobTracker:
    """Every job that this process tracks, and the history of the others."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._jobs: dict[str, TrackedJob] = {}
        self._unknown: dict[str, set[str]] = defaultdict(set)  # of own fields, by the endpoint

    async def start(
        self, connection: Connection, portrait: Path, speech: Path | None, fields: dict[str, Any]
    ) -> Record:
        """The record of the job, which the endpoint has taken.

        Args:
            speech: None: each of the speakers in `fields` has a path as its `audio`.

        Raises:
            WorkerError: a value that no worker would take, or a bucket that takes no file.
            EndpointError: the endpoint did not take it.
            ValueError: an address or a key that cannot be one.
        """
        _require_body_size(connection, portrait, speech, fields)

        async def begin() -> TrackedJob:
            record = await asyncio.to_thread(
                self.history.add,
                portrait,
                speech,
                fields,
                endpoint=connection.name,
                busy=self._jobs.keys(),
            )
            return self._track(record, connection)

        # a page that goes away stops nothing, neither while its files are copied nor later
        tracked = await asyncio.shield(asyncio.create_task(begin()))
        await asyncio.shield(tracked.sent)
        return tracked.record

    def resume(self, connection: Connection) -> None:
        """Tracks the endpoint's unfinished jobs that are not tracked yet."""
        for record in self.history.all():
            is_waiting = not record.is_over and record.id not in self._jobs
            if is_waiting and record.job_id is not None and record.endpoint == connection.name:
                self._track(record, connection)

    async def cancel(self, record_id: str) -> None:
        """Tells the endpoint to end the job.

        Raises:
            EndpointError: it did not answer, or refused.
        """
        tracked = self._jobs.get(record_id)
        if tracked is None or tracked.job is None:
            return
        tracked.note = "Cancelling"
        try:
            status = await tracked.job.cancel()
        except EndpointError:
            tracked.note = ""
            raise
        if status.status == "CANCELLED":
            self._save(tracked, status="CANCELLED")
            tracked.task.cancel()

    def state(self, record_id: str | None) -> JobState | None:
        """The job; None if it is unknown."""
        if tracked := self._jobs.get(record_id or ""):
            return tracked.state()
        record = self.history.get(record_id)
        return JobState(record, False) if record else None

    def states(self) -> list[JobState]:
        """Every job, newest first."""
        states = (self.state(record.id) for record in self.history.all())
        return [state for state in states if state]

    async def close(self) -> None:
        """Stops tracking; the jobs go on at their endpoints."""
        tasks = [tracked.task for tracked in self._jobs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _track(self, record: Record, connection: Connection) -> TrackedJob:
        tracked = TrackedJob(record)
        self._jobs[record.id] = tracked
        tracked.task = asyncio.create_task(self._send_and_watch(tracked, connection))
        tracked.task.add_done_callback(lambda _: self._jobs.pop(record.id))
        return tracked

    async def _send_and_watch(self, tracked: TrackedJob, connection: Connection) -> None:
        try:
            async with connection.open() as endpoint:
                if tracked.record.job_id is None:
                    await self._send(tracked, endpoint, connection.url)
                    tracked.sent.set_result(None)
                else:
                    tracked.job = endpoint.job(tracked.record.job_id)
                status = await self._watch(tracked)
                while self._learns_from(status, connection.url):
                    await self._send(tracked, endpoint, connection.url)
                    status = await self._watch(tracked)
                await self._end(tracked, status)
        except Exception as error:
            if tracked.record.job_id is None:  # the inputs are still on the page
                self.history.remove(tracked.record)
                tracked.sent.set_exception(error)
            else:
                self._save(tracked, status="FAILED", error=_error_fields(error))

    async def _send(self, tracked: TrackedJob, endpoint: AsyncAvatarEndpoint, url: str) -> None:
        unknown = self._unknown[url]
        own = {name: value for name, value in OWN_FIELDS.items() if name not in unknown}
        tracked.job = await endpoint.submit(
            self.history.portrait(tracked.record),
            self.history.speech(tracked.record),
            **own,
            **self.history.fields(tracked.record),
        )
        self._save(tracked, job_id=tracked.job.id, status="IN_QUEUE")

    def _learns_from(self, status: JobStatus, url: str) -> bool:
        """Whether the job was refused for a field of the studio's own, which is sent no more."""
        error, unknown = status.error, self._unknown[url]
        if not _is_unknown_field(error) or error.field not in OWN_FIELDS.keys() - unknown:
            return False
        unknown.add(error.field)
        return True

    async def _watch(self, tracked: TrackedJob) -> JobStatus:
        """The job once it is over."""
        assert tracked.job is not None
        while True:
            try:
                async for status in tracked.job.updates():
                    await self._note(tracked, status)
                return status
            except EndpointUnavailableError:
                tracked.note = "The endpoint does not answer. Trying again"
                await asyncio.sleep(RETRY_SECONDS)

    async def _end(self, tracked: TrackedJob, status: JobStatus) -> None:
        """Fetches the video of a job that is over, and keeps what became of it."""
        assert tracked.job is not None
        if status.status == "COMPLETED":
            tracked.note = "Fetching the video"
            await tracked.job.download(self.history.video(tracked.record))
        error = asdict(status.error) if status.error else None
        if error is not None and _is_unknown_field(status.error):
            error["message"] = "is not known to the endpoint, whose worker is older than this page"
        output = stored_output(status.output or {})
        self._save(tracked, status=status.status, output=output, error=error)

    async def _note(self, tracked: TrackedJob, status: JobStatus) -> None:
        tracked.note = "" if tracked.note != "Cancelling" else tracked.note
        if status.progress is not None:
            jpeg = status.progress.preview
            if jpeg is not None and (not tracked.progress or jpeg != tracked.progress.preview):
                tracked.preview = await asyncio.to_thread(preview.redrawn, jpeg)
            tracked.progress, tracked.progress_at = status.progress, time.monotonic()
        if not status.is_over and status.status != tracked.record.status:
            self._save(tracked, status=status.status)

    def _save(self, tracked: TrackedJob, **changes: Any) -> None:
        tracked.record = replace(tracked.record, **changes)
        self.history.save(tracked.record)


def _require_body_size(
    connection: Connection, portrait: Path, speech: Path | None, fields: Mapping[str, Any]
) -> None:
    """Checks that the files fit into a request, if there is no bucket for them.

    Raises:
        InvalidInputError: they are too large.
    """
    files = {"image": portrait} | ({} if speech is None else {"audio": speech})
    for index, speaker in enumerate(fields.get("speakers", ())):
        files[f"speakers.{index}.audio"] = speaker["audio"]
    sizes = {field: path.stat().st_size for field, path in files.items()}
    if connection.uploads is None and sum(sizes.values()) * 4 / 3 > MAX_BODY_BYTES:
        largest = max(sizes, key=lambda field: sizes[field])
        raise InvalidInputError(
            f"is too large to be sent inside a request ({sizes[largest] / 1e6:.1f} MB); shorten "
            "it, or set the BUCKET_ variables, so that it can go through a bucket",
            field=largest,
        )


def _is_unknown_field(error: JobError | None) -> TypeGuard[JobError]:
    """Whether the worker has refused a field because it does not know it."""
    return (
        error is not None
        and error.code == InvalidInputError.code
        and error.message.startswith(UNKNOWN_FIELD)
    )


def _error_fields(error: Exception) -> dict[str, Any]:
    """An error as the record keeps it."""
    if isinstance(error, DownloadError):
        message = f"The video was made but could not be fetched: {error}"
        return asdict(JobError("DOWNLOAD_FAILED", message))
    if isinstance(error, EndpointError):
        return asdict(JobError("ENDPOINT", str(error)))
    logger.error("a job could not be tracked: %s", type(error).__name__)
    return asdict(JobError("INTERNAL", f"the studio itself failed ({type(error).__name__})"))
