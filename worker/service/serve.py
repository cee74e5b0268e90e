"""The worker on RunPod's queue: check, then take jobs until told to stop.

The SDK's loop is kept; its two calls are ours (`control_plane`). Four things about it are mended
here, each seen in versions 1.12.0 and 2.0.0rc2:

- a SIGTERM while the worker is idle was heeded only when the long poll for a job ended, up to 90 s
  later, and a job that arrived in that time was accepted and never run;
- a failing poll was repeated at once, hundreds of times a second;
- a stop that came before the job had a task was dropped;
- after a fault that breaks the GPU context, or the loss of another GPU's process, the worker went
  on taking jobs.
"""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import runpod
from runpod.http_client import AsyncClientSession, ClientSession
from runpod.serverless.modules import rp_job, rp_logger, rp_scale
from runpod.serverless.modules.worker_state import IS_LOCAL_TEST

from worker import logs, own_directory
from worker.service import control_plane, fitness
from worker.service.progress import PostProgress
from worker.service.worker import Worker, unforeseen
from worker.settings import keep_logs_from_clients

WATCH_SECONDS = 1.0  # between two looks whether the worker is still whole
LAST_POLL_SECONDS = 1.0  # on shutdown: for an answer that is already on its way
RETRY_SECONDS = 2.0
EARLY_STOP_SECONDS = 2.0  # for how long a stop is remembered whose job has no task yet


def serve(worker: Worker) -> None:
    """Registers the fitness checks and serves jobs with the loaded model. Returns on shutdown."""
    keep_logs_from_clients()
    level = worker.settings.runpod_log_level
    # the SDK's own default is DEBUG, and its debug lines hold whole results, signed URLs included
    rp_logger.RunPodLogger().level = "INFO" if level in ("TRACE", "DEBUG") else level
    own_directory.remove_leftovers()
    rp_logger.RunPodLogger.log = without_secrets(rp_logger.RunPodLogger.log)
    logs.take_over()
    for check in fitness.checks(worker):
        runpod.serverless.register_fitness_check(check)
    rp_scale.JobScaler = functools.partial(Scaler, worker)
    rp_job.send_result = make_sender(worker)
    runpod.serverless.start({"handler": make_handler(worker)})
    worker.shutdown()


def make_handler(worker: Worker) -> Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]:
    """The SDK's handler: the worker's, with a session of its own for the job's progress."""

    async def handler(job: dict[str, Any]) -> dict[str, Any]:
        try:
            async with AsyncClientSession() as session:
                post = None if IS_LOCAL_TEST else _poster(session, job)
                return await worker.handle(job, post=post)
        except Exception:  # the SDK would send the traceback to the client
            return unforeseen().to_output()

    return handler


def without_secrets(log: Callable[..., None]) -> Callable[..., None]:
    """The SDK's own log, which is no logger but prints."""

    def clean(self: rp_logger.RunPodLogger, message: object, *rest: Any, **named: Any) -> None:
        log(self, logs.clean(str(message)), *rest, **named)

    return clean


def make_sender(worker: Worker) -> Callable[..., Awaitable[bool]]:
    """The SDK's `send_result`: stubborn, and with a place for what is not taken."""

    async def send_result(
        session: ClientSession, payload: dict[str, Any], job: dict[str, Any], **_: Any
    ) -> bool:
        async def keep(result: dict[str, Any]) -> str | None:
            return await worker.keep_result(job["id"], result)

        retry_seconds = worker.settings.result_retry_seconds
        is_taken = await control_plane.send_result(
            session, payload, job, retry_seconds=retry_seconds, keep=keep
        )
        if is_taken:
            await worker.drop_kept_result(job["id"])
        return is_taken

    return send_result


def _poster(session: ClientSession, job: dict[str, Any]) -> PostProgress:
    async def post(payload: dict[str, Any]) -> None:
        await control_plane.send_progress(session, payload, job)

    return post


class Scaler(rp_scale.JobScaler):  # type: ignore[misc]  # the SDK is untyped
    """The SDK's loop with a shutdown that is prompt and loses no job.

    It ends by itself once the worker is damaged.
    """

    def __init__(self, worker: Worker, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.jobs_fetcher = self._fetch_jobs
        self._worker = worker
        self._draining = asyncio.Event()
        self._early_stops: dict[str, float] = {}  # job ids, and when the stop came

    def kill_worker(self) -> None:
        """Takes no more jobs; the one that runs is finished, and can still be cancelled."""
        self._worker.expect_end()
        self._draining.set()

    async def run(self) -> None:
        """Serves until `kill_worker`."""
        async with AsyncClientSession() as session:
            take = asyncio.create_task(self.get_jobs(session))
            run = asyncio.create_task(self.run_jobs(session))
            stop = asyncio.create_task(self.monitor_stop_signals(session))
            watch = asyncio.create_task(self._watch())
            await asyncio.wait({take})  # from here on no job can come ...
            self._shutdown_event.set()  # ... so the queue may be left once it is empty
            await run
            for task in (stop, watch):
                task.cancel()
            await asyncio.wait({stop, watch})

    async def stop_job(self, job_id: str) -> bool:
        """Stops a job, or remembers to: its stop may come before its task."""
        was_found: bool = await super().stop_job(job_id)
        if not was_found:
            self._early_stops[job_id] = time.monotonic()
        return was_found

    def _is_stopped_early(self, job_id: str) -> bool:
        now = time.monotonic()
        self._early_stops = {
            name: at for name, at in self._early_stops.items() if now - at < EARLY_STOP_SECONDS
        }
        return self._early_stops.pop(job_id, None) is not None

    async def handle_job(self, session: ClientSession, job: dict[str, Any]) -> None:
        """Runs one job; after one that has damaged the worker there is no further one."""
        task = asyncio.current_task()
        if task is not None and self._is_stopped_early(job["id"]):
            task.cancel()  # the SDK's own cleaning up follows at the first wait
        await super().handle_job(session, job)
        if self._worker.damaged:
            self.kill_worker()

    async def _watch(self) -> None:
        while not self._worker.damaged:
            await asyncio.sleep(WATCH_SECONDS)
        self.kill_worker()

    async def _fetch_jobs(self, session: ClientSession, count: int) -> list[dict[str, Any]] | None:
        if self._draining.is_set():
            raise asyncio.CancelledError  # ends get_jobs
        poll = asyncio.create_task(control_plane.take(session))
        drain = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({poll, drain}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({poll}, timeout=LAST_POLL_SECONDS)
            if not poll.done():
                raise asyncio.CancelledError
            jobs: list[dict[str, Any]] | None = poll.result()
            return jobs
        except Exception:
            await asyncio.sleep(RETRY_SECONDS)
            raise
        finally:
            poll.cancel()
            drain.cancel()
