"""Files to objects of an S3-compatible store, and objects to addresses.

The one place of the worker that speaks to a store. How stores differ, and where in a bucket an
object lies, is `avatar_client.contract.bucket`'s to say.
"""

import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import boto3.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from avatar_client.contract import bucket as stores
from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import UploadError
from avatar_client.contract.request import OutputOptions
from worker.media import download

METADATA_NAME = "avatar-metadata"  # S3 gives 2 KiB to all names and values together
MAX_METADATA_BYTES = 1800

STORE_ERRORS = (ClientError, BotoCoreError, Boto3Error)


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
        self._client = _session().client(
            "s3", config=Config(**stores.client_config(bucket)), **stores.client_arguments(bucket)
        )

    def key(self, output: OutputOptions, job_id: str) -> str:
        """Where the video of a job lies: prefixes, then the key asked for or `<job id>.mp4`."""
        return self._settings.key(output.prefix, output.key or f"{job_id}.mp4")

    def put(
        self, path: Path, key: str, *, content_type: str, metadata: dict[str, Any] | None = None
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
        try:
            self._client.upload_file(
                str(path), self.bucket_name, key, ExtraArgs=options, Config=transfer
            )
        except STORE_ERRORS as error:
            raise self._failure(error) from error

    def head(self, key: str) -> StoredObject | None:
        """The object under the key, or None.

        Raises:
            UploadError: the store refused the credentials or did not answer.
        """
        try:
            answer = self._client.get_object(Bucket=self.bucket_name, Key=key)
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

    def check(self) -> None:
        """Returns if endpoint, region and credentials work together; writes nothing.

        A bucket that may be written but not listed denies access to the key that is asked for:
        then it is not proven that the bucket exists. The right to write is never proven.

        Raises:
            UploadError: they do not.
        """
        self.head(self.key(OutputOptions(), f"check-{uuid.uuid4()}"))

    def _failure(self, error: Exception) -> UploadError:
        field = "s3Config" if self._settings.from_client else None
        return stores.upload_error(error, _code(error), field=field)


def thumbnail_key(key: str) -> str:
    """Where the thumbnail of the video under `key` lies."""
    return key.removesuffix(".mp4") + ".jpg"


@cache
def _session() -> boto3.session.Session:
    return boto3.session.Session()  # holds the description of S3, which takes 0.1 s to read


def _code(error: BaseException) -> str | None:
    """The store's own error code; None if there was no answer."""
    if isinstance(error, Boto3Error) and error.__context__ is not None:  # an upload's
        error = error.__context__
    if not isinstance(error, ClientError):
        return None
    return str(error.response["Error"]["Code"])


def _parse_metadata(values: dict[str, str]) -> dict[str, Any]:
    try:
        metadata = json.loads(values.get(METADATA_NAME, "{}"))
    except ValueError:
        return {}
    return metadata if isinstance(metadata, dict) else {}
