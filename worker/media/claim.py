"""A request that several workers may have been given, and that one of them makes.

The claim is a small object beside the video's: it is written where none is, which only one of all
writers achieves, and written again every few seconds as long as its worker lives. Whoever waits
looks at its ETag. One that has stayed the same for as long as a lease lasts belongs to a worker
that is gone, and is written over, which again only one achieves. So no two clocks are compared.
"""

import contextvars
import logging
import secrets
import threading
import time
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from avatar_client.contract.job_errors import InvalidInputError, UploadError
from worker.media.store_client import Patience, StoreClient, StoredObject

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0  # without a sign of life, after which a claim is anybody's
RENEW_SECONDS = 10.0
CALL_SECONDS = 10.0  # for a call of the thread that renews: there is time for several in a lease
RELEASE_SECONDS = 15.0  # for which the end of a claim may hold up the job's

ANOTHER_REQUEST = (
    "another request has this id already: send that one again as it was, or choose another id"
)


class _Note(BaseModel):
    """What a claim's object says."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    fingerprint: str  # of the request
    holder: str
    beat: Annotated[int, Field(ge=0)]  # how often it was renewed: each time the ETag is another
    released: bool  # nobody works on it any more


class _TooSlowError(Exception):
    """The store has had its time."""


class Claim:
    """The right to make one request's video, of one worker among all.

    Args:
        client: of the bucket, and nobody else's: a thread of this claim's uses it, too.
        key: of the claim's object.
        fingerprint: of the request.
        is_kept: whether the object stays once the video is made, to remember the request.
    """

    def __init__(
        self, client: StoreClient, key: str, fingerprint: str, *, is_kept: bool = False
    ) -> None:
        self.is_lost = False  # to another worker
        self.is_done = False  # there is a video
        self._client = client
        self._key = key
        self._fingerprint = fingerprint
        self._is_kept = is_kept
        self._holder = secrets.token_hex(8)
        self._beat = 0
        self._etag = ""  # of this worker's note
        self._seen_etag = ""  # of another's ...
        self._seen_at = 0.0  # ... and when it was seen first
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, patience: Patience) -> bool:
        """Whether this worker has the claim now, and renews it from here on.

        To be asked again and again: only so a worker is noticed that is gone.

        Raises:
            InvalidInputError: it is another request that has this id.
            UploadError: the store refused or did not answer.
        """
        etag = self._write(patience)
        if etag is None:
            found = self._client.look(self._key, patience)
            if found is None:  # released just now
                return False
            note = _read(found)
            if note is not None and note.holder == self._holder:  # whose answer was lost
                etag = found.etag
            elif note is not None and note.fingerprint != self._fingerprint:
                raise InvalidInputError(ANOTHER_REQUEST, field="request_id")
            elif self._is_abandoned(found, note):
                logger.warning("the worker that had claimed this request is gone")
                etag = self._write(patience, if_match=found.etag)
        if etag is None:
            return False
        self._etag = etag
        context = contextvars.copy_context()  # the job's id, for the thread's log lines
        self._thread = threading.Thread(
            target=context.run, args=(self._keep,), name="claim", daemon=True
        )
        self._thread.start()
        return True

    def require_held(self) -> None:
        """Returns if no other worker is known to have the claim.

        Raises:
            UploadError: one has.
        """
        if self.is_lost:
            raise UploadError(
                "the bucket was out of reach for so long that another worker makes this request "
                "now; send it again for its video",
                field="request_id",
            )

    def release(self) -> None:
        """Gives the claim up, if this worker has it; also where `take` is still under way."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(RELEASE_SECONDS)

    def _is_abandoned(self, found: StoredObject, note: _Note | None) -> bool:
        if note is not None and note.released:
            return True
        if found.etag != self._seen_etag:
            self._seen_etag, self._seen_at = found.etag, time.monotonic()
        return time.monotonic() - self._seen_at > LEASE_SECONDS

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                self._renew()
            except (UploadError, _TooSlowError) as error:
                logger.warning("the claim on the request was not renewed: %s", error)
            if self.is_lost:
                logger.warning("another worker has taken the request over")
                return
        try:
            self._give_up()
        except (UploadError, _TooSlowError) as error:
            logger.warning("the claim on the request was not removed: %s", error)

    def _renew(self) -> None:
        patience = _patience()
        etag = self._write(patience, if_match=self._etag)
        if etag is None:
            found = self._client.look(self._key, patience)
            if found is None:  # somebody has removed it
                etag = self._write(patience)
            elif (note := _read(found)) is not None and note.holder == self._holder:
                etag = found.etag  # the answer to an earlier write was lost
        if etag is None:
            self.is_lost = True
        else:
            self._etag = etag

    def _give_up(self) -> None:
        patience = _patience(retry_seconds=CALL_SECONDS)  # there is no later beat to try it
        if not (self.is_done and self._is_kept):
            found = self._client.look(self._key, patience)
            note = _read(found) if found is not None else None
            if note is None or note.holder != self._holder:
                return
            try:
                self._client.delete(self._key, patience=patience)
                return
            except UploadError:  # no right to: then the note says it
                pass
        self._write(patience, if_match=self._etag, released=True)

    def _write(
        self, patience: Patience, *, if_match: str | None = None, released: bool = False
    ) -> str | None:
        self._beat += 1
        note: dict[str, Any] = {
            "fingerprint": self._fingerprint,
            "holder": self._holder,
            "beat": self._beat,
            "released": released,
        }
        return self._client.write_note(self._key, note, patience, if_match=if_match)


def _read(found: StoredObject) -> _Note | None:
    """What the object says; None if it is no claim."""
    try:
        return _Note.model_validate(found.metadata)
    except ValidationError:
        return None


def _patience(retry_seconds: float = 0.0) -> Patience:
    """For the next calls of the thread that renews, all together."""
    deadline = time.monotonic() + CALL_SECONDS

    def check() -> None:
        if time.monotonic() > deadline:
            raise _TooSlowError(f"no answer in {CALL_SECONDS:g} s")

    return Patience(retry_seconds, check)
