"""The endpoint as a worker meets it: what the SDK's loop asks and posts.

Source: the requests of runpod-python 1.12.0, runpod/serverless/modules/{rp_job,rp_http,rp_ping}.py.
"""

import asyncio
import hmac
import json
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from local_endpoint.changes import Changes
from local_endpoint.client_api import (
    MAX_REQUEST_BYTES,
    JsonResponse,
    hang_up,
    parse_strict,
    read_bounded,
)
from local_endpoint.job_queue import JobQueue

logger = logging.getLogger(__name__)

MAX_RESULT_BYTES = MAX_REQUEST_BYTES  # the documented limits are the same both ways
KEPT_HEARTBEATS = 4096


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One ping of a worker, with the jobs that it says it works on."""

    at_seconds: float  # Unix time
    worker_id: str
    job_ids: tuple[str, ...]
    failed_check: str | None  # why a worker that is about to exit finds itself unfit


@dataclass(slots=True)
class WorkerRecord:
    """What is known of one worker."""

    last_heartbeat_seconds: float
    has_polled: bool = False
    failed_check: str | None = None


@dataclass
class Faults:
    """What a test lets go wrong."""

    answer_delay_seconds: float = 0.0  # how long an answer to a posted body takes
    results: deque[int | None] = field(default_factory=deque)  # how the next results are answered


class WorkerApi:
    """The worker protocol's side of one endpoint, and what it has heard of the workers."""

    def __init__(
        self,
        queue: JobQueue,
        changes: Changes,
        *,
        endpoint_id: str,
        worker_key: str,
        hold_seconds: float,
        is_closing: Callable[[], bool],
    ) -> None:
        self.workers: dict[str, WorkerRecord] = {}
        self.heartbeats: deque[Heartbeat] = deque(maxlen=KEPT_HEARTBEATS)
        self.faults = Faults()
        self._queue = queue
        self._changes = changes
        self._worker_key = worker_key.encode()
        self._hold_seconds = hold_seconds
        self._is_closing = is_closing
        self.routes = APIRouter(prefix=f"/v2/{endpoint_id}", include_in_schema=False)
        for name in ("job-take", "job-stop", "ping"):
            handler = getattr(self, f"_{name.replace('-', '_')}")
            self.routes.add_api_route(f"/{name}/{{worker_id}}", handler, methods=["GET"])
        for name in ("job-done", "job-stream"):
            handler = getattr(self, f"_{name.replace('-', '_')}")
            path = f"/{name}/{{worker_id}}/{{job_id}}"
            self.routes.add_api_route(path, handler, methods=["POST"])

    def counts(self) -> dict[str, int]:
        """Workers by what they do, under the platform's names."""
        running = self._queue.holders() & self.workers.keys()
        unfit = {name for name, worker in self.workers.items() if worker.failed_check}
        polled = {name for name, worker in self.workers.items() if worker.has_polled} - unfit
        starting = self.workers.keys() - polled - unfit - running
        return {
            "idle": len(polled - running),
            "initializing": len(starting),
            "ready": len(polled - running),
            "running": len(running),
            "throttled": 0,
            "unhealthy": len(unfit),
        }

    async def _job_take(self, request: Request, worker_id: str) -> Response:
        self._authorize(request)
        self._record_contact(worker_id).has_polled = True
        if request.query_params.get("job_in_progress") == "0":
            for job_id in self._queue.held_by(worker_id):  # it does not know of it any more
                self._queue.requeue(job_id, stop=False)
        self._changes.notify()

        def poll() -> Response | None:
            job = self._queue.claim(worker_id)
            if job is None:
                return None
            self._changes.notify()
            # not JsonResponse: a test may hand out NaN, as a hostile client's job would hold it
            return Response(json.dumps(job), media_type="application/json")

        return await self._long_poll(request, worker_id, poll)

    async def _job_stop(self, request: Request, worker_id: str) -> Response:
        self._authorize(request)

        def poll() -> Response | None:
            job_ids = self._queue.pop_stops(worker_id)
            return JsonResponse({"jobsToStop": job_ids}) if job_ids else None

        return await self._long_poll(request, worker_id, poll)

    async def _ping(self, request: Request, worker_id: str) -> Response:
        self._authorize(request)
        query = request.query_params
        job_ids = tuple(filter(None, query.get("job_id", "").split(",")))
        failed_check = None
        if query.get("status") == "unhealthy":
            failed_check = f"{query.get('check')}: {query.get('reason')}"
            logger.warning("%s is unfit: %s", worker_id, failed_check)
        self._record_contact(worker_id).failed_check = failed_check
        self.heartbeats.append(Heartbeat(time.time(), worker_id, job_ids, failed_check))
        self._queue.record_heartbeat(worker_id, job_ids)
        self._changes.notify()
        return Response()

    async def _job_done(self, request: Request, worker_id: str, job_id: str) -> Response:
        """Takes progress and results alike: the platform has one address for both."""
        self._require_job(request, job_id)
        self._record_contact(worker_id)
        body = await self._posted(request, worker_id, job_id)
        lost = body.get("status") != "IN_PROGRESS" and bool(self.faults.results)
        answer: Response = JsonResponse({})
        if lost:
            status = self.faults.results.popleft()
            answer = _CutAnswer() if status is None else Response(status_code=status)
        if self._queue.get(job_id) is not None:  # it may have been deleted while the body came
            self._queue.post(job_id, worker_id, body, lost=lost)
        self._changes.notify()
        await asyncio.sleep(self.faults.answer_delay_seconds)
        return answer

    async def _job_stream(self, request: Request, worker_id: str, job_id: str) -> Response:
        self._require_job(request, job_id)
        body = await self._posted(request, worker_id, job_id)
        self._queue.add_stream_item(job_id, worker_id, body.get("output"))
        self._changes.notify()
        return JsonResponse({})

    async def _posted(self, request: Request, worker_id: str, job_id: str) -> dict[str, Any]:
        """The body, which the SDK labels as a form; a result that cannot be kept fails its job."""
        limit = MAX_RESULT_BYTES["runsync" if job_id.startswith("sync-") else "run"]
        try:
            body = parse_strict(await read_bounded(request, limit))
            if not isinstance(body, dict):
                raise ValueError("not an object")
        except HTTPException:
            reason = f"the worker's result is over the limit of {limit} bytes"
        except ValueError as error:
            reason = f"the worker's result is not JSON: {error}"
        else:
            return body
        self._queue.refuse(job_id, worker_id, reason)
        self._changes.notify()
        raise HTTPException(400, reason)

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, self._worker_key):
            raise HTTPException(401, "the worker's key is missing or wrong")

    def _require_job(self, request: Request, job_id: str) -> None:
        self._authorize(request)
        if self._queue.get(job_id) is None:
            raise HTTPException(404, "no such job")

    def _record_contact(self, worker_id: str) -> WorkerRecord:
        """The worker's record; each of its calls shows that it lives, as a heartbeat does."""
        record = self.workers.setdefault(worker_id, WorkerRecord(time.time()))
        record.last_heartbeat_seconds = time.time()
        return record

    async def _long_poll(
        self, request: Request, worker_id: str, poll: Callable[[], Response | None]
    ) -> Response:
        """What `poll` gives as soon as it gives something; 204 when the time is over.

        A worker that hangs up takes nothing with it.
        """
        gone = asyncio.create_task(hang_up(request))
        gone.add_done_callback(lambda _: self._changes.notify())
        answers: list[Response] = []

        def over() -> bool:
            if gone.done() or self._is_closing():
                return True
            if answer := poll():
                answers.append(answer)
            return bool(answers)

        await self._changes.until(over, self._hold_seconds)
        gone.cancel()
        return answers[0] if answers else Response(status_code=204)


class _CutAnswer(Response):
    """Promises a body and sends none, upon which the server cuts the connection."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
