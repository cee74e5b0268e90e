"""What the client sees while a job runs: one ordered reporter a job.

The SDK's own `progress_update` starts a thread for each value; they overtake one another and the
result, and a late one leaves the job "in progress" for ever. Here one task posts one value at a
time, the newest wins, and it has ended before the handler returns.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

logger = logging.getLogger(__name__)

PostProgress = Callable[[dict[str, Any]], Awaitable[None]]

INTERVAL_SECONDS = 1.0
CLOSE_SECONDS = 5.0  # how long the last value may hold up the result


class Stage(NamedTuple):
    """One stage of a job and where it lies in the whole."""

    name: str
    begins_at: float  # share of the job that is done when it begins
    message: str


# Rough shares, for the bar: denoising is nearly all of a job on any GPU.
STAGES = (
    Stage("download", 0.0, "Fetching the inputs"),
    Stage("preprocess", 0.02, "Encoding portrait, speech and prompt"),
    Stage("denoise", 0.05, "Denoising"),
    Stage("decode", 0.93, "Decoding frames into the video"),
    Stage("upload", 0.98, "Handing over the video"),
)
_INDEX = {stage.name: index for index, stage in enumerate(STAGES)}


class ProgressReporter:
    """Posts the state of one job, in order, from an asynchronous context.

    Args:
        post: sends one payload to the client; None: nobody listens (local modes).
        interval_seconds: shortest time between two posts.
    """

    def __init__(
        self, post: PostProgress | None, *, interval_seconds: float = INTERVAL_SECONDS
    ) -> None:
        self._post = post
        self._interval_seconds = interval_seconds
        self._started = time.monotonic()
        self._progress = 0.0
        self._skipped = 0.0  # of it: what an earlier try of the job had done
        self._skipped_share = 0.0  # the same, of the stage in which that was
        self._newest: dict[str, Any] | None = None
        self._preview: str | None = None
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.stage = STAGES[0].name
        self.was_unanswered = False  # whether a value met nobody, or a proxy that reached nobody

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:  # a cancelled job posts nothing more
            self._newest = None
        self._closing.set()
        self._changed.set()
        try:
            await asyncio.wait({self._task}, timeout=CLOSE_SECONDS)
        finally:  # also when the job is stopped just now
            self._task.cancel()
        await asyncio.wait({self._task})

    def enter(self, stage: str) -> None:
        """Begins a stage. Callable from any thread."""
        self.stage = stage
        self.update(0.0)

    def wait_for_store(self) -> None:
        """Says that the object store is waited for. Callable from any thread."""
        self.update(0.0, message="Waiting for the object store")

    def skip(self, share: float) -> None:
        """Says that this share of the current stage was done by an earlier try of the job."""
        before = self._progress
        self._skipped_share = share
        self.update(share)
        self._skipped = self._progress - before

    def update(
        self,
        share: float,
        *,
        step: int | None = None,
        total_steps: int | None = None,
        message: str | None = None,
        preview: str | None = None,
    ) -> None:
        """Says that `share` (0 to 1) of the current stage is done. Callable from any thread.

        A preview, a `data:` URL, goes with all later values too, until there is a newer one: a
        client asks now and then and gets the newest value alone.
        """
        index = _INDEX[self.stage]
        begins_at = STAGES[index].begins_at
        ends_at = STAGES[index + 1].begins_at if index + 1 < len(STAGES) else 1.0
        self._progress = max(self._progress, begins_at + (ends_at - begins_at) * share)
        elapsed_seconds = time.monotonic() - self._started
        is_begun = self.stage == "denoise" and share > self._skipped_share
        known = is_begun or index > _INDEX["denoise"]
        own = self._progress - self._skipped  # what took the seconds that have passed
        message = message or STAGES[index].message
        payload = {
            "stage": self.stage,
            "stage_index": index + 1,
            "stage_count": len(STAGES),
            "progress": round(self._progress, 4),
            "step": step,
            "total_steps": total_steps,
            "elapsed_seconds": round(elapsed_seconds, 1),
            # before the first step nothing is known about this GPU
            "eta_seconds": (
                round(elapsed_seconds * (1 - self._progress) / own, 1) if known else None
            ),
            "message": f"{message} {step}/{total_steps}" if step is not None else message,
        }
        self._preview = preview or self._preview
        if self._preview is not None:
            payload["preview"] = self._preview
        self._loop.call_soon_threadsafe(self._offer, payload)

    def _offer(self, payload: dict[str, Any]) -> None:
        self._newest = payload
        self._changed.set()

    async def _run(self) -> None:
        while not (self._closing.is_set() and self._newest is None):
            await self._changed.wait()
            self._changed.clear()
            payload, self._newest = self._newest, None
            if payload is None or self._post is None:
                continue
            try:
                await self._post(payload)
            except Exception as error:
                logger.warning("progress was not delivered: %s", type(error).__name__)
                self.was_unanswered |= getattr(error, "status", None) is None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._interval_seconds)
