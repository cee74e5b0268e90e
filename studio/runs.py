"""The studio's jobs while they run: a task follows each of them, whatever the pages do."""

import asyncio
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from avatar_client import (
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
from studio.connection import Connection
from studio.history import History, Record

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # after an endpoint has not answered; the job may well go on


@dataclass(frozen=True, slots=True)
class State:
    """One job as a page shows it."""

    record: Record
    is_followed: bool
    progress: Progress | None = None
    left_seconds: float | None = None
    elapsed_seconds: float = 0.0  # since this process began to follow it
    note: str = ""  # what keeps it


class Run:
    """One job that is followed."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.job: AsyncAvatarJob | None = None
        self.sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None]
        self.progress: Progress | None = None
        self.progress_at = 0.0
        self.started_at = time.monotonic()
        self.note = ""

    def state(self) -> State:
        """The job now; the remaining time goes on between two answers, while there are some."""
        now = time.monotonic()
        left = self.progress.eta_seconds if self.progress and not self.note else None
        if left is not None:
            left = max(0.0, left - (now - self.progress_at))
        elapsed = now - self.started_at
        return State(self.record, True, self.progress, left, elapsed, self.note)


class Runs:
    """Every job that this process follows, and the history of the others."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._runs: dict[str, Run] = {}

    async def start(
        self, connection: Connection, portrait: Path, speech: Path, fields: dict[str, Any]
    ) -> Record:
        """The record of the job, which the endpoint has taken.

        Raises:
            WorkerError: a value that no worker would take, or a bucket that takes no file.
            EndpointError: the endpoint did not take it.
            ValueError: an address or a key that cannot be one.
        """
        _require_room(connection, portrait, speech)
        record = await asyncio.to_thread(
            self.history.add,
            portrait,
            speech,
            fields,
            endpoint=connection.name,
            busy=self._runs.keys(),
        )
        run = self._follow(record, connection)
        await asyncio.shield(run.sent)  # a page that goes away stops nothing
        return run.record

    def resume(self, connection: Connection) -> None:
        """Follows the endpoint's unfinished jobs that nobody follows."""
        for record in self.history.all():
            is_waiting = not record.is_over and record.id not in self._runs
            if is_waiting and record.job_id is not None and record.endpoint == connection.name:
                self._follow(record, connection)

    async def cancel(self, record_id: str) -> None:
        """Tells the endpoint to end the job.

        Raises:
            EndpointError: it did not hear.
        """
        run = self._runs.get(record_id)
        if run is None or run.job is None:
            return
        run.note = "Cancelling"
        try:
            status = await run.job.cancel()
        except EndpointError:
            run.note = ""
            raise
        if status.status == "CANCELLED":
            self._save(run, status="CANCELLED")
            run.task.cancel()

    def state(self, record_id: str | None) -> State | None:
        """The job; None if it is unknown."""
        if run := self._runs.get(record_id or ""):
            return run.state()
        record = self.history.get(record_id)
        return State(record, False) if record else None

    def states(self) -> list[State]:
        """Every job, newest first."""
        states = (self.state(record.id) for record in self.history.all())
        return [state for state in states if state]

    async def close(self) -> None:
        """Stops following; the jobs go on at their endpoints."""
        tasks = [run.task for run in self._runs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _follow(self, record: Record, connection: Connection) -> Run:
        run = Run(record)
        self._runs[record.id] = run
        run.task = asyncio.create_task(self._run(run, connection))
        run.task.add_done_callback(lambda _: self._runs.pop(record.id))
        return run

    async def _run(self, run: Run, connection: Connection) -> None:
        try:
            async with connection.open() as endpoint:
                if run.record.job_id is None:
                    run.job = await endpoint.submit(
                        self.history.portrait(run.record),
                        self.history.speech(run.record),
                        **run.record.fields,
                    )
                    self._save(run, job_id=run.job.id, status="IN_QUEUE")
                    run.sent.set_result(None)
                else:
                    run.job = endpoint.job(run.record.job_id)
                await self._watch(run, run.job)
        except Exception as error:
            if run.record.job_id is None:  # the inputs are still on the page
                self.history.remove(run.record)
                run.sent.set_exception(error)
            else:
                self._save(run, status="FAILED", error=_told(error))

    async def _watch(self, run: Run, job: AsyncAvatarJob) -> None:
        """Returns when the job is over and its video is here."""
        while True:
            try:
                async for status in job.updates():
                    self._note(run, status)
                break
            except EndpointUnavailableError:
                run.note = "The endpoint does not answer. Trying again"
                await asyncio.sleep(RETRY_SECONDS)
        if status.status == "COMPLETED":
            run.note = "Fetching the video"
            await job.download(self.history.video(run.record))
        error = asdict(status.error) if status.error else None
        self._save(run, status=status.status, output=status.output or {}, error=error)

    def _note(self, run: Run, status: JobStatus) -> None:
        run.note = "" if run.note != "Cancelling" else run.note
        if status.progress is not None:
            run.progress, run.progress_at = status.progress, time.monotonic()
        if not status.is_over and status.status != run.record.status:
            self._save(run, status=status.status)

    def _save(self, run: Run, **changes: Any) -> None:
        run.record = replace(run.record, **changes)
        self.history.save(run.record)


def _require_room(connection: Connection, portrait: Path, speech: Path) -> None:
    """Returns if the files can be sent.

    Raises:
        InvalidInputError: they are too large, and there is no bucket for them.
    """
    sizes = {"image": portrait.stat().st_size, "audio": speech.stat().st_size}
    if connection.uploads is None and sum(sizes.values()) * 4 / 3 > MAX_BODY_BYTES:
        largest = max(sizes, key=lambda field: sizes[field])
        raise InvalidInputError(
            f"is too large to be sent inside a request ({sizes[largest] / 1e6:.1f} MB); shorten "
            "it, or set the BUCKET_ variables, so that it can go through a bucket",
            field=largest,
        )


def _told(error: Exception) -> dict[str, Any]:
    """An error as the record keeps it."""
    if isinstance(error, DownloadError):
        message = f"The video was made but could not be fetched: {error}"
        return asdict(JobError("DOWNLOAD_FAILED", message))
    if isinstance(error, EndpointError):
        return asdict(JobError("ENDPOINT", str(error)))
    logger.error("a job could not be followed: %s", type(error).__name__)
    return asdict(JobError("INTERNAL", f"the studio itself failed ({type(error).__name__})"))
