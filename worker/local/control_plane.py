"""The platform's side of the worker protocol, over HTTP on the loopback interface.

A worker of the RunPod SDK takes jobs from here, posts progress and results, pings, and hears which
of its jobs to stop. The state lives on the server's event loop; the public methods may be called
from any thread and do their work there.

Source: the requests of runpod-python 1.12.0, runpod/serverless/modules/{rp_job,rp_http,rp_ping}.py.
"""

import asyncio
import copy
import json
import socket
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

Status = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED"]
T = TypeVar("T")


@dataclass(frozen=True)
class Post:
    """One body that a worker sent for a job. Times are of `time.monotonic`."""

    at_seconds: float
    body: dict[str, Any]
    accepted: bool  # False: answered with an error, or came when the job was no longer running

    @property
    def is_progress(self) -> bool:
        return self.body.get("status") == "IN_PROGRESS"


@dataclass(frozen=True)
class Heartbeat:
    """One ping of a worker, with the jobs that it says it works on."""

    at_seconds: float
    worker_id: str
    job_ids: tuple[str, ...]
    failed_check: str | None  # why a worker that is about to exit finds itself unfit


@dataclass
class Job:
    """One job and what became of it. `output` is the newest progress while it is in progress."""

    id: str
    payload: dict[str, Any]  # what the worker is handed
    status: Status = "IN_QUEUE"
    worker_id: str | None = None
    output: Any = None
    error: str | None = None
    stop_pod: bool = False  # the worker asked to be replaced
    posts: list[Post] = field(default_factory=list)  # progress and results
    stream: list[Any] = field(default_factory=list)  # what a generating handler has yielded
    taken_at_seconds: list[float] = field(default_factory=list)
    ended_at_seconds: float | None = None

    @property
    def progress(self) -> list[Any]:
        """The accepted progress payloads, oldest first."""
        return [post.body["output"] for post in self.posts if post.is_progress and post.accepted]

    @property
    def results(self) -> list[Post]:
        """Every result that was posted, accepted or not."""
        return [post for post in self.posts if not post.is_progress]

    @property
    def is_over(self) -> bool:
        return self.status in ("COMPLETED", "FAILED", "CANCELLED")


class ControlPlane:
    """An endpoint with a queue, to be entered as a context or started and stopped by hand.

    Args:
        hold_seconds: how long an empty long poll is held open.
    """

    api_key = "local-key"
    endpoint_id = "local"

    def __init__(self, *, hold_seconds: float = 30.0) -> None:
        self.hold_seconds = hold_seconds
        self.answer_delay_seconds = 0.0  # how long an answer to a posted body takes
        self.url = ""
        self._jobs: dict[str, Job] = {}
        self._queue: deque[str] = deque()
        self._stop_signals: defaultdict[str, list[str]] = defaultdict(list)  # by worker
        self._heartbeats: list[Heartbeat] = []
        self._polling_workers: set[str] = set()
        self._result_faults: deque[int | None] = deque()
        self._server = uvicorn.Server(uvicorn.Config(self._app(), log_level="critical"))

    # Life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serves on a free port of the loopback interface; `url` says which."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        ready = threading.Event()

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._change = self._loop.create_future()
            ready.set()
            with listener:
                await self._server.serve(sockets=[listener])

        self._thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        """Ends every open poll and the server."""
        self._server.should_exit = True
        self._on_loop(lambda: None)  # wakes the polls
        self._thread.join()

    # What a client of the endpoint does

    def submit(self, job: dict[str, Any]) -> str:
        """The id of the job, which is now in the queue.

        `job` is what the platform hands to the worker: `input` and, if given, `s3Config`, `policy`,
        `webhook`, and an `id` of one's own.
        """
        payload = {"id": f"{uuid.uuid4()}-e1", **job}
        record = Job(id=payload["id"], payload=payload)

        def add() -> str:
            self._jobs[record.id] = record
            self._queue.append(record.id)
            return record.id

        return self._on_loop(add)

    def state(self, job_id: str) -> Job:
        """The job as it is now; a copy."""
        return self._on_loop(lambda: copy.deepcopy(self._jobs[job_id]))

    def cancel(self, job_id: str) -> None:
        """Takes a waiting job out of the queue and tells the worker of a running one to stop."""

        def end() -> None:
            job = self._jobs[job_id]
            if job.status == "IN_QUEUE":
                self._queue.remove(job_id)
            elif job.worker_id is not None and not job.is_over:
                self._stop_signals[job.worker_id].append(job_id)
            self._end(job, "CANCELLED")

        self._on_loop(end)

    def requeue(self, job_id: str) -> None:
        """Hands the job out a second time, as after a lost result or a lost worker."""

        def again() -> None:
            job = self._jobs[job_id]
            job.status, job.ended_at_seconds = "IN_QUEUE", None
            self._queue.append(job_id)

        self._on_loop(again)

    def wait(self, job_id: str, timeout_seconds: float) -> Job:
        """The job once it is over.

        Raises:
            TimeoutError: it is not over in time; the message says how far it is.
        """
        return self.wait_until(job_id, lambda job: job.is_over, timeout_seconds)

    def wait_until(
        self, job_id: str, condition: Callable[[Job], bool], timeout_seconds: float
    ) -> Job:
        """The job once `condition` holds of it.

        Raises:
            TimeoutError: it does not hold in time; the message says how far the job is.
        """
        job = self._jobs[job_id]
        if not self._run(self._until(lambda: condition(job), timeout_seconds)):
            raise TimeoutError(f"after {timeout_seconds} s: {job.status}, output {job.output}")
        return self.state(job_id)

    # What the platform knows of its workers

    @property
    def heartbeats(self) -> list[Heartbeat]:
        """Every ping so far, oldest first."""
        return self._on_loop(lambda: list(self._heartbeats))

    def wait_for_worker(self, worker_id: str, timeout_seconds: float) -> bool:
        """Whether the worker has asked for a job by then."""
        return self._run(self._until(lambda: worker_id in self._polling_workers, timeout_seconds))

    def lose_results(self, count: int = 1, *, status: int | None = None) -> None:
        """The next `count` results are not kept.

        They are answered with `status`; None cuts the connection in mid-answer.
        """
        self._on_loop(lambda: self._result_faults.extend([status] * count))

    def worker_environment(self, worker_id: str, home: Path) -> dict[str, str]:
        """The variables that the platform sets for a worker, and what a worker off it needs.

        `home` keeps credentials of this machine's user away: the SDK prefers those in
        ~/.runpod/config.toml. The SDK's own fitness checks are off, since they dial out.
        """
        base = f"{self.url}/v2/{self.endpoint_id}"
        return {
            "HOME": str(home),
            "RUNPOD_ENDPOINT_ID": self.endpoint_id,
            "RUNPOD_POD_ID": worker_id,
            "RUNPOD_AI_API_KEY": self.api_key,
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=local",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=local",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=local",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",  # milliseconds
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "RUNPOD_LOG_LEVEL": "INFO",
        }

    # What a worker asks

    def _app(self) -> FastAPI:
        app = FastAPI(title="RunPod worker protocol")
        base = f"/v2/{self.endpoint_id}"
        app.add_api_route(f"{base}/job-take/{{worker_id}}", self._job_take, methods=["GET"])
        app.add_api_route(f"{base}/job-stop/{{worker_id}}", self._job_stop, methods=["GET"])
        app.add_api_route(f"{base}/ping/{{worker_id}}", self._ping, methods=["GET"])
        for name in ("job-done", "job-stream"):
            path = f"{base}/{name}/{{worker_id}}/{{job_id}}"
            app.add_api_route(path, getattr(self, f"_{name.replace('-', '_')}"), methods=["POST"])
        return app

    async def _job_take(self, request: Request, worker_id: str) -> Response:
        self._authorize(request)
        self._polling_workers.add(worker_id)
        self._changed()

        def take() -> Response | None:
            if not self._queue:
                return None
            job = self._jobs[self._queue.popleft()]
            job.status, job.worker_id = "IN_PROGRESS", worker_id
            job.taken_at_seconds.append(time.monotonic())
            self._changed()
            # not JSONResponse, which refuses the NaN that a hostile job may hold
            return Response(json.dumps(job.payload), media_type="application/json")

        return await self._long_poll(request, take)

    async def _job_stop(self, request: Request, worker_id: str) -> Response:
        self._authorize(request)

        def take() -> Response | None:
            job_ids = self._stop_signals.pop(worker_id, None)
            return JSONResponse({"jobsToStop": job_ids}) if job_ids else None

        return await self._long_poll(request, take)

    async def _ping(self, request: Request, worker_id: str) -> Response:
        self._authorize(request)
        query = request.query_params
        job_ids = tuple(filter(None, query.get("job_id", "").split(",")))
        failed_check = None
        if query.get("status") == "unhealthy":
            failed_check = f"{query.get('check')}: {query.get('reason')}"
        self._heartbeats.append(Heartbeat(time.monotonic(), worker_id, job_ids, failed_check))
        self._changed()
        return Response()

    async def _job_done(self, request: Request, worker_id: str, job_id: str) -> Response:
        """Takes progress and results alike: the platform has one address for both."""
        self._authorize(request)
        job, body = self._jobs[job_id], await _strict_json(request)
        is_result = body.get("status") != "IN_PROGRESS"
        answer: Response = JSONResponse({})
        lost = is_result and bool(self._result_faults)
        if lost:
            status = self._result_faults.popleft()
            answer = _CutAnswer() if status is None else Response(status_code=status)
        accepted = not lost and job.status == "IN_PROGRESS" and job.worker_id == worker_id
        job.posts.append(Post(time.monotonic(), body, accepted))
        if accepted:
            job.output = body.get("output")
        if accepted and is_result:
            job.error, job.stop_pod = body.get("error"), body.get("stopPod", False)
            self._end(job, "FAILED" if job.error else "COMPLETED")
        self._changed()
        await asyncio.sleep(self.answer_delay_seconds)
        return answer

    async def _job_stream(self, request: Request, job_id: str) -> Response:
        self._authorize(request)
        self._jobs[job_id].stream.append((await _strict_json(request))["output"])
        self._changed()
        return JSONResponse({})

    def _authorize(self, request: Request) -> None:
        if request.headers.get("authorization") != self.api_key:
            raise HTTPException(401)

    # State on the loop

    def _end(self, job: Job, status: Status) -> None:
        job.status, job.ended_at_seconds = status, time.monotonic()

    def _changed(self) -> None:
        """Wakes everything that waits for a change."""
        self._change.set_result(None)
        self._change = self._loop.create_future()

    async def _until(self, condition: Callable[[], bool], timeout_seconds: float) -> bool:
        """Whether `condition` came to hold in time."""
        deadline = time.monotonic() + timeout_seconds
        while not (holds := condition()) and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait({self._change}, timeout=left)
        return holds

    async def _long_poll(self, request: Request, take: Callable[[], Response | None]) -> Response:
        """What `take` gives as soon as it gives something; 204 when the time is over.

        A worker that hangs up takes nothing with it.
        """
        gone = asyncio.create_task(_hang_up(request))
        gone.add_done_callback(lambda _: self._changed())
        answers: list[Response] = []

        def over() -> bool:
            if gone.done() or self._server.should_exit:
                return True
            if answer := take():
                answers.append(answer)
            return bool(answers)

        await self._until(over, self.hold_seconds)
        gone.cancel()
        return answers[0] if answers else Response(status_code=204)

    def _on_loop(self, action: Callable[[], T]) -> T:
        """The action's value; it runs on the loop and wakes everything that waits."""

        async def act() -> T:
            value = action()
            self._changed()
            return value

        return self._run(act())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _CutAnswer(Response):
    """Promises a body and sends none, upon which the server cuts the connection."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _hang_up(request: Request) -> None:
    """Returns when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _strict_json(request: Request) -> dict[str, Any]:
    """The body as JSON. The SDK labels it as a form, and sends NaN as it is, which is refused."""

    def refuse(name: str) -> NoReturn:
        raise HTTPException(400, f"{name} is not JSON")

    body: dict[str, Any] = json.loads(await request.body(), parse_constant=refuse)
    return body
