"""An endpoint on the loopback interface: its server, its housekeeping, and its use from a program.

The server's event loop runs in a thread of its own and owns all state; the public methods may be
called from any thread and do their work there.
"""

import asyncio
import fcntl
import json
import logging
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TextIO, TypeVar
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI

from local_endpoint import private_files, webhooks
from local_endpoint.changes import Changes
from local_endpoint.client_api import ClientApi, answer_failures_alike
from local_endpoint.job_queue import JobQueue, JobRecord, Webhook
from local_endpoint.object_store import ObjectStore
from local_endpoint.worker_api import Heartbeat, WorkerApi

logger = logging.getLogger(__name__)
T = TypeVar("T")

ENDPOINT_ID = "local"
SWEEP_SECONDS = 0.5
MAX_CALLS = 8  # of webhooks at the same time; each holds its job's request and result
FORGOTTEN_SECONDS = 60.0  # after this a silent worker is no longer counted


class LocalEndpoint:
    """RunPod's endpoint on this machine, entered as a context or started and stopped by hand.

    Args:
        directory: holds the state: jobs, results, keys. None: a temporary one.
        port: of the loopback interface; 0: a free one, which `url` names.
        api_key: what clients must send; None: one that is kept in the directory.
        with_object_store: starts a store of its own beside it, which ends with it.
        hold_seconds: how long an empty long poll is held open.
        lost_after_seconds: how long a worker may be silent before its job goes to another one.
        webhook_retry_seconds: between the attempts to call a webhook.
    """

    endpoint_id = ENDPOINT_ID

    def __init__(
        self,
        directory: Path | None = None,
        *,
        port: int = 0,
        api_key: str | None = None,
        with_object_store: bool = False,
        hold_seconds: float = 30.0,
        lost_after_seconds: float = 10.0,
        webhook_retry_seconds: float = 10.0,
    ) -> None:
        self._is_temporary = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="avatar-endpoint-"))
        private_files.make_directory(self.directory, own_files=("api-key", "queue.sqlite"))
        self.api_key = api_key or private_files.kept_secret(self.directory / "api-key")
        self._worker_key = private_files.kept_secret(self.directory / "worker-key")
        self._with_object_store = with_object_store
        self._port = port
        self._hold_seconds = hold_seconds
        self._lost_after_seconds = lost_after_seconds
        self._webhook_retry_seconds = webhook_retry_seconds
        self._calls: dict[str, asyncio.Task[None]] = {}  # webhooks under way, by job
        self.origin = ""  # http://host:port
        self.url = ""  # what a client calls its endpoint

    # Life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serves from here on.

        Raises:
            OSError: the port is taken, or another endpoint uses the directory.
            ModuleNotFoundError: the object store's packages are not installed.
        """
        with ExitStack() as undo:
            listener = undo.enter_context(socket.create_server(("127.0.0.1", self._port)))
            self._lock = undo.enter_context(lock(self.directory / "lock"))
            self._object_store = self._started_object_store()
            undo.pop_all()
        # asyncio does so only for sockets that it has made; without it an answer takes 40 ms
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.url = f"{self.origin}/v2/{self.endpoint_id}"
        ready = threading.Event()
        self._thread = threading.Thread(
            target=asyncio.run, args=(self._serve(listener, ready),), daemon=True
        )
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        """Ends every open poll, the server and the object store.

        The jobs stay in the directory, unless it is temporary.
        """
        self._on_loop(self._close)
        self._thread.join()
        if self._object_store:
            self._object_store.stop()
            self._bucket_path.unlink()
        self._lock.close()
        if self._is_temporary:
            shutil.rmtree(self.directory)

    async def _serve(self, listener: socket.socket, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._changes = Changes()
        self._queue = JobQueue(self.directory / "queue.sqlite")
        self._started_at_seconds = time.time()
        self._server = uvicorn.Server(uvicorn.Config(self._app(), log_level="critical"))
        keeping = asyncio.create_task(self._keep_house())
        ready.set()
        with listener:
            await self._server.serve(sockets=[listener])
        keeping.cancel()
        await asyncio.gather(keeping, *self._calls.values(), return_exceptions=True)
        self._queue.close()

    def _close(self) -> None:
        self._server.should_exit = True

    def _app(self) -> FastAPI:
        # no page of documentation: it would fetch its scripts from elsewhere
        app = FastAPI(
            title="Local RunPod endpoint",
            version="2",
            docs_url=None,
            redoc_url=None,
            separate_input_output_schemas=False,
        )
        answer_failures_alike(app)
        self._workers = WorkerApi(
            self._queue,
            self._changes,
            endpoint_id=self.endpoint_id,
            worker_key=self._worker_key,
            hold_seconds=self._hold_seconds,
            is_closing=self._is_closing,
        )
        clients = ClientApi(
            self._queue,
            self._changes,
            endpoint_id=self.endpoint_id,
            api_key=self.api_key,
            count_workers=self._workers.counts,
            is_closing=self._is_closing,
        )
        app.include_router(clients.routes)
        app.include_router(self._workers.routes)
        return app

    def _is_closing(self) -> bool:
        return bool(self._server.should_exit)

    async def _keep_house(self) -> None:
        """What happens by itself: lost workers, time limits, retention, webhooks."""
        while True:
            if self._sweep():
                self._changes.notify()
            await asyncio.sleep(SWEEP_SECONDS)

    def _sweep(self) -> bool:
        now = time.time()
        changed = self._queue.sweep()
        workers = self._workers.workers
        for worker_id in self._queue.holders():
            record = workers.get(worker_id)
            last = record.last_heartbeat_seconds if record else self._started_at_seconds
            if now - last > self._lost_after_seconds:
                for job_id in self._queue.held_by(worker_id):
                    logger.warning("worker %s is gone: job %s waits again", worker_id, job_id)
                    self._queue.requeue(job_id, stop=True)
                    changed = True
        for worker_id, record in list(workers.items()):
            if now - record.last_heartbeat_seconds > FORGOTTEN_SECONDS:
                del workers[worker_id]
                self._queue.forget(worker_id)
        for webhook in self._queue.claim_webhooks(MAX_CALLS, self._calls):
            self._calls[webhook.job_id] = asyncio.create_task(self._call(webhook))
        return changed

    async def _call(self, webhook: Webhook) -> None:
        try:
            taken = await webhooks.call(webhook)
            self._queue.webhook_answered(
                webhook.job_id, taken=taken, retry_seconds=self._webhook_retry_seconds
            )
        finally:
            del self._calls[webhook.job_id]

    # The object store

    @property
    def _bucket_path(self) -> Path:
        return self.directory / "bucket.json"

    def _started_object_store(self) -> ObjectStore | None:
        """A store if one is wanted, with key and, if it is free, port as before a kill.

        So the workers that go on after that deliver to the new one.
        """
        try:
            earlier = json.loads(self._bucket_path.read_text())["endpoint_url"]
        except FileNotFoundError:
            earlier = ""
        self._bucket_path.unlink(missing_ok=True)
        if not self._with_object_store:
            return None
        key = private_files.kept_secret(self.directory / "bucket-key")
        store = ObjectStore(
            self.directory,
            access_key_id=key,
            secret_access_key=key,
            port=urlsplit(earlier).port or 0,
        )
        store.start()
        private_files.write(self._bucket_path, json.dumps(store.settings))
        return store

    # What a program does with it

    @property
    def object_store(self) -> ObjectStore:
        """The endpoint's own, if it was made with one."""
        assert self._object_store is not None
        return self._object_store

    def submit(self, job: dict[str, Any], *, is_sync: bool = False) -> str:
        """The id of the job, which is now in the queue.

        `job` is what the platform hands to the worker, unchecked: `input` and, if given,
        `s3Config`, `policy`, `webhook`, and an `id` of one's own.
        """
        request = {name: value for name, value in job.items() if name != "id"}
        return self._on_loop(
            lambda: self._queue.add(request, job_id=job.get("id"), is_sync=is_sync)
        )

    def state(self, job_id: str) -> JobRecord:
        """The job as it is now."""
        return self._on_loop(lambda: self._record(job_id))

    def cancel(self, job_id: str) -> None:
        """Takes a waiting job out of the queue and tells the worker of a running one to stop."""
        self._on_loop(lambda: self._queue.cancel(job_id))

    def requeue(self, job_id: str) -> None:
        """Hands the job out once more, as a queue may that delivers at least once."""
        self._on_loop(lambda: self._queue.requeue(job_id, stop=False))

    def wait(self, job_id: str, timeout_seconds: float) -> JobRecord:
        """The job once it is over.

        Raises:
            TimeoutError: it is not over in time; the message says how far it is.
        """
        return self.wait_until(job_id, lambda job: job.is_over, timeout_seconds)

    def wait_until(
        self, job_id: str, condition: Callable[[JobRecord], bool], timeout_seconds: float
    ) -> JobRecord:
        """The job once `condition` holds of it.

        Raises:
            TimeoutError: it does not hold in time; the message says how far the job is.
        """

        async def until() -> JobRecord:
            job = self._record(job_id)

            def holds() -> bool:
                nonlocal job
                job = self._record(job_id)
                return condition(job)

            if await self._changes.until(holds, timeout_seconds):
                return job
            raise TimeoutError(f"after {timeout_seconds} s: {job.status}, output {job.output}")

        return self._run(until())

    @property
    def heartbeats(self) -> list[Heartbeat]:
        """The newest pings, oldest first."""
        return self._on_loop(lambda: list(self._workers.heartbeats))

    def wait_for_worker(self, worker_id: str, timeout_seconds: float) -> bool:
        """Whether the worker has asked for a job by then."""

        def has_polled() -> bool:
            record = self._workers.workers.get(worker_id)
            return record is not None and record.has_polled

        return self._run(self._changes.until(has_polled, timeout_seconds))

    def lose_results(self, count: int = 1, *, status: int | None = None) -> None:
        """The next `count` results are not kept.

        They are answered with `status`; None cuts the connection in mid-answer.
        """
        self._on_loop(lambda: self._workers.faults.results.extend([status] * count))

    def delay_answers(self, seconds: float) -> None:
        """How long an answer to a posted body takes from now on."""
        self._workers.faults.answer_delay_seconds = seconds

    def worker_environment(self, worker_id: str, home: Path) -> dict[str, str]:
        """The variables that the platform sets for a worker, and what a worker off it needs.

        `home` keeps credentials of this machine's user away: the SDK prefers those in
        ~/.runpod/config.toml. The SDK's own fitness checks are off, since they dial out.
        """
        return {
            "HOME": str(home),
            "RUNPOD_ENDPOINT_ID": self.endpoint_id,
            "RUNPOD_POD_ID": worker_id,
            "RUNPOD_AI_API_KEY": self._worker_key,
            "RUNPOD_WEBHOOK_GET_JOB": f"{self.url}/job-take/$ID?gpu=local",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self.url}/job-done/$RUNPOD_POD_ID/$ID?gpu=local",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{self.url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=local",
            "RUNPOD_WEBHOOK_PING": f"{self.url}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",  # milliseconds
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "RUNPOD_LOG_LEVEL": "INFO",
        }

    # On the loop

    def _record(self, job_id: str) -> JobRecord:
        record = self._queue.record(job_id)
        if record is None:
            raise KeyError(job_id)
        return record

    def _on_loop(self, action: Callable[[], T]) -> T:
        """The action's value; it runs on the loop and wakes everything that waits."""

        async def act() -> T:
            value = action()
            self._changes.notify()
            return value

        return self._run(act())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def lock(path: Path) -> TextIO:
    """The open file, which no other process can lock until it is closed.

    Raises:
        OSError: another one holds it.
    """
    private_files.make_file(path)
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OSError(f"another endpoint uses {path.parent}") from error
    return file
