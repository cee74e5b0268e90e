"""Files to objects of an S3-compatible store, and objects to addresses.

The one place that knows about stores: their endpoints, their regions, and where in a bucket a
job's video lies. The SDK's own upload knows none of the three.
"""

import json
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import boto3.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import (
    InvalidInputError,
    StorageNotConfiguredError,
    UploadError,
    WorkerError,
)
from avatar_client.contract.request import OutputOptions
from worker.media import download

CONNECT_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 60.0
ATTEMPTS = 5
MULTIPART_BYTES = 64 * 2**20  # below it one request, which R2, GCS and old stores all take

FACTS = "avatar-facts"  # the metadata's name; S3 gives 2 KiB to all names and values together
MAX_FACTS_BYTES = 1800

# Hosts of known stores, behind the bucket if it stands there, and the region where none is named.
_HOSTS = {
    r"s3[.-](?:dualstack\.)?(?:(?P<region>[a-z0-9-]+)\.)?amazonaws\.com(?:\.cn)?": "us-east-1",
    r"s3\.(?P<region>[a-z0-9-]+)\.(?:backblazeb2\.com|wasabisys\.com|scw\.cloud)": "us-east-1",
    r"(?P<region>[a-z0-9-]+)\.(?:digitaloceanspaces|your-objectstorage)\.com": "us-east-1",
    r"[0-9a-f]{32}\.(?:[a-z]+\.)?r2\.cloudflarestorage\.com": "auto",
    r"storage\.googleapis\.com": "auto",
}

STORE_ERRORS = (ClientError, BotoCoreError, Boto3Error)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object that is there already."""

    size_bytes: int
    facts: dict[str, Any]  # what `put` was given; empty for an object of other origin


class Storage:
    """One bucket, with what is known of its place.

    The bucket may also stand in the endpoint: in front of the host of a known store, or as its
    path. The consoles of AWS, DigitalOcean and Cloudflare show such addresses.

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
        endpoint = urlsplit(bucket.endpoint_url)
        if endpoint.scheme not in ("https", "http") or not endpoint.hostname:
            raise _unusable(bucket, "the address of the store is no URL")
        name_in_host, region = _read_host(endpoint.hostname)
        path = endpoint.path.strip("/")
        name = bucket.name or name_in_host or path
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise _unusable(bucket, "the bucket has no name")
        host = endpoint.netloc.removeprefix(f"{name_in_host}.")
        self.bucket_name = name
        self._settings = bucket
        self._client = _session().client(
            "s3",
            endpoint_url=f"{endpoint.scheme}://{host}/{'' if path == name else path}",
            region_name=bucket.region or region,
            aws_access_key_id=bucket.access_key_id,
            aws_secret_access_key=bucket.secret_access_key.get_secret_value(),
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": bucket.addressing_style},
                # boto3's own default adds checksums that R2, GCS and old MinIO refuse
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                connect_timeout=CONNECT_TIMEOUT_SECONDS,
                read_timeout=READ_TIMEOUT_SECONDS,
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            ),
        )

    def key(self, output: OutputOptions, job_id: str) -> str:
        """Where the video of a job lies: prefixes, then the key asked for or `<job id>.mp4`."""
        parts = (self._settings.prefix.strip("/"), output.prefix, output.key or f"{job_id}.mp4")
        return "/".join(part for part in parts if part)

    def put(
        self, path: Path, key: str, *, content_type: str, facts: dict[str, Any] | None = None
    ) -> None:
        """Uploads a file. `facts` travels as JSON in the object's metadata.

        Raises:
            UploadError: the store refused or did not answer.
            ValueError: facts of more than 1,800 bytes.
        """
        text = json.dumps(facts or {}, separators=(",", ":"))  # ASCII, as headers must be
        if len(text) > MAX_FACTS_BYTES:
            raise ValueError(f"{len(text)} bytes of facts, over {MAX_FACTS_BYTES}")
        options = {"ContentType": content_type, "Metadata": {FACTS: text}}
        transfer = TransferConfig(multipart_threshold=MULTIPART_BYTES)
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
        return StoredObject(answer["ContentLength"], _facts(answer["Metadata"]))

    def url(self, key: str, expires_seconds: int) -> str:
        """An address from which anyone can GET the object until it expires.

        Of a public bucket (`public_base_url`): the plain address, which does not expire.
        """
        if self._settings.public_base_url:
            return f"{self._settings.public_base_url.rstrip('/')}/{quote(key)}"
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
        if code := _code(error):
            return UploadError(f"the object store answered {code}", field=field)
        message = f"the object store did not answer as it should ({type(error).__name__})"
        return UploadError(message, field=field)


def thumbnail_key(key: str) -> str:
    """Where the thumbnail of the video under `key` lies."""
    return key.removesuffix(".mp4") + ".jpg"


@cache
def _session() -> boto3.session.Session:
    return boto3.session.Session()  # holds the description of S3, which takes 0.1 s to read


def _read_host(host: str) -> tuple[str, str]:
    """The bucket (may be empty) and the region that a store's host names."""
    for pattern, region in _HOSTS.items():
        if match := re.fullmatch(r"(?:(?P<bucket>[a-z0-9.-]+)\.)?" + pattern, host):
            found = match.groupdict(default="")
            return found["bucket"], found.get("region") or region
    return "", "us-east-1"


def _unusable(bucket: BucketSettings, message: str) -> WorkerError:
    if bucket.from_client:
        return InvalidInputError(message, field="s3Config")
    return StorageNotConfiguredError(message)


def _code(error: BaseException) -> str | None:
    """The store's own error code; None if there was no answer."""
    if isinstance(error, Boto3Error) and error.__context__ is not None:  # an upload's
        error = error.__context__
    if not isinstance(error, ClientError):
        return None
    return re.sub(r"[^A-Za-z0-9.]", "", str(error.response["Error"]["Code"]))[:64]


def _facts(metadata: dict[str, str]) -> dict[str, Any]:
    try:
        facts = json.loads(metadata.get(FACTS, "{}"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}
