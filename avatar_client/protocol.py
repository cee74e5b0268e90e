"""The calls of an endpoint: what is sent, what its answer means, how long to wait for the next.

Nothing here waits or touches the network; `avatar_client.endpoint` does both, once with threads'
patience and once with asyncio's.
"""

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import SecretStr

from avatar_client import request_body
from avatar_client.contract import plain_json, signature
from avatar_client.endpoint_errors import (
    AuthenticationError,
    EndpointError,
    EndpointUnavailableError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    JobTimedOutError,
    RequestRefusedError,
    SignatureError,
    WaitTimeoutError,
)
from avatar_client.responses import JobStatus, plain

PLATFORM_URL = "https://api.runpod.ai/v2"
ATTEMPTS = 5  # of one call
MAX_RETRY_AFTER_SECONDS = 60.0
SLOWEST_POLL = 5  # times the shortest pause
MAX_ANSWER_BYTES = 32 * 2**20  # of which the platform's own limit is 20 MB
MAX_ANSWER_SECONDS = 300.0  # for all of one; those below are for the next part of it
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)

Outcome = httpx.Response | httpx.RequestError


@dataclass(frozen=True, slots=True)
class Call:
    """One request to the endpoint."""

    method: str
    path: str
    content: bytes | None = None
    job_id: str | None = None
    is_repeatable: bool = True  # False: sent twice it would do twice what it does
    answer_seconds: float = 20.0

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of httpx, beside method and path."""
        headers = {"Content-Type": "application/json"} if self.content is not None else {}
        timeout = httpx.Timeout(self.answer_seconds, connect=10.0, write=60.0)
        return {"content": self.content, "headers": headers, "timeout": timeout}


class Answer:
    """An answer as it arrives: no more of it than any endpoint has to say, however it is packed."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._content = bytearray()
        self._deadline = time.monotonic() + MAX_ANSWER_SECONDS

    def add(self, chunk: bytes) -> None:
        """Takes the next part of the body.

        Raises:
            EndpointUnavailableError: there is too much of it, or it takes too long.
        """
        self._content += chunk
        if len(self._content) > MAX_ANSWER_BYTES or time.monotonic() > self._deadline:
            raise EndpointUnavailableError(
                f"the endpoint's answer is over {MAX_ANSWER_BYTES >> 20} MiB or "
                f"{MAX_ANSWER_SECONDS:g} s: check its URL"
            )

    def whole(self) -> httpx.Response:
        """The answer with all of its body."""
        headers = [
            (name, value)
            for name, value in self._response.headers.multi_items()
            if name not in ("content-encoding", "content-length", "transfer-encoding")
        ]
        return httpx.Response(
            self._response.status_code, headers=headers, content=bytes(self._content)
        )


@dataclass(frozen=True, slots=True)
class Pause:
    """The call is to be sent again, after this."""

    seconds: float


def submit(body: dict[str, Any]) -> Call:
    """Puts a job into the queue. One with a `request_id` may be there twice: it is made once."""
    # an answer that comes too late leaves a job that nobody knows: it gets its time
    content = request_body.encode(body)
    is_repeatable = body.get("input", {}).get("request_id") is not None
    return Call("POST", "run", content, is_repeatable=is_repeatable, answer_seconds=120.0)


def status(job_id: str) -> Call:
    """Asks for a job."""
    return Call("GET", f"status/{job_id}", job_id=job_id)


def cancel(job_id: str) -> Call:
    """Ends a job."""
    return Call("POST", f"cancel/{job_id}", job_id=job_id)


def health() -> Call:
    """Asks for the numbers of jobs and workers."""
    return Call("GET", "health")


def base_url(endpoint: str) -> str:
    """The address of an endpoint that is named by it, or by its id on RunPod.

    Raises:
        ValueError: neither.
    """
    if re.fullmatch(r"[A-Za-z0-9_-]+", endpoint):
        return f"{PLATFORM_URL}/{endpoint}"
    try:
        url = httpx.URL(endpoint)
        host = url.host
    except (httpx.InvalidURL, UnicodeError):  # UnicodeError: of a name that no host can have
        url, host = httpx.URL(), ""
    if url.scheme not in ("https", "http") or not host or url.userinfo or url.query:
        raise ValueError("an endpoint is an id of RunPod, or a URL such as https://.../v2/ID")
    address = str(url.copy_with(fragment=None)).rstrip("/")
    return address.removesuffix("/run").removesuffix("/runsync")  # as the console shows it


def checked_key(api_key: str) -> str:
    """The key if a header can carry it.

    Raises:
        ValueError: it cannot.
    """
    # checked here, since the error of the HTTP library would show it
    if not re.fullmatch(r"[!-~]+", api_key):
        raise ValueError("the API key is empty or holds a character that no key has")
    return api_key


def checked_signing_key(key: str | SecretStr | None) -> SecretStr | None:
    """The key, if one is given.

    Raises:
        ValueError: no worker starts with such a key.
    """
    text = key.get_secret_value() if isinstance(key, SecretStr) else key
    if text is None:
        return None
    signature.require_key(text)
    return SecretStr(text)


def read(
    call: Call, outcome: Outcome, attempt: int, pause_seconds: float
) -> dict[str, Any] | Pause:
    """The endpoint's answer, or the pause before the call is sent once more.

    Args:
        attempt: how often it was sent, from 1.
        pause_seconds: the first pause; each further one is twice as long.

    Raises:
        EndpointError: the call has failed for good.
    """
    if isinstance(outcome, httpx.RequestError):
        failure: EndpointError = EndpointUnavailableError(
            f"the endpoint could not be reached or broke off ({type(outcome).__name__})"
        )
        was_refused = isinstance(outcome, NOT_SENT)
    elif outcome.is_success:
        return _json(outcome)
    else:
        failure = _failure(call, outcome)
        was_refused = outcome.status_code == 429
        if not was_refused and not outcome.is_server_error:
            raise failure
    if not call.is_repeatable and not was_refused:
        raise EndpointUnavailableError(
            f"{failure}; it is not known whether the job was queued, so it was not sent again; one "
            "with a request_id would be"
        )
    if attempt == ATTEMPTS:
        raise failure
    return Pause(max(pause_seconds * 2 ** (attempt - 1), _retry_after(outcome)))


def read_status(answer: dict[str, Any], signing_key: SecretStr | None = None) -> JobStatus:
    """The status of a job in an answer.

    Raises:
        SignatureError: a result that no worker with this key has signed for this job.
        EndpointUnavailableError: there is none.
    """
    try:
        return JobStatus.parse(answer, signing_key=signing_key)
    except SignatureError:
        raise
    except ValueError:
        raise EndpointUnavailableError("the endpoint's answer is not about a job") from None


def completed(job: JobStatus) -> JobStatus:
    """The status of a job that is over, if it has a result.

    Raises:
        JobFailedError, JobCancelledError, JobTimedOutError: it has none.
    """
    if job.error is not None:
        raise JobFailedError(job.id, job.error)
    if job.status == "CANCELLED":
        raise JobCancelledError(f"job {job.id} was cancelled")
    if job.status == "TIMED_OUT":
        raise JobTimedOutError(
            f"the platform ended job {job.id} at its limit; raise execution_timeout_seconds"
        )
    return job


class Pace:
    """The pauses between two questions about one job: they grow, and they end in time."""

    def __init__(self, shortest_seconds: float, timeout_seconds: float | None) -> None:
        self._seconds = shortest_seconds
        self._longest_seconds = SLOWEST_POLL * shortest_seconds
        self._timeout_seconds = math.inf if timeout_seconds is None else timeout_seconds
        self._deadline = time.monotonic() + self._timeout_seconds

    def pause_after(self, job: JobStatus) -> float:
        """Seconds until the next question.

        Raises:
            WaitTimeoutError: there is no time for one.
        """
        seconds_left = self._deadline - time.monotonic()
        if seconds_left <= 0:
            raise WaitTimeoutError(
                f"job {job.id} is {job.status} after {self._timeout_seconds:g} s; it goes on"
            )
        seconds = min(self._seconds, seconds_left)
        self._seconds = min(self._seconds * 1.5, self._longest_seconds)
        return seconds


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = plain_json.read(response.content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise EndpointUnavailableError("the endpoint's answer is no JSON object: check its URL")
    return answer


def _failure(call: Call, response: httpx.Response) -> EndpointError:
    code = response.status_code
    if code in (401, 403):
        return AuthenticationError(f"the endpoint does not take the API key (HTTP {code})")
    if code == 404 and call.job_id is not None:
        return JobNotFoundError(
            f"the endpoint knows no job {call.job_id}: a result is kept for 30 minutes only"
        )
    if code == 404:
        return RequestRefusedError("there is no such endpoint (HTTP 404): check its id or URL")
    if response.has_redirect_location:
        return EndpointUnavailableError(f"the endpoint redirects (HTTP {code}): check its URL")
    text = f"the endpoint answered HTTP {code}{_said(response)}"
    if response.is_server_error:
        return EndpointUnavailableError(text)
    return RequestRefusedError(text)


def _said(response: httpx.Response) -> str:
    """What an endpoint says about its refusal, with a colon in front; often nothing."""
    try:
        body = plain_json.read(response.content)
    except ValueError:
        return ""
    text = body.get("error") or body.get("detail") if isinstance(body, dict) else None
    return f": {plain(text)}" if isinstance(text, str) else ""


def _retry_after(outcome: Outcome) -> float:
    """Seconds that the endpoint asks to wait; 0 if it does not, or names a date."""
    if isinstance(outcome, httpx.RequestError):
        return 0.0
    text = outcome.headers.get("Retry-After", "")
    return min(float(text), MAX_RETRY_AFTER_SECONDS) if re.fullmatch(r"[0-9]{1,9}", text) else 0.0
