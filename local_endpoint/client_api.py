"""The endpoint as a client meets it: RunPod's routes, limits and answers.

Source: RunPod's documentation of serverless endpoint operations.
"""

import asyncio
import hmac
import json
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal, NoReturn

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, TypeAdapter, field_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from local_endpoint.changes import Changes
from local_endpoint.job_queue import Job, JobQueue, Status

MAX_REQUEST_BYTES = {"run": 10 * 10**6, "runsync": 20 * 10**6}
MAX_DRAINED_BYTES = 64 * 2**20  # of a request that is too large: read on, so the answer is heard
MAX_STREAM_BYTES = 10**6
MAX_WAITING_JOBS = 1000
SYNC_WAIT_MILLISECONDS = 90_000
STREAM_WAIT_SECONDS = 1.0  # RunPod's JavaScript library asks again at once
WaitMilliseconds = Annotated[int, Query(ge=1000, le=300_000)]
BEARER = HTTPBearer(auto_error=False, description="The endpoint's API key.")


class Policy(BaseModel):
    """Limits of one job, in milliseconds."""

    model_config = ConfigDict(extra="allow", strict=True, hide_input_in_errors=True)

    executionTimeout: int = Field(600_000, ge=5_000, le=604_800_000)  # noqa: N815  # RunPod's name
    ttl: int = Field(86_400_000, ge=10_000, le=604_800_000)


class JobSubmission(BaseModel):
    """A new job. Keys beside these reach the worker as they are."""

    model_config = ConfigDict(extra="allow", strict=True, hide_input_in_errors=True)

    input: dict[str, Any]
    webhook: str | None = Field(None, max_length=4096, json_schema_extra={"format": "uri"})
    policy: Policy | None = None

    @field_validator("webhook")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None:
            if not value.isascii() or not value.isprintable():
                raise ValueError("must be an http or https URL")
            try:
                TypeAdapter(HttpUrl).validate_python(value)
            except ValueError:  # whose text holds the address, and with it a token
                raise ValueError("must be an http or https URL") from None
        return value


class Accepted(BaseModel):
    """A job's id and where it stands."""

    id: str
    status: Literal[Status]


class JobState(Accepted):
    """What is known of a job; times in milliseconds."""

    delayTime: int | None = None  # noqa: N815
    executionTime: int | None = None  # noqa: N815
    workerId: str | None = None  # noqa: N815
    output: Any = Field(None, description="The newest progress, then the result.")
    error: str | None = None


class StreamItem(BaseModel):
    """One thing that a generating handler has yielded."""

    output: Any


class StreamState(BaseModel):
    """What has come since the last call."""

    status: Literal[Status]
    stream: list[StreamItem]


class JobCounts(BaseModel):
    """Jobs by where they stand; ended ones since the queue was made."""

    completed: int
    failed: int
    inProgress: int  # noqa: N815
    inQueue: int  # noqa: N815
    retried: int


class WorkerCounts(BaseModel):
    """Workers by what they do."""

    idle: int
    initializing: int
    ready: int
    running: int
    throttled: int
    unhealthy: int


class Health(BaseModel):
    """The endpoint at a glance."""

    jobs: JobCounts
    workers: WorkerCounts


class Purged(BaseModel):
    """How many waiting jobs were removed."""

    removed: int
    status: Literal["completed"] = "completed"


class Failure(BaseModel):
    """Why a request was not served."""

    error: str


class JsonResponse(JSONResponse):
    """JSON in ASCII, so that a lone surrogate in a worker's answer cannot break it."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


class _BoundedRequest(Request):
    """A request whose body is bounded, and strict JSON."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            operation = self.url.path.rsplit("/", 1)[-1]
            self._body = await read_bounded(self, MAX_REQUEST_BYTES[operation])
        return self._body

    async def json(self) -> Any:
        return parse_strict(await self.body())


class _BoundedRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return handle_bounded


async def read_bounded(request: Request, max_bytes: int) -> bytes:
    """The body.

    Raises:
        HTTPException: 413, it is larger.
    """
    body = bytearray()
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= max_bytes:
            body += chunk
        elif size > MAX_DRAINED_BYTES:
            break
    if size > max_bytes:
        message = f"the body is over the limit of {max_bytes} bytes"
        raise HTTPException(413, message, {"Connection": "close"})  # it may go on without end
    return bytes(body)


def parse_strict(text: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is none; NaN, a whole number of thousands of digits and thousands
            of brackets in one another are refused too.
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(str(error), "", 0) from None


class ClientApi:
    """The routes below `/v2/{endpoint_id}` that clients call, each behind the key."""

    def __init__(
        self,
        queue: JobQueue,
        changes: Changes,
        *,
        endpoint_id: str,
        api_key: str,
        count_workers: Callable[[], dict[str, int]],
        is_closing: Callable[[], bool],
    ) -> None:
        self._queue = queue
        self._changes = changes
        self._api_key = api_key.encode()
        self._count_workers = count_workers
        self._is_closing = is_closing
        self.routes = APIRouter(
            prefix=f"/v2/{endpoint_id}",
            dependencies=[Depends(self._authorize)],
            default_response_class=JsonResponse,
            responses=_failure(401, "The API key is missing or wrong."),
        )
        self._add_routes()

    def _add_routes(self) -> None:
        new_job = (
            _failure(400, "The body is not a job.")
            | _failure(413, "The body is too large.")
            | _failure(429, "Too many jobs wait.")
        )
        known_job = _failure(404, "No such job, or no longer.")
        sync_job = known_job | _failure(400, "The time to wait is out of range.")
        failed_job = known_job | _failure(400, "The job has not failed.")

        submissions = APIRouter(route_class=_BoundedRoute)
        submit, post, get = submissions.post, self.routes.post, self.routes.get
        submit("/run", responses=new_job, response_model=Accepted)(self.run)
        submit("/runsync", responses=new_job, response_model=JobState)(self.runsync)
        get("/status/{job_id}", responses=known_job, response_model=JobState)(self.status)
        get("/status-sync/{job_id}", responses=sync_job, response_model=JobState)(self.status_sync)
        get("/stream/{job_id}", responses=known_job, response_model=StreamState)(self.stream)
        get("/health", response_model=Health)(self.health)
        post("/cancel/{job_id}", responses=known_job, response_model=Accepted)(self.cancel)
        post("/retry/{job_id}", responses=failed_job, response_model=Accepted)(self.retry)
        post("/purge-queue", response_model=Purged)(self.purge_queue)
        self.routes.include_router(submissions)

    async def run(self, job: JobSubmission) -> Response:
        """Puts a job into the queue."""
        return JsonResponse({"id": self._add(job, is_sync=False), "status": "IN_QUEUE"})

    async def runsync(
        self, request: Request, job: JobSubmission, wait: WaitMilliseconds = SYNC_WAIT_MILLISECONDS
    ) -> Response:
        """Puts a job into the queue and waits up to `wait` milliseconds for its result."""
        job_id = self._add(job, is_sync=True)
        await self._until(job_id, request, lambda job: job.is_over, wait / 1000)
        return JsonResponse(self._find(job_id).state())

    async def status(self, job_id: str) -> Response:
        """Where a job stands, with its newest progress or its result."""
        return JsonResponse(self._find(job_id).state())

    async def status_sync(
        self, request: Request, job_id: str, wait: WaitMilliseconds = SYNC_WAIT_MILLISECONDS
    ) -> Response:
        """The same, once the job is over or `wait` milliseconds have passed."""
        self._find(job_id)
        await self._until(job_id, request, lambda job: job.is_over, wait / 1000)
        return JsonResponse(self._find(job_id).state())

    async def stream(self, request: Request, job_id: str) -> Response:
        """What the job's handler has yielded since the last call; waits a moment for it."""
        self._find(job_id)

        def has_news(job: Job) -> bool:
            return job.is_over or self._queue.has_unread(job_id)

        await self._until(job_id, request, has_news, STREAM_WAIT_SECONDS)
        job = self._find(job_id)
        items = self._queue.read_stream(job_id, MAX_STREAM_BYTES)
        stream = [{"output": item} for item in items]
        # clients read until the job is over, and must not stop before the last item
        status = "IN_PROGRESS" if job.is_over and self._queue.has_unread(job_id) else job.status
        return JsonResponse({"status": status, "stream": stream})

    async def cancel(self, job_id: str) -> Response:
        """Ends a job that waits or runs; one that is over stays as it is."""
        self._find(job_id)
        self._queue.cancel(job_id)
        self._changes.notify()
        return JsonResponse({"id": job_id, "status": self._find(job_id).status})

    async def retry(self, job_id: str) -> Response:
        """Runs a failed or timed out job again, under its id."""
        self._find(job_id)
        if not self._queue.retry(job_id):
            raise HTTPException(400, "only a failed or timed out job can be retried")
        self._changes.notify()
        return JsonResponse({"id": job_id, "status": "IN_QUEUE"})

    async def health(self) -> Response:
        """How many jobs and workers there are, by where they stand."""
        return JsonResponse({"jobs": self._queue.counts(), "workers": self._count_workers()})

    async def purge_queue(self) -> Response:
        """Removes every waiting job; running ones go on."""
        removed = self._queue.purge()
        self._changes.notify()
        return JsonResponse({"removed": removed, "status": "completed"})

    async def _until(
        self, job_id: str, request: Request, holds: Callable[[Job], bool], timeout_seconds: float
    ) -> None:
        """Returns when `holds` of the job, when it is gone, or when nobody waits any more."""
        gone = asyncio.create_task(hang_up(request))
        gone.add_done_callback(lambda _: self._changes.notify())

        def is_waited_for() -> bool:
            job = self._queue.get(job_id)
            return job is None or holds(job) or gone.done() or self._is_closing()

        await self._changes.until(is_waited_for, timeout_seconds)
        gone.cancel()

    def _authorize(
        self,
        request: Request,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)],
    ) -> None:
        given = credentials.credentials if credentials else request.headers.get("authorization", "")
        if not self._api_key or not hmac.compare_digest(given.encode(), self._api_key):
            raise HTTPException(401, "the API key is missing or wrong")

    def _find(self, job_id: str) -> Job:
        job = self._queue.get(job_id)
        if job is None:
            raise HTTPException(404, "no such job, or its result is no longer kept")
        return job

    def _add(self, job: JobSubmission, *, is_sync: bool) -> str:
        if self._queue.counts()["inQueue"] >= MAX_WAITING_JOBS:
            raise HTTPException(429, f"{MAX_WAITING_JOBS} jobs wait", {"Retry-After": "10"})
        job_id = self._queue.add(job.model_dump(exclude_unset=True), is_sync=is_sync)
        self._changes.notify()
        return job_id


def _failure(status: int, description: str) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Failure, "description": description}}


def answer_failures_alike(app: FastAPI) -> None:
    """Every failure of the application answers `{"error": text}`, and a bad body 400."""

    async def failed(request: Request, error: Any) -> Response:
        content = {"error": str(error.detail)}
        return JsonResponse(content, status_code=error.status_code, headers=error.headers)

    async def invalid(request: Request, error: Any) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        text = first["msg"].removeprefix("Value error, ")
        # a key is the client's own text: kept short and printable
        field = f"{ascii(place)[1:-1][:80]}: " if place else ""
        return JsonResponse({"error": f"{field}{text}"}, status_code=400)

    async def gone(request: Request, error: Any) -> Response:
        return Response(status_code=499)  # nobody reads it

    app.add_exception_handler(StarletteHTTPException, failed)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ClientDisconnect, gone)


async def hang_up(request: Request) -> None:
    """Returns when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
