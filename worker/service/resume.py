"""A job that was broken off goes on where it was: its state is kept while it runs, and found again.

A thread of its own writes the newest state now and then; the GPU is not waited for. A state is a
file of safetensors that ends with an HMAC-SHA256 of what stands before, by a key of the operator's.
Its name is an HMAC too, of all that decides the video. So nobody else can find, guess or forge one.
What cannot be believed, or belongs to something else, is refused: the job is then begun anew, and
says so. docs/decisions/resume.md has the reasons.
"""

import contextvars
import hashlib
import hmac
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from worker.generation.voices import Voice
from worker.media import state_store
from worker.media.state_store import StateStore
from worker.service import machine
from worker.service.job_request import JobRequest
from worker.settings import Settings

if TYPE_CHECKING:  # imports torch
    from worker.generation.denoising_state import DenoisingState, ModelIdentity

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_AGE_SECONDS = 24 * 3600.0  # RunPod's own life of a job: later it does not come again
MAX_BYTES = 4 * 2**30  # ten minutes at 704 x 1216 are 3.3 GB
RESTORE_SECONDS = 120.0  # then the job begins anew
CLOSE_SECONDS = 5.0  # of a finished job, for its state to be removed
POLL_SECONDS = 0.2  # between two looks whether a state is due
TAG_BYTES = 32
# Of a request: what decides no frame, or is told by what it leads to.
NO_PART_OF_THE_VIDEO = {
    "image",
    "audio",
    "speakers",
    "s3_config",
    "user_data",
    "dry_run",
    "seed",
    "request_id",
    "preview",
}


class RefusedStateError(Exception):
    """A state that must not be used; says why, to follow on "the state of an earlier try"."""


class Facts(BaseModel):
    """What a state says of itself. None of it is a secret."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    step: int  # finished ones
    num_steps: int
    seed: int
    seconds: float  # that these steps took, with all earlier tries
    written_at: float  # Unix seconds
    weights: str
    code: str
    arithmetic: str
    gpu: str


@dataclass(slots=True)
class Resumption:
    """What all jobs of a worker share: where states lie, by which key, and how often."""

    store: StateStore
    key: bytes
    interval_seconds: float
    is_ending: bool = False  # the platform has asked the worker to end: each state may be the last

    @classmethod
    def from_settings(cls, settings: Settings) -> "Resumption | None":
        """None where states cannot be kept; the log says why."""
        reason = None
        store = state_store.find(settings.resume_dir, settings.bucket)
        key = _key(settings)
        if settings.resume_interval_seconds == 0:
            reason = "RESUME_INTERVAL_SECONDS is 0"
        elif store is None:
            reason = "there is neither a network volume nor a bucket that only the operator reads"
        elif key is None:
            reason = "there is no key to prove states by: set RESUME_SECRET"
        if store is None or key is None or reason is not None:
            logger.info("a job that is broken off begins anew: %s", reason)
            return None
        logger.info("states of running jobs are kept in %s", store)
        return cls(store, key, settings.resume_interval_seconds)

    def sweep(self) -> None:
        """Removes states that are too old to be used, beside the caller."""

        def run() -> None:
            try:
                num_removed = self.store.sweep(MAX_AGE_SECONDS)
            except Exception as error:  # the next start tries again
                logger.warning("old states were not removed: %s", type(error).__name__)
            else:
                logger.info("%d old states were removed", num_removed)

        threading.Thread(target=run, name="sweep", daemon=True).start()

    def name(self, request: JobRequest, portrait: Image.Image, voices: Sequence[Voice]) -> str:
        """Of a job's state: equal for two jobs that must become the same video.

        With a seed that is the same request, whatever its id. Without one each job is a video of
        its own, unless the client says by a `request_id` that two are the same.
        """
        params = request.input
        told = params.model_dump(mode="json", exclude=NO_PART_OF_THE_VIDEO)
        whose: dict[str, Any] = {"seed": params.seed}
        if params.seed is None:
            whose = {"request": params.request_id} if params.request_id else {"job": request.job_id}
        content = [
            hashlib.sha256(portrait.tobytes()).hexdigest(),
            *portrait.size,
            *(
                (hashlib.sha256(each.waveform.tobytes()).hexdigest(), each.face_box)
                for each in voices
            ),
        ]
        text = json.dumps([told, whose, content], sort_keys=True)
        return hmac.digest(self.key, f"name {text}".encode(), "sha256").hex()


class Abandonably(Protocol):
    """The result of a call that may hang, which is left behind after so many seconds.

    Raises:
        TimeoutError: it was.
    """

    def __call__(self, call: Callable[[], T], limit_seconds: float) -> T: ...


class JobState:
    """The state of one job: what an earlier try has left, and what this one leaves.

    A context, around all that the job computes: while it is open, states are kept; at its end
    they are removed, unless the job may come again.

    Args:
        resumption: None: nothing is restored, and nothing kept.
        num_steps: of the job.
    """

    def __init__(self, resumption: Resumption | None, num_steps: int) -> None:
        self.restored: DenoisingState | None = None
        self.warnings: tuple[str, ...] = ()
        self.seed: int | None = None  # of the video: the state's, or the one that was drawn
        self._resumption = resumption
        self._num_steps = num_steps
        self._name = ""
        self._identity: ModelIdentity | None = None
        self._facts: Facts | None = None  # of what was restored
        self._may_exist = False
        self._started = 0.0
        self._newest: tuple[DenoisingState, float] | None = None  # and the seconds that it took
        self._kept_step = 0
        self._closing = threading.Event()
        self._is_removed = False
        self._thread: threading.Thread | None = None

    @property
    def first_step(self) -> int:
        """Steps that need not be done again."""
        return self.restored.step if self.restored is not None else 0

    @property
    def metrics(self) -> dict[str, Any]:
        """For the reply; nothing if the job was begun here."""
        if self._facts is None:
            return {}
        return {
            "resumed_from_step": self._facts.step,
            "seconds_saved": round(self._facts.seconds, 3),
        }

    def restore(
        self,
        name: str,
        identity: "ModelIdentity",
        abandonably: Abandonably,
        check: Callable[[], None],
    ) -> None:
        """Finds what an earlier try has left. No failure of it is the job's.

        Args:
            name: as `Resumption.name` gives it.
            identity: of the model that goes on.
            check: may raise to end the job.
        """
        self._name, self._identity = name, identity
        try:
            found = abandonably(lambda: self._find(identity, check), RESTORE_SECONDS)
        except RefusedStateError as error:
            self._may_exist = True
            self._begin_anew(f"the state of an earlier try {error}")
        except Exception as error:
            check()  # the job's own end is none of the store's failures
            logger.info("the state was not read", exc_info=error)
            self._may_exist = True
            self._begin_anew("it could not be found out whether an earlier try has left a state")
        else:
            if found is not None:
                self._go_on(*found)

    def _begin_anew(self, reason: str) -> None:
        logger.warning("begun anew: %s", reason)
        self.warnings = (f"the job was begun anew: {reason}",)

    def _go_on(self, facts: Facts, state: "DenoisingState") -> None:
        self.restored, self._facts, self.seed = state, facts, facts.seed
        self._kept_step, self._may_exist = facts.step, True
        logger.info("goes on after step %d of %d (%s)", facts.step, facts.num_steps, facts.gpu)

    def _find(
        self, identity: "ModelIdentity", check: Callable[[], None]
    ) -> "tuple[Facts, DenoisingState] | None":
        """What an earlier try has left, if anything.

        Raises:
            RefusedStateError: it must not be used.
        """
        from worker.generation.denoising_state import DenoisingState  # imports torch

        assert self._resumption is not None
        content = self._resumption.store.get(self._name, MAX_BYTES, check)
        if content is None:
            return None
        body = unsealed(content, self._resumption.key)
        facts = facts_of(body)
        age_seconds = time.time() - facts.written_at
        reasons = {
            "belongs to another job": facts.name != self._name,
            "is of another version of the worker": facts.code != identity.code,
            "is of other weights": facts.weights != identity.weights,
            f"was computed in another way ({facts.arithmetic})": (
                facts.arithmetic != identity.arithmetic
            ),
            "has other steps": facts.num_steps != self._num_steps,
            "is more than a day old": not -MAX_AGE_SECONDS < age_seconds < MAX_AGE_SECONDS,
        }
        for reason, holds in reasons.items():
            if holds:
                raise RefusedStateError(reason)
        return facts, DenoisingState.load(body, facts.step)

    def __enter__(self) -> Self:
        if self._resumption is not None:
            context = contextvars.copy_context()  # the job's id, for the thread's log lines
            self._thread = threading.Thread(
                target=context.run, args=(self._keep, self._resumption), name="state", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        failure = None if error is None else machine.as_own_fault(error) or error
        # what is no failure of ours, a stop aside, is unforeseen, and may be tried again
        may_come_again = failure is not None and getattr(failure, "retryable", True)
        self._is_removed = not may_come_again
        self._newest = None
        self._closing.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def begin_denoising(self) -> None:
        """Notes when the steps begin."""
        self._started = time.monotonic()

    def offer(self, state: "DenoisingState") -> None:
        """The newest state; it is kept when it is due. Waits for nothing."""
        if self._resumption is None:
            return
        earlier = self._facts.seconds if self._facts is not None else 0.0
        self._newest = (state, earlier + time.monotonic() - self._started)

    def _keep(self, resumption: Resumption) -> None:
        """Writes the newest state whenever it is due, and removes it at the end."""
        kept_at = time.monotonic()
        while not self._closing.wait(POLL_SECONDS):
            newest = self._newest
            if newest is None or newest[0].step <= self._kept_step:
                continue
            now = time.monotonic()
            # the last one is all there will be while the frames are decoded
            since = self._started if newest[0].step == self._num_steps else kept_at
            if now - since >= resumption.interval_seconds or resumption.is_ending:
                kept_at = now
                self._write(resumption, *newest)
                if self._newest is newest:
                    self._newest = None  # it lies in the GPU's memory
        if self._is_removed and self._may_exist:
            try:
                resumption.store.delete(self._name)
            except Exception as error:  # it goes by its age
                logger.warning("the state was not removed: %s", type(error).__name__)

    def _write(self, resumption: Resumption, state: "DenoisingState", seconds: float) -> None:
        identity = self._identity
        assert identity is not None
        facts = Facts(
            name=self._name,
            step=state.step,
            num_steps=self._num_steps,
            seed=self.seed or 0,
            seconds=seconds,
            written_at=time.time(),
            weights=identity.weights,
            code=identity.code,
            arithmetic=identity.arithmetic,
            gpu=identity.gpu,
        )

        def write(path: Path) -> None:
            state.save(path, {"facts": facts.model_dump_json()})
            seal(path, resumption.key)

        begun = time.monotonic()
        self._may_exist = True
        try:
            resumption.store.put(self._name, write, state.num_bytes)
        except Exception as error:  # of a store or a GPU: the job goes on, and tries again
            logger.warning("the state of step %d was not kept: %s", state.step, _told(error))
            return
        self._kept_step = state.step
        logger.info("kept step %d in %.1f s", state.step, time.monotonic() - begun)


def _told(error: Exception) -> str:
    """What failed, for the log: without a path, which has the state's name, or an address."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    of_system = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors says it
    return os.strerror(int(of_system[1])) if of_system else type(error).__name__


def _key(settings: Settings) -> bytes | None:
    """The operator's own, or one that follows from the secret of the bucket; None: neither."""
    for secret in (settings.resume_secret, settings.bucket_secret_access_key):
        if secret is not None and secret.get_secret_value():
            text = secret.get_secret_value().encode()
            return hmac.digest(text, b"states of running jobs", "sha256")
    return None


def seal(path: Path, key: bytes) -> None:
    """Adds to the file what proves that whoever has the key wrote it."""
    tag = hmac.new(key, b"state ", "sha256")
    with path.open("r+b") as file:
        while piece := file.read(2**20):
            tag.update(piece)
        file.write(tag.digest())


def unsealed(content: bytes, key: bytes) -> bytes:
    """What was sealed.

    Raises:
        RefusedStateError: it was not by this key, or is no longer the same.
    """
    body, tag = content[:-TAG_BYTES], content[-TAG_BYTES:]
    expected = hmac.new(key, b"state ", "sha256")
    expected.update(body)
    if not hmac.compare_digest(expected.digest(), tag):
        raise RefusedStateError("is not signed by this endpoint's key, or was damaged")
    return body


def facts_of(content: bytes) -> Facts:
    """What a sealed state says of itself.

    Raises:
        RefusedStateError: it says something else than this version of the worker would.
    """
    try:
        length = int.from_bytes(content[:8], "little")  # of safetensors' header
        header = json.loads(content[8 : 8 + length])
        return Facts.model_validate_json(header["__metadata__"]["facts"])
    except (ValueError, LookupError, TypeError, ValidationError):
        raise RefusedStateError("is of another version of the worker") from None
