"""Files to objects of an S3-compatible store, and objects to addresses.

The one place of the worker that speaks to a store. How stores differ, and where in a bucket an
object lies, is `avatar_client.contract.bucket`'s to say.
"""

import itertools
import json
import logging
import random
import time
import uuid
from collections.abc import Callable
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
from avatar_client.contract.job_errors import UploadError
from avatar_client.contract.request import OutputOptions
from worker.media import download

logger = logging.getLogger(__name__)

METADATA_NAME = "avatar-metadata"  # S3 gives 2 KiB to all names and values together
MAX_METADATA_BYTES = 1800

STORE_ERRORS = (ClientError, BotoCoreError, Boto3Error)

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


def _no_check() -> None:
    """For calls that nobody stops."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a store is waited for that does not answer as it should.

    Attributes:
        seconds: from the first try to the last one.
        check: is asked before each try; what it raises ends the waiting.
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


class Storage:
    """One bucket that can be reached.

    Raises:
        InputUrlBlockedError: a client's endpoint that is not https or not public.
        InputDownloadError: the host of a client's endpoint cannot be resolved.
        InvalidInputError: a client's bucket whose endpoint or name is no use.
        StorageNotConfiguredError: the same of the operator's bucket.
    """

    def __init__(self, bucket: BucketSettings, *, allow_private: bool = False) -> None:
        if bucket.from_client:
            field = "s3Config.endpointUrl"
            download.check_endpoint(bucket.endpoint_url, field=field, allow_private=allow_private)
        self.bucket_name = stores.locate(bucket).name
        self._settings = bucket
        # one try a call: botocore's own five are over in less than a second
        config = stores.client_config(bucket) | {"retries": {"total_max_attempts": 1}}
        self._client = _session().client(
            "s3", config=Config(**config), **stores.client_arguments(bucket)
        )

    def key(self, output: OutputOptions, job_id: str) -> str:
        """Where the video of a job lies: prefixes, then the key asked for or `<job id>.mp4`."""
        return self._settings.key(output.prefix, output.key or f"{job_id}.mp4")

    def put(
        self,
        path: Path,
        key: str,
        *,
        content_type: str,
        metadata: dict[str, Any] | None = None,
        patience: Patience = NO_PATIENCE,
    ) -> None:
        """Uploads a file. `metadata` travels as JSON in one value of the object's own metadata.

        Raises:
            UploadError: the store refused or did not answer.
            ValueError: metadata of more than 1,800 bytes.
        """
        text = json.dumps(metadata or {}, separators=(",", ":"))  # ASCII, as headers must be
        if len(text) > MAX_METADATA_BYTES:
            raise ValueError(f"{len(text)} bytes of metadata, over {MAX_METADATA_BYTES}")
        options = {"ContentType": content_type, "Metadata": {METADATA_NAME: text}}
        transfer = TransferConfig(multipart_threshold=stores.MULTIPART_BYTES)

        def upload() -> None:
            self._client.upload_file(
                str(path), self.bucket_name, key, ExtraArgs=options, Config=transfer
            )

        try:
            _patiently(upload, patience)
        except STORE_ERRORS as error:
            raise self._failure(error) from error

    def delete(self, key: str) -> None:
        """Removes an object; there need not be one.

        Raises:
            UploadError: the store refused or did not answer.
        """
        try:
            self._client.delete_object(Bucket=self.bucket_name, Key=key)
        except STORE_ERRORS as error:
            raise self._failure(error) from error

    def head(self, key: str, patience: Patience = NO_PATIENCE) -> StoredObject | None:
        """The object under the key, or None.

        Raises:
            UploadError: the store refused the credentials or did not answer.
        """
        try:
            answer = _patiently(
                lambda: self._client.get_object(Bucket=self.bucket_name, Key=key), patience
            )
        except STORE_ERRORS as error:
            # without the right to list, S3 denies access to a key that does not exist
            if _code(error) in ("NoSuchKey", "AccessDenied"):
                return None
            raise self._failure(error) from error
        # GET and not HEAD: an error of HEAD has no body, so a wrong secret key would look the same
        # as a key that does not exist
        answer["Body"].close()
        return StoredObject(answer["ContentLength"], _parse_metadata(answer["Metadata"]))

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
        """Returns if endpoint, region and credentials work together; writes nothing.

        A bucket that may be written but not listed denies access to the key that is asked for:
        then it is not proven that the bucket exists. The right to write is never proven.

        Raises:
            UploadError: they do not.
        """
        self.head(self.key(OutputOptions(), f"check-{uuid.uuid4()}"), patience)

    def _failure(self, error: Exception) -> UploadError:
        field = "s3Config" if self._settings.from_client else None
        return stores.upload_error(error, _code(error), field=field)


def _patiently(call: Callable[[], T], patience: Patience) -> T:
    """The call's result, which is tried for as long as patience lasts.

    Raises:
        ClientError, BotoCoreError, Boto3Error: of the last try, or one that no further try mends.
    """
    deadline = time.monotonic() + patience.seconds
    for attempt in itertools.count():
        patience.check()
        try:
            return call()
        except STORE_ERRORS as error:
            pause = min(FIRST_PAUSE_SECONDS * 2 ** min(attempt, 10), LONGEST_PAUSE_SECONDS)
            pause *= random.uniform(0.5, 1.0)  # noqa: S311  # so that workers do not ask together
            if not _is_retryable(error) or time.monotonic() + pause > deadline:
                raise
            logger.warning("the object store failed (%s); it is tried again", _reason(error))
            patience.on_wait()
            _sleep(pause, patience.check)
    raise AssertionError


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


def thumbnail_key(key: str) -> str:
    """Where the thumbnail of the video under `key` lies."""
    return key.removesuffix(".mp4") + ".jpg"


@cache
def _session() -> boto3.session.Session:
    return boto3.session.Session()  # holds the description of S3, which takes 0.1 s to read


def _code(error: BaseException) -> str | None:
    """The store's own error code; None if there was no answer."""
    client_error = _client_error(error)
    return None if client_error is None else str(client_error.response["Error"]["Code"])


def _client_error(error: BaseException) -> ClientError | None:
    """The store's answer behind an error; None if there was none."""
    if isinstance(error, Boto3Error) and error.__context__ is not None:  # an upload's
        error = error.__context__
    return error if isinstance(error, ClientError) else None


def _parse_metadata(values: dict[str, str]) -> dict[str, Any]:
    try:
        metadata = json.loads(values.get(METADATA_NAME, "{}"))
    except ValueError:
        return {}
    return metadata if isinstance(metadata, dict) else {}
