"""The worker: one model, and one job at a time in a thread of its own.

The handler's coroutine waits while the thread does the work, so that the SDK can stop a job at any
time: a stop sets an event that the denoising loop meets at its next step, the thread ends, its
files are gone, and nothing is posted.
"""

import asyncio
import contextvars
import json
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from avatar_client.contract import signature
from avatar_client.contract.job_errors import InternalError, WorkerError
from worker import logs
from worker.media import inputs
from worker.service import job_request, machine, process
from worker.service.estimate import ThroughputEstimator
from worker.service.job import JobRun, JobStoppedError
from worker.service.job_request import JobRequest
from worker.service.progress import PostProgress, ProgressReporter
from worker.service.resume import Resumption
from worker.settings import Settings

if TYPE_CHECKING:  # imports torch
    from worker.generation.engine import Engine

logger = logging.getLogger(__name__)

KEEP_SECONDS = 30.0  # for a store to take a result; one that hangs must not hold up the next try
WATCH_SECONDS = 0.5  # between two looks whether the thread waits for a lost rank
OUT_OF_TOUCH_SECONDS = 10.0  # for which the process stood still: the platform may have given it up


class Worker:
    """Serves one job after another with one loaded model.

    Its states:

    - new: no model is loaded; a job that comes now loads it first;
    - loaded, by `load`: takes jobs. After a failure of `load`, `load_error` holds the reason;
    - at work: one job is in the thread, and a further one waits for it;
    - damaged: the GPU or another rank is lost; the process must end and be started anew;
    - shut down, by `shutdown`: with other ranks the process has ended.

    Args:
        settings: what the operator set.
        engine: a model that is loaded already; None: `load` loads it.
    """

    def __init__(self, settings: Settings, engine: "Engine | None" = None) -> None:
        self.settings = settings
        self.load_error: Exception | None = None
        self._damaged = False
        self._engine = engine
        self._last_run: JobRun | None = None
        self._throughput = _estimator(engine) if engine else ThroughputEstimator()
        self._resumption = Resumption.from_settings(settings)
        # one thread: one job on the GPU, also while a stopped one is still leaving it
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    def load(self) -> None:
        """Loads the model; a failure is kept in `load_error` for the fitness check."""
        inputs.sandbox.start()  # beside the model, so that the first job finds it ready
        if self._resumption is not None:
            self._resumption.sweep()
        try:
            self._load_once()
        except Exception as error:
            logger.exception("the model could not be loaded")
            self.load_error = error

    def _load_once(self) -> "Engine":
        """The loaded model, which is loaded now if it was not.

        Raises:
            Exception: whatever went wrong.
        """
        if self._engine is None:
            from worker.generation.engine import Engine  # imports torch

            self._engine = Engine.start(self.settings)
            self._throughput = _estimator(self._engine)
        return self._engine

    @property
    def damaged(self) -> bool:
        """Whether the process must not run another job."""
        return self._damaged or (self._engine is not None and self._engine.is_lost)

    def expect_end(self) -> None:
        """Has the running job keep each state at once: the platform may not wait for its end."""
        if self._resumption is not None:
            self._resumption.is_ending = True

    def shutdown(self) -> None:
        """Ends the other ranks' processes, if there are any, and this one with them, at once."""
        if self._engine is None or self._engine.num_ranks == 1:
            return
        self._engine.close()
        process.exit_now(1 if self.damaged else 0)

    async def handle(
        self, job: dict[str, Any], *, post: PostProgress | None = None
    ) -> dict[str, Any]:
        """One job in, its output out. A failure comes back as `{"error": ...}`, never raised.

        Args:
            job: as the queue gives it: `id`, `input`, perhaps `s3Config`.
            post: sends a progress payload to the client; None: nobody listens.

        Raises:
            asyncio.CancelledError: the job was stopped; its thread has ended by then, unless it
                waits for another rank in vain.
        """
        with logs.hiding(job_request.secret_values(job)):
            try:
                logs.job_id.set(job_request.safe_id(job.get("id")))
                return await self._handle(job_request.parse(job), post)
            except WorkerError as error:
                logger.warning("refused: %s", error)
                return error.to_output(stage="parse")
            except Exception:  # raised, it would reach the client with its traceback
                return unforeseen().to_output()

    async def _handle(self, request: JobRequest, post: PostProgress | None) -> dict[str, Any]:
        async with ProgressReporter(post) as progress:
            run = self._last_run = JobRun(request, self.settings, progress)
            context = contextvars.copy_context()  # the job's id, for the thread's log lines
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(self._thread, context.run, self._run, run)
            try:
                stuck_error = await self._wait(future, run)
            except asyncio.CancelledError:
                run.stop.set()
                await self._wait_uncancelled(future, run)
                logger.info("stopped after %.1f s", run.elapsed_seconds)
                raise
            if stuck_error is not None:
                return stuck_error.to_output(stage=progress.stage)
            return future.result()

    async def keep_result(self, job_id: str, payload: dict[str, Any]) -> str | None:
        """Where the result of the last job now lies beside its video; None: nowhere.

        For a result that the control plane has not taken yet.
        """
        run = self._last_run
        if run is None or run.request.job_id != job_request.safe_id(job_id):
            return None
        try:
            async with asyncio.timeout(KEEP_SECONDS):
                return await asyncio.to_thread(run.keep_result, payload)
        except Exception as error:  # a full disk, say; the result must be sent all the same
            logger.warning("the result was not kept either: %s", type(error).__name__)
            return None

    async def drop_kept_result(self, job_id: str) -> None:
        """Removes what `keep_result` has put there."""
        run = self._last_run
        if run is not None and run.request.job_id == job_request.safe_id(job_id):
            with suppress(Exception):  # what stays is harmless, and the result was taken
                async with asyncio.timeout(KEEP_SECONDS):
                    await asyncio.to_thread(run.drop_kept_result)

    async def _wait(self, future: "asyncio.Future[Any]", run: JobRun) -> WorkerError | None:
        """Returns None when the thread ends, or the job's error once it waits for a lost rank."""
        while not future.done():
            looked_at = time.monotonic()
            try:
                await asyncio.wait({future}, timeout=WATCH_SECONDS)
            finally:  # a stop, too, may be what it wakes up to
                run.was_out_of_touch |= time.monotonic() - looked_at > OUT_OF_TOUCH_SECONDS
            error = self._engine.stuck_error if self._engine else None
            if error is not None and not future.done():
                logger.error("abandoned in %s: %s", run.progress.stage, error)
                run.remove_files()
                return error
        return None

    async def _wait_uncancelled(self, future: "asyncio.Future[Any]", run: JobRun) -> None:
        """The same, however often the job is stopped meanwhile."""
        while True:
            with suppress(asyncio.CancelledError):
                await self._wait(future, run)
                return

    def _sign(self, request: JobRequest, output: dict[str, Any]) -> None:
        key = self.settings.result_signing_key
        if key is None:
            return
        asked_seconds = request.input.output.url_expires_seconds
        output["signature"] = signature.sign(
            key.get_secret_value(),
            request.job_id,
            output,
            asked_seconds or self.settings.bucket_url_expires_seconds,
        )

    def _run(self, run: JobRun) -> dict[str, Any]:
        """The output of a job, whatever happens in it. Runs in the worker's thread."""
        try:
            output = run.execute(self._load_once(), self._throughput, self._resumption)
            self._sign(run.request, output)
            # the SDK drops what cannot be sent without a word
            json.dumps(output, allow_nan=False, ensure_ascii=False).encode()
            logger.info("done in %.1f s", run.elapsed_seconds)
            return output
        except JobStoppedError:
            return {}
        except WorkerError as error:
            failure = machine.as_own_fault(error) or error
            cause = error if failure is not error else error.__cause__
            logger.warning("failed in %s: %s", run.progress.stage, failure, exc_info=cause)
        except Exception as error:
            internal = unforeseen()
            failure = machine.as_own_fault(error) or internal
        finally:
            process.trim_memory()
        self._damaged |= failure.refresh_worker
        return failure.to_output(stage=run.progress.stage)


def unforeseen() -> InternalError:
    """What the client is told of the exception that is handled now, which goes to the log."""
    reference = secrets.token_hex(4)
    logger.exception("unforeseen failure, reference %s", reference)
    return InternalError(f"something unforeseen went wrong; reference {reference}")


def _estimator(engine: "Engine") -> ThroughputEstimator:
    return ThroughputEstimator(engine.gpu_name, engine.num_ranks)
