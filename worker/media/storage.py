"""Files to objects of an S3-compatible store, and objects to addresses.

The one place of the worker that speaks to a store. How stores differ, and where in a bucket an
object lies, is `avatar_client.contract.bucket`'s to say; `store_http` carries the requests.
"""

import hashlib
import itertools
import json
import logging
import random
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import boto3.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
)

from avatar_client.contract import bucket as stores
from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.bucket_session import session
from avatar_client.contract.job_errors import (
    InputDownloadError,
    InvalidInputError,
    StoreRefusedError,
    UploadError,
)
from avatar_client.contract.request import OutputOptions
from worker.media import download
from worker.media.store_http import StoreHttp

logger = logging.getLogger(__name__)

METADATA_NAME = "avatar-metadata"  # S3 gives 2 KiB to all names and values together
MAX_METADATA_BYTES = 1800
CHOSEN_FOLDER = "chosen"  # of the operator's bucket: what clients name lies apart
PROOF_SECONDS = 600.0  # for how long it is believed that a store takes objects
MAX_PROOFS = 1000
READ_BACK_SECONDS = 30.0

# What a store's answers can make botocore raise: its own errors, and those of its parsers, which
# take dates, numbers and XML as they come.
STORE_ERRORS = (
    ClientError,
    BotoCoreError,
    Boto3Error,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)

# What is worth another try, in the dialects of S3; whatever has no answer is, too.
RETRYABLE_CODES = {
    "RequestTimeTooSkewed",
    "RequestTimeout",
    "RequestTimeoutException",
    "OperationAborted",
    "ConditionalRequestConflict",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
    "InternalError",
    "ServiceUnavailable",
    "ServerBusy",
    "XAmzContentSHA256Mismatch",  # a body that was damaged on its way
    "BadDigest",
}
RETRYABLE_STATUSES = {408, 425, 429, 500, 502, 503, 504, *range(520, 525)}
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 20.0  # each about twice as long

T = TypeVar("T")

proofs: dict[str, float] = {}  # of what was proven, until when
read_stores: set[str] = set()  # stores whose addresses have been read in this process's life


def _no_check() -> None:
    """For calls that nobody stops."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a store is waited for that does not answer as it should.

    Attributes:
        seconds: from the first try to the last one.
        check: is asked before each try and at least every half second of one; what it raises ends
            the call.
        on_wait: is called where another try will follow.
    """

    seconds: float = 0.0
    check: Callable[[], None] = _no_check
    on_wait: Callable[[], None] = _no_check


NO_PATIENCE = Patience()


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object that is there already."""

    size_bytes: int
    metadata: dict[str, Any]  # what `put` was given; empty for an object of other origin


@dataclass(frozen=True, slots=True)
class ObjectKeys:
    """Where the objects of one job lie."""

    video: str
    thumbnail: str
    result: str  # that the control plane did not take


class ObjectExistsError(StoreRefusedError):
    """Another object has come to lie under a key that was free."""


class Storage:
    """One bucket that can be reached. Used by one thread at a time.

    Raises:
        InputUrlBlockedError: a client's endpoint that is not https or not public.
        InvalidInputError: a client's bucket whose endpoint or name is no use.
        StorageNotConfiguredError: the same of the operator's bucket.
    """

    def __init__(self, bucket: BucketSettings, *, allow_private: bool = False) -> None:
        self._settings = bucket
        self._field = "s3Config" if bucket.from_client else None
        self._allow_private = allow_private or not bucket.from_client
        if bucket.endpoint_url and not self._allow_private:
            with suppress(InputDownloadError):  # a name that is not known now may be so later
                download.check_endpoint(bucket.endpoint_url, field="s3Config.endpointUrl")
        location = stores.locate(bucket)
        self.bucket_name = location.name
        self._http = StoreHttp(
            location.host,
            field="s3Config.endpointUrl" if bucket.from_client else None,
            allow_private=self._allow_private,
        )
        # one try a call: botocore's own five are over in less than a second
        config = stores.client_config(bucket) | {"retries": {"total_max_attempts": 1}}
        self._client = shared_session().client(
            "s3", config=Config(**config), **stores.client_arguments(bucket)
        )
        events: Any = self._client.meta.events
        events.register_first("before-send.s3", self._http.send)
        events.register("before-call.s3", _forbid_redirects)
        for operation in ("PutObject", "CompleteMultipartUpload"):
            events.register(f"before-call.s3.{operation}", self._add_condition)
        self._only_if_absent = False

    def keys(self, output: OutputOptions, job_id: str) -> ObjectKeys:
        """Where the objects of a job lie.

        What the worker names, it names by the job's id: nobody else's objects are there. In the
        operator's bucket, the keys that clients choose lie in a folder of their own.

        Raises:
            InvalidInputError: a prefix that leads into that folder.
        """
        folder = self._settings.key(output.prefix)
        is_shared = not self._settings.from_client
        if is_shared and (output.prefix or "").split("/")[0] == CHOSEN_FOLDER:
            raise InvalidInputError(
                f"must not begin with {CHOSEN_FOLDER!r}, where the objects with a key of their "
                "client's lie",
                field="output.prefix",
            )
        made = "/".join(part for part in (folder, job_id) if part)
        video = f"{made}.mp4"
        if output.key:
            chosen = CHOSEN_FOLDER if is_shared else None
            video = self._settings.key(chosen, output.prefix, output.key)
        return ObjectKeys(video=video, thumbnail=f"{made}.jpg", result=f"{made}.mp4.json")

    def put(
        self,
        path: Path,
        key: str,
        *,
        content_type: str,
        metadata: dict[str, Any] | None = None,
        patience: Patience = NO_PATIENCE,
        only_if_absent: bool = False,
    ) -> None:
        """Uploads a file. `metadata` travels as JSON in one value of the object's own metadata.

        Args:
            only_if_absent: whether an object that is there already stays, where the store knows
                `If-None-Match`. One with the same metadata was written by an earlier try.

        Raises:
            ObjectExistsError: such an object is there.
            UploadError: the store refused or did not answer.
            ValueError: metadata of more than 1,800 bytes.
        """
        options = self._options(content_type, metadata)
        transfer = TransferConfig(multipart_threshold=stores.MULTIPART_BYTES)

        def upload() -> None:
            self._client.upload_file(
                str(path), self.bucket_name, key, ExtraArgs=options, Config=transfer
            )

        num_bytes = path.stat().st_size
        self._only_if_absent = only_if_absent
        try:
            try:
                self._patiently(upload, patience, num_bytes)
            except STORE_ERRORS as error:
                if not only_if_absent or _code(error) != "NotImplemented":
                    raise
                self._only_if_absent = False
                self._patiently(upload, patience, num_bytes)
        except STORE_ERRORS as error:
            if only_if_absent and _code(error) == "PreconditionFailed":
                stored = self.head(key, patience)
                if stored is not None and stored.metadata == metadata:
                    return
                message = "another object has come to lie under the key"
                raise ObjectExistsError(message, field="output.key") from error
            proofs.clear()  # what was proven has changed
            raise self._failure(error) from error
        finally:
            self._only_if_absent = False

    def delete(self, key: str) -> None:
        """Removes an object; there need not be one.

        Raises:
            UploadError: the store refused or did not answer.
        """
        self._delete(key, None)

    def head(self, key: str, patience: Patience = NO_PATIENCE) -> StoredObject | None:
        """The object under the key, or None.

        Raises:
            UploadError: the store refused the credentials or did not answer.
        """
        try:
            answer = self._patiently(
                lambda: self._client.get_object(Bucket=self.bucket_name, Key=key), patience
            )
            # GET and not HEAD: an error of HEAD has no body, so a wrong secret key would look the
            # same as a key that does not exist
            answer["Body"].close()
            return StoredObject(answer["ContentLength"], _parse_metadata(answer["Metadata"]))
        except STORE_ERRORS as error:
            # without the right to list, S3 denies access to a key that does not exist
            if _code(error) in ("NoSuchKey", "AccessDenied"):
                self._require_own_key(error, key)
                return None
            raise self._failure(error) from error

    def url(self, key: str, expires_seconds: int) -> str:
        """An address from which anyone can GET the object until it expires.

        Of a public bucket (`public_base_url`): the plain address, which does not expire.
        """
        if public_url := self._settings.public_url(key):
            return public_url
        params = {"Bucket": self.bucket_name, "Key": key}
        return self._client.generate_presigned_url(
            "get_object", Params=params, ExpiresIn=expires_seconds
        )

    def expires_at(self, expires_seconds: int) -> datetime | None:
        """When a `url` made now ends; None if it does not."""
        if self._settings.public_base_url:
            return None
        return datetime.now(UTC) + timedelta(seconds=expires_seconds)

    def check(self, patience: Patience = NO_PATIENCE) -> None:
        """Returns if endpoint, region, credentials and rights work together.

        Raises:
            UploadError: they do not.
        """
        key = self._settings.key(f"check-{uuid.uuid4()}")
        self.head(key, patience)
        self.prove(key, patience)

    def prove(self, key: str, patience: Patience = NO_PATIENCE) -> None:
        """Returns if objects can be written beside `key` and read by their addresses.

        Writes a tiny object, reads a byte of it as a client would, and removes it. In a bucket that
        keeps whatever is written (Object Lock), an upload in parts is begun and given up instead:
        that needs the same rights and leaves nothing. What was proven is believed for some minutes;
        for this process's life, if what was written may not be removed.

        Raises:
            UploadError: the store refused or did not answer, or the address cannot be read.
        """
        folder = key.rpartition("/")[0]
        proof = self._identity(folder)
        if proofs.get(proof, 0.0) > time.monotonic():
            return
        name = f".write-test-{uuid.uuid4().hex}"
        probe = f"{folder}/{name}" if folder else name
        try:
            if self._keeps_objects(patience):
                self._begin_and_give_up(probe, patience)
                is_removed = True
            else:
                is_removed = self._write_and_remove(probe, patience)
        except STORE_ERRORS as error:
            raise self._failure(error) from error
        if len(proofs) >= MAX_PROOFS:
            proofs.clear()
        proofs[proof] = time.monotonic() + PROOF_SECONDS if is_removed else float("inf")

    def read_back(self, key: str, patience: Patience = NO_PATIENCE) -> None:
        """Returns if the object can be read by its address; asked once a store and process.

        Raises:
            UploadError: it cannot; says why.
        """
        store = self._identity("")
        if store not in read_stores:
            self._read_a_byte(key, patience)
            read_stores.add(store)

    def _write_and_remove(self, key: str, patience: Patience) -> bool:
        """Whether the object could be removed again."""
        options = self._options("application/octet-stream", None)
        answer = self._patiently(
            lambda: self._client.put_object(
                Bucket=self.bucket_name, Key=key, Body=b"avatar", **options
            ),
            patience,
        )
        try:
            self._read_a_byte(key, patience)
        except StoreRefusedError:
            self._is_removed(key, answer.get("VersionId"))
            raise
        except UploadError as error:  # which says nothing against the bucket
            logger.warning("it is not known whether addresses can be read: %s", error)
        return self._is_removed(key, answer.get("VersionId"))

    def _is_removed(self, key: str, version_id: str | None) -> bool:
        try:
            self._delete(key, version_id)
        except UploadError as error:
            logger.warning("a write test was not removed: %s", error)
            return False
        return True

    def _begin_and_give_up(self, key: str, patience: Patience) -> None:
        options = self._options("application/octet-stream", None)
        place: dict[str, Any] = {"Bucket": self.bucket_name, "Key": key}
        begun = self._patiently(
            lambda: self._client.create_multipart_upload(**place, **options), patience
        )
        with suppress(*STORE_ERRORS):
            self._http.begin(0, patience.check)
            self._client.abort_multipart_upload(**place, UploadId=begun["UploadId"])

    def _keeps_objects(self, patience: Patience) -> bool:
        """Whether the bucket locks what is written into it, as far as its store says so."""
        try:
            self._http.begin(0, patience.check)
            answer = self._client.get_object_lock_configuration(Bucket=self.bucket_name)
        except STORE_ERRORS:
            return False
        return "Rule" in answer.get("ObjectLockConfiguration", {})

    def _read_a_byte(self, key: str, patience: Patience) -> None:
        deadline = time.monotonic() + patience.seconds
        for attempt in itertools.count():
            try:
                download.require_readable(
                    self.url(key, 300),
                    timeout_seconds=READ_BACK_SECONDS,
                    field=self._field,
                    allow_private=self._allow_private,
                    check=patience.check,
                )
            except InputDownloadError as error:
                is_final = isinstance(error, download.RefusedError) and (
                    error.status not in RETRYABLE_STATUSES
                )
                pause = _pause(attempt)
                if is_final or time.monotonic() + pause > deadline:
                    kind = StoreRefusedError if is_final else UploadError
                    reason = error.message if is_final or not self._field else "no answer"
                    message = f"what was stored cannot be read by its address: {reason}"
                    raise kind(message, field=self._field) from error
                patience.on_wait()
                _sleep(pause, patience.check)
            else:
                return

    def _options(self, content_type: str, metadata: dict[str, Any] | None) -> dict[str, Any]:
        text = json.dumps(metadata or {}, separators=(",", ":"))  # ASCII, as headers must be
        if len(text) > MAX_METADATA_BYTES:
            raise ValueError(f"{len(text)} bytes of metadata, over {MAX_METADATA_BYTES}")
        return {
            **stores.upload_options(self._settings, content_type),
            "Metadata": {METADATA_NAME: text},
        }

    def _delete(self, key: str, version_id: str | None) -> None:
        version: dict[str, Any] = {"VersionId": version_id} if version_id else {}
        try:
            self._http.begin(0, _no_check)
            self._client.delete_object(Bucket=self.bucket_name, Key=key, **version)
        except STORE_ERRORS as error:
            raise self._failure(error) from error

    def _require_own_key(self, error: Exception, key: str) -> None:
        """Returns unless the store says that it looked for another key than the one meant.

        Raises:
            StoreRefusedError: the endpoint's host stands for the bucket, in a way that cannot be
                told from outside: the bucket's name would become a folder.
        """
        client_error = _client_error(error)
        looked_for = _told(client_error).get("Key") if client_error else None
        if looked_for == f"{self.bucket_name}/{key}":
            raise StoreRefusedError(
                "the endpoint's host stands for the bucket already: objects would lie in a folder "
                "of the bucket's name; give the store's own host",
                field=self._field,
            )

    def _add_condition(self, params: dict[str, Any], **_: Any) -> None:
        if self._only_if_absent:
            params["headers"]["If-None-Match"] = "*"

    def _identity(self, folder: str) -> str:
        """Equal for two storages that a store cannot tell from each other."""
        bucket = self._settings
        token = bucket.session_token
        parts = (
            bucket.model_dump_json(exclude={"secret_access_key", "session_token"}),
            bucket.secret_access_key.get_secret_value(),
            token.get_secret_value() if token else "",
            folder,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _patiently(self, call: Callable[[], T], patience: Patience, num_bytes: int = 0) -> T:
        """The call's result, which is tried for as long as patience lasts.

        Raises:
            one of STORE_ERRORS: of the last try, or one that no further try mends.
        """
        deadline = time.monotonic() + patience.seconds
        for attempt in itertools.count():
            patience.check()
            self._http.begin(num_bytes, patience.check)
            try:
                return call()
            except STORE_ERRORS as error:
                pause = _pause(attempt)
                if not _is_retryable(error) or time.monotonic() + pause > deadline:
                    raise
                logger.warning("the object store failed (%s); it is tried again", _reason(error))
                patience.on_wait()
                _sleep(pause, patience.check)
        raise AssertionError

    def _failure(self, error: Exception) -> UploadError:
        is_final = not _is_retryable(error)
        return stores.upload_error(error, _code(error), field=self._field, is_final=is_final)


def _forbid_redirects(context: dict[str, Any], **_: Any) -> None:
    """Has botocore take a redirect for the answer. Else it asks for the bucket's region, and again
    where that is answered by a redirect; and an address signed for the wrong region is no use.
    """
    context.setdefault("s3_redirect", {})["redirected"] = True


def _pause(attempt: int) -> float:
    pause: float = min(FIRST_PAUSE_SECONDS * 2 ** min(attempt, 10), LONGEST_PAUSE_SECONDS)
    return pause * random.uniform(0.5, 1.0)  # noqa: S311  # so that workers do not ask together


def _sleep(seconds: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, 0.5))


def _is_retryable(error: Exception) -> bool:
    client_error = _client_error(error)
    if client_error is not None:
        status = client_error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return _code(error) in RETRYABLE_CODES or status in RETRYABLE_STATUSES
    # no answer, or a part of one; what was wrong before anything was sent stays wrong
    return not isinstance(error, ParamValidationError | NoCredentialsError)


def _reason(error: Exception) -> str:
    return str(stores.upload_error(error, _code(error)).message)


@cache
def shared_session() -> boto3.session.Session:
    return session()  # holds the description of S3, which takes 0.1 s to read


def _code(error: BaseException) -> str | None:
    """The store's own error code; None if there was no answer."""
    client_error = _client_error(error)
    if client_error is None:
        return None
    return str(_told(client_error).get("Code") or "")


def _told(error: ClientError) -> dict[str, Any]:
    """What the store's answer says of the error: any XML may stand there."""
    told: Any = error.response.get("Error")
    return told if isinstance(told, dict) else {}


def _client_error(error: BaseException) -> ClientError | None:
    """The store's answer behind an error; None if there was none."""
    if isinstance(error, Boto3Error) and error.__context__ is not None:  # an upload's
        error = error.__context__
    return error if isinstance(error, ClientError) else None


def _parse_metadata(values: dict[str, str]) -> dict[str, Any]:
    try:
        metadata = json.loads(values.get(METADATA_NAME, "{}"))
    except (ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
