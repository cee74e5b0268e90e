"""The worker on RunPod's queue: check, then take jobs until told to stop.

The SDK's loop is kept. Three things about it are mended here, each seen in version 1.12.0:

- a SIGTERM while the worker is idle was heeded only when the long poll for a job ended, up to 90 s
  later, and a job that arrived in that time was accepted and never run;
- a failing poll was repeated at once, hundreds of times a second;
- after a fault that breaks the GPU context, or the loss of another GPU's process, the worker went
  on taking jobs.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import runpod
from runpod.http_client import AsyncClientSession, ClientSession
from runpod.serverless.modules import rp_http, rp_job, rp_logger, rp_scale
from runpod.serverless.modules.worker_state import IS_LOCAL_TEST

from worker.service import fitness
from worker.service.progress import PostProgress
from worker.service.worker import Worker

WATCH_SECONDS = 1.0  # between two looks whether the worker is still whole
LAST_POLL_SECONDS = 1.0  # on shutdown: for an answer that is already on its way
RETRY_SECONDS = 2.0


def serve(worker: Worker) -> None:
    """Registers the fitness checks and serves jobs with the loaded model. Returns on shutdown."""
    level = worker.settings.runpod_log_level
    # the SDK's own default is DEBUG, and its debug lines hold whole results, signed URLs included
    rp_logger.RunPodLogger().level = "INFO" if level in ("TRACE", "DEBUG") else level
    for check in fitness.checks(worker):
        runpod.serverless.register_fitness_check(check)
    rp_scale.JobScaler = functools.partial(Scaler, worker)
    runpod.serverless.start({"handler": make_handler(worker)})
    worker.shutdown()


def make_handler(worker: Worker) -> Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]:
    """The SDK's handler: the worker's, with a session of its own for the job's progress."""

    async def handler(job: dict[str, Any]) -> dict[str, Any]:
        async with AsyncClientSession() as session:
            return await worker.handle(job, post=None if IS_LOCAL_TEST else _poster(session, job))

    return handler


def _poster(session: ClientSession, job: dict[str, Any]) -> PostProgress:
    async def post(payload: dict[str, Any]) -> None:
        await rp_http.send_result(session, {"status": "IN_PROGRESS", "output": payload}, job)

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

    def kill_worker(self) -> None:
        """Takes no more jobs; the one that runs is finished, and can still be cancelled."""
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

    async def handle_job(self, session: ClientSession, job: dict[str, Any]) -> None:
        """Runs one job; after one that has damaged the worker there is no further one."""
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
        poll = asyncio.create_task(rp_job.get_job(session, count))
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
