"""RunPod's control plane as a worker meets it: jobs are taken from it, results are sent to it.

The SDK's own two calls are replaced, because of what version 1.12.0 does where the world is not as
it should be: it sends a result once when a connection is cut or the answer is no success, waits ten
minutes for an answer that never comes, and then takes the next job; and it asks for a job as often
as answers without one come back, thousands of times a second.
"""

import asyncio
import itertools
import json
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from runpod.http_client import ClientSession, TooManyRequests
from runpod.serverless.modules import rp_http, rp_job

from avatar_client.contract import plain_json

logger = logging.getLogger(__name__)

# A result

FIRST_PAUSE_SECONDS = 0.5  # between two tries; each about twice as long as the one before
LONGEST_PAUSE_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 120.0
ANSWER_SECONDS = 30.0  # for the answer to one try ...
BYTES_PER_SECOND = 250_000  # ... beside the time that a slow line takes for the body
REFUSED = (400, 413, 422)  # what the control plane says of a body that it will never take
REFUSALS = 3  # after which it is believed
PAGE = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)  # a proxy's, whatever its status
PROGRESS_SECONDS = 10.0  # for the answer to a progress post, of which the next one is newer

# A take

EARLY_SECONDS = 1.0  # an answer without a job that comes sooner was not waited for

Keep = Callable[[dict[str, Any]], Awaitable[str | None]]


class _NotTakenError(Exception):
    """The control plane did not take a body; says why."""

    def __init__(self, reason: str, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after_seconds = retry_after


async def send_result(
    session: ClientSession,
    payload: dict[str, Any],
    job: dict[str, Any],
    *,
    retry_seconds: float,
    keep: Keep,
) -> bool:
    """Whether the control plane has the result. Comes back only then, or when the time is over.

    Args:
        payload: what the SDK makes of the handler's output.
        retry_seconds: for how long it is sent again; while it is, no further job is taken.
        keep: puts the result where it can be found without the control plane, and says where; None
            if there is no such place. Is asked once, after the first try that failed: the process
            may be killed before the last one.
    """
    body = json.dumps(payload, ensure_ascii=False).encode()
    deadline = time.monotonic() + retry_seconds
    kept: str | None = None
    refusals = 0
    for attempt in itertools.count():
        try:
            await _post(session, job, body, ANSWER_SECONDS + len(body) / BYTES_PER_SECOND)
        except _NotTakenError as error:
            logger.warning("the result was not taken: %s", error)
            refusals += error.status in REFUSED
            if attempt == 0:
                kept = await keep(payload)
            pause = min(FIRST_PAUSE_SECONDS * 2 ** min(attempt, 10), LONGEST_PAUSE_SECONDS)
            pause = max(pause * random.uniform(0.5, 1.0), error.retry_after_seconds)  # noqa: S311
            if refusals == REFUSALS or time.monotonic() + pause > deadline:
                break
            await asyncio.sleep(pause)
        else:
            if attempt:
                logger.info("the result was taken at try %d", attempt + 1)
            return True
    logger.error("the result was given up after %d tries; it is %s", attempt + 1, kept or "lost")
    return False


async def send_progress(
    session: ClientSession, payload: dict[str, Any], job: dict[str, Any]
) -> None:
    """Sends a value of the progress, once.

    Raises:
        Exception: it was not taken.
    """
    body = json.dumps({"status": "IN_PROGRESS", "output": payload}, ensure_ascii=False).encode()
    await _post(session, job, body, PROGRESS_SECONDS)


async def take(session: ClientSession) -> list[dict[str, Any]] | None:
    """The next job, None where the answer holds none. An answer without one takes a second.

    A job is passed on even where it is not as it should be, so that its client is told.

    Raises:
        TooManyRequests: the SDK's loop then waits.
        Exception: the control plane was not reached, or its answer is an error.
    """
    begun = time.monotonic()
    jobs = await _ask_for_jobs(session)
    if not jobs:
        early = EARLY_SECONDS - (time.monotonic() - begun)
        if early > 0:
            await asyncio.sleep(early + random.uniform(0, 0.5))  # noqa: S311
    return jobs


async def _ask_for_jobs(session: ClientSession) -> list[dict[str, Any]] | None:
    in_progress = int(bool(rp_job.job_progress.get_job_list()))
    async with session.get(f"{rp_job.JOB_GET_URL}&job_in_progress={in_progress}") as response:
        if response.status in (204, 400):  # 400 is an answer under FlashBoot, RunPod's default
            return None
        if response.status == 429:
            raise TooManyRequests(response.request_info, response.history, status=429)
        response.raise_for_status()
        try:
            answer = plain_json.read(await response.read())
        except ValueError:  # empty, or a proxy's page
            return None
    jobs = answer if isinstance(answer, list) else [answer]
    return [checked for job in jobs if (checked := _checked(job))] or None


def _checked(job: Any) -> dict[str, Any] | None:
    """The job with an id that is a string; None without one, since nobody could be told."""
    if not isinstance(job, dict) or not isinstance(job.get("id"), str | int) or job["id"] == "":
        logger.error("a job without an id was dropped")
        return None
    return {"input": None, **job, "id": str(job["id"])}


async def _post(
    session: ClientSession, job: dict[str, Any], body: bytes, timeout_seconds: float
) -> None:
    """Sends a body to the job's own address.

    Raises:
        _NotTakenError: whatever happened.
    """
    url = rp_http.JOB_DONE_URL.replace("$ID", job["id"]) + "&isStream=false"
    headers = {
        "charset": "utf-8",
        "Content-Type": "application/x-www-form-urlencoded",
        "X-Request-ID": job["id"],
    }
    timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=ANSWER_SECONDS)
    try:
        # a redirect would be followed by a GET, whose answer says nothing of the body
        async with session.post(
            url, data=body, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            answer = await response.read()
            if PAGE.match(answer):
                raise _NotTakenError(f"HTTP {response.status} with a page")
            if not 200 <= response.status < 300:
                after = response.headers.get("Retry-After", "")
                seconds = float(after) if after.isascii() and after.isdigit() else 0.0
                raise _NotTakenError(
                    f"HTTP {response.status}",
                    response.status,
                    min(seconds, MAX_RETRY_AFTER_SECONDS),
                )
    except TimeoutError:
        raise _NotTakenError(f"no answer in {timeout_seconds:.0f} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise _NotTakenError(type(error).__name__) from error
