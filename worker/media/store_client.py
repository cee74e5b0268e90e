"""One bucket's client: its calls are tried again while that may help, and told when they fail.

How stores differ is `avatar_client.contract.bucket`'s to say; `store_http` carries the requests.
"""

import hashlib
import itertools
import json
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import boto3.session
from boto3.exceptions import Boto3Error
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
    StoreRefusedError,
    UploadError,
)
from worker.media import download
from worker.media.store_http import StoreHttp

logger = logging.getLogger(__name__)

METADATA_NAME = "avatar-metadata"  # S3 gives 2 KiB to all names and values together
MAX_METADATA_BYTES = 1800

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
# Of a key that is not there: without the right to list, S3 denies access to it.
MISSING = {"NoSuchKey", "AccessDenied"}
UNMET_CONDITION = {"PreconditionFailed", "412", "NoSuchKey", "404"}
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
        check: is asked before each try and at least every half second of one; what it raises ends
            the call.
        on_wait: is called where another try will follow.
    """

    seconds: float = 0.0
    check: Callable[[], None] = _no_check
    on_wait: Callable[[], None] = _no_check

    def of(
        self,
        call: Callable[[], T],
        errors: tuple[type[Exception], ...],
        is_retryable: Callable[[Exception], bool],
    ) -> T:
        """The call's result, which is tried for so long.

        Raises:
            one of `errors`: of the last try, or one that no further try mends.
        """
        deadline = time.monotonic() + self.seconds
        for attempt in itertools.count():
            self.check()
            try:
                return call()
            except errors as error:
                pause = min(FIRST_PAUSE_SECONDS * 2 ** min(attempt, 10), LONGEST_PAUSE_SECONDS)
                pause *= random.uniform(0.5, 1.0)  # noqa: S311  # so that workers do not ask together
                if not is_retryable(error) or time.monotonic() + pause > deadline:
                    raise
                logger.warning("the object store failed (%s); it is tried again", _reason(error))
                self.on_wait()
                self._sleep(pause)
        raise AssertionError

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.5))


NO_PATIENCE = Patience()


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object that is there already."""

    size_bytes: int
    etag: str  # another for each content
    metadata: dict[str, Any]  # what it was put with; empty for an object of other origin


class StoreClient:
    """The calls of one bucket, each over checked addresses and with an end.

    Raises:
        InputUrlBlockedError: a client's endpoint that is not https or not public.
        InvalidInputError: a client's bucket whose endpoint or name is no use.
        StorageNotConfiguredError: the same of the operator's bucket.

    Attributes:
        s3: boto3's client. Its calls are made inside `call`.
        field: of the request that named the bucket; None: the operator did.
        only_if_absent: whether what is uploaded now must not replace anything.
    """

    def __init__(self, bucket: BucketSettings, *, allow_private: bool = False) -> None:
        self.settings = bucket
        self.field = "s3Config" if bucket.from_client else None
        self.allow_private = allow_private or not bucket.from_client
        self.only_if_absent = False
        if bucket.endpoint_url and not self.allow_private:
            with suppress(InputDownloadError):  # a name that is not known now may be so later
                download.check_endpoint(bucket.endpoint_url, field="s3Config.endpointUrl")
        location = stores.locate(bucket)
        self.bucket_name = location.name
        self._http = StoreHttp(
            location.host,
            field="s3Config.endpointUrl" if bucket.from_client else None,
            allow_private=self.allow_private,
        )
        # one try a call: botocore's own five are over in less than a second
        config = stores.client_config(bucket) | {"retries": {"total_max_attempts": 1}}
        self.s3 = shared_session().client(
            "s3", config=Config(**config), **stores.client_arguments(bucket)
        )
        events: Any = self.s3.meta.events
        events.register_first("before-send.s3", self._http.send)
        events.register("before-call.s3", _forbid_redirects)
        for operation in ("PutObject", "CompleteMultipartUpload"):
            events.register(f"before-call.s3.{operation}", self._add_condition)

    def call(
        self,
        call: Callable[[], T],
        patience: Patience,
        num_bytes: int = 0,
        max_content_bytes: int = 0,
    ) -> T:
        """The result of calls of `s3`, which are tried for as long as patience lasts.

        Args:
            num_bytes: of the file that is sent.
            max_content_bytes: of an object that is read; 0: none of it is.

        Raises:
            one of STORE_ERRORS: of the last try, or one that no further try mends.
        """

        def one_try() -> T:
            self._http.begin(num_bytes, patience.check, max_content_bytes)
            try:
                return call()
            finally:
                self._http.end()

        return patience.of(one_try, STORE_ERRORS, is_retryable)

    def failure(self, error: Exception) -> UploadError:
        """What is told of one of STORE_ERRORS."""
        is_final = not is_retryable(error)
        return stores.upload_error(error, code(error), field=self.field, is_final=is_final)

    def url(self, key: str, expires_seconds: int) -> str:
        """An address from which anyone can GET the object until it expires.

        Of a public bucket (`public_base_url`): the plain address, which does not expire.
        """
        if public_url := self.settings.public_url(key):
            return public_url
        params = {"Bucket": self.bucket_name, "Key": key}
        return self.s3.generate_presigned_url(
            "get_object", Params=params, ExpiresIn=expires_seconds
        )

    def upload_options(self, content_type: str, metadata: dict[str, Any] | None) -> dict[str, Any]:
        """What an upload says of its object.

        Raises:
            ValueError: metadata of more than 1,800 bytes.
        """
        text = json.dumps(metadata or {}, separators=(",", ":"))  # ASCII, as headers must be
        if len(text) > MAX_METADATA_BYTES:
            raise ValueError(f"{len(text)} bytes of metadata, over {MAX_METADATA_BYTES}")
        options = stores.upload_options(self.settings, content_type)
        return {**options, "Metadata": {METADATA_NAME: text}}

    def look(self, key: str, patience: Patience) -> StoredObject | None:
        """The object under the key, or None.

        Raises:
            UploadError: the store refused the credentials or did not answer.
        """
        try:
            answer = self.call(
                lambda: self.s3.get_object(Bucket=self.bucket_name, Key=key), patience
            )
            # GET and not HEAD: an error of HEAD has no body, so a wrong secret key would look the
            # same as a key that does not exist
            answer["Body"].close()
            return StoredObject(
                answer["ContentLength"],
                str(answer.get("ETag", "")),
                _parse_metadata(answer["Metadata"]),
            )
        except STORE_ERRORS as error:
            if code(error) in MISSING:
                self._require_own_key(error, key)
                return None
            raise self.failure(error) from error

    def write_note(
        self, key: str, note: dict[str, Any], patience: Patience, *, if_match: str | None = None
    ) -> str | None:
        """The ETag of a note, now that it is there; None: it was not to be written.

        It is written where nothing is or, with `if_match`, over the note that has this ETag.

        Raises:
            UploadError: the store refused or did not answer.
        """
        # the ETag is made of the body, and what is read again is the metadata
        body = json.dumps(note).encode()
        options = self.upload_options("application/json", note)
        condition: dict[str, Any] = {"IfMatch": if_match} if if_match else {"IfNoneMatch": "*"}
        place: dict[str, Any] = {"Bucket": self.bucket_name, "Key": key}
        try:
            answer = self.call(
                lambda: self.s3.put_object(**place, Body=body, **condition, **options), patience
            )
            return str(answer["ETag"])
        except STORE_ERRORS as error:
            if code(error) in UNMET_CONDITION:
                return None
            raise self.failure(error) from error

    def delete(
        self, key: str, version_id: str | None = None, patience: Patience = NO_PATIENCE
    ) -> None:
        """Removes an object, or a version of it; there need not be one.

        Raises:
            UploadError: the store refused or did not answer.
        """
        version: dict[str, Any] = {"VersionId": version_id} if version_id else {}
        try:
            self.call(
                lambda: self.s3.delete_object(Bucket=self.bucket_name, Key=key, **version),
                patience,
            )
        except STORE_ERRORS as error:
            raise self.failure(error) from error

    def identity(self, place: str) -> str:
        """Equal for two clients that a store cannot tell from each other, and the same place."""
        bucket = self.settings
        token = bucket.session_token
        parts = (
            bucket.model_dump_json(exclude={"secret_access_key", "session_token"}),
            bucket.secret_access_key.get_secret_value(),
            token.get_secret_value() if token else "",
            place,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _require_own_key(self, error: Exception, key: str) -> None:
        """Returns unless the store says that it looked for another key than the one meant.

        Raises:
            StoreRefusedError: the endpoint's host stands for the bucket, in a way that cannot be
                told from outside: the bucket's name would become a folder.
        """
        if told(error).get("Key") == f"{self.bucket_name}/{key}":
            raise StoreRefusedError(
                "the endpoint's host stands for the bucket already: objects would lie in a folder "
                "of the bucket's name; give the store's own host",
                field=self.field,
            )

    def _add_condition(self, params: dict[str, Any], **_: Any) -> None:
        if self.only_if_absent:
            params["headers"]["If-None-Match"] = "*"


def _parse_metadata(values: dict[str, str]) -> dict[str, Any]:
    try:
        metadata = json.loads(values.get(METADATA_NAME, "{}"))
    except (ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


@cache
def shared_session() -> boto3.session.Session:
    """boto3's session of all clients: it holds the description of S3, which takes 0.1 s to read."""
    return session()


def _forbid_redirects(context: dict[str, Any], **_: Any) -> None:
    """Has botocore take a redirect for the answer.

    Else it asks for the bucket's region, and again where that is answered by a redirect; and an
    address that is signed for the wrong region is no use.
    """
    context.setdefault("s3_redirect", {})["redirected"] = True


def is_retryable(error: Exception) -> bool:
    """Whether another try may help against one of STORE_ERRORS."""
    client_error = _client_error(error)
    if client_error is not None:
        status = client_error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return code(error) in RETRYABLE_CODES or status in RETRYABLE_STATUSES
    # no answer, or a part of one; what was wrong before anything was sent stays wrong
    return not isinstance(error, ParamValidationError | NoCredentialsError)


def code(error: BaseException) -> str | None:
    """The store's own error code; None if there was no answer."""
    return None if _client_error(error) is None else str(told(error).get("Code") or "")


def told(error: BaseException) -> dict[str, Any]:
    """What the store's answer says of the error: any XML may stand there."""
    client_error = _client_error(error)
    answer: Any = client_error.response.get("Error") if client_error else None
    return answer if isinstance(answer, dict) else {}


def _client_error(error: BaseException) -> ClientError | None:
    """The store's answer behind an error; None if there was none."""
    if isinstance(error, Boto3Error) and error.__context__ is not None:  # an upload's
        error = error.__context__
    return error if isinstance(error, ClientError) else None


def _reason(error: Exception) -> str:
    return str(stores.upload_error(error, code(error)).message)
