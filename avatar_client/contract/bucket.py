"""A bucket of an S3-compatible store: how it is named, where it is, and how its store is spoken to.

What the worker's storage and the client's uploads both have to know. boto3 is not imported here:
each of them hands it these values.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ConfigDict, SecretStr

from avatar_client.contract.job_errors import (
    InvalidInputError,
    StorageNotConfiguredError,
    UploadError,
    WorkerError,
)

SEVEN_DAYS_SECONDS = 604_800  # the longest life that S3 gives a presigned URL
CONNECT_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 60.0
ATTEMPTS = 5
MULTIPART_BYTES = 64 * 2**20  # below it one request, which R2, GCS and old stores all take

# Hosts of known stores, behind the bucket if it stands there, and the region where none is named.
_HOSTS = {
    r"s3[.-](?:dualstack\.)?(?:(?P<region>[a-z0-9-]+)\.)?amazonaws\.com(?:\.cn)?": "us-east-1",
    r"s3\.(?P<region>[a-z0-9-]+)\.(?:backblazeb2\.com|wasabisys\.com|scw\.cloud)": "us-east-1",
    r"(?P<region>[a-z0-9-]+)\.(?:digitaloceanspaces|your-objectstorage)\.com": "us-east-1",
    r"[0-9a-f]{32}\.(?:[a-z]+\.)?r2\.cloudflarestorage\.com": "auto",
    r"storage\.googleapis\.com": "auto",
}


class BucketSettings(BaseModel):
    """Where objects go: one bucket of an S3-compatible store, and the keys to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint_url: str
    access_key_id: str
    secret_access_key: SecretStr
    name: str | None = None  # None: the endpoint's host names it
    region: str | None = None  # None: derived from the endpoint
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    prefix: str = ""
    public_base_url: str | None = None
    from_client: bool = False  # True: the address came with the job and must be checked

    def key(self, *parts: str | None) -> str:
        """The key of an object below the bucket's prefix; empty parts are left out."""
        return "/".join(part for part in (self.prefix.strip("/"), *parts) if part)

    def public_url(self, key: str) -> str | None:
        """The address of an object that anyone may read; None if the bucket is not public."""
        base_url = self.public_base_url
        return f"{base_url.rstrip('/')}/{quote(key)}" if base_url else None


@dataclass(frozen=True, slots=True)
class BucketLocation:
    """A bucket's place, each of its parts known."""

    endpoint_url: str  # of the store, without the bucket
    region: str
    name: str


def locate(bucket: BucketSettings) -> BucketLocation:
    """The place of a bucket.

    Its name may also stand in the endpoint: in front of the host of a known store, or as the path.
    The consoles of AWS, DigitalOcean and Cloudflare show such addresses.

    Raises:
        InvalidInputError: a client's bucket whose endpoint or name is no use.
        StorageNotConfiguredError: the same of any other bucket.
    """
    endpoint = urlsplit(bucket.endpoint_url)
    if endpoint.scheme not in ("https", "http") or not endpoint.hostname:
        raise _unusable(bucket, "the address of the store is no URL")
    name_in_host, region = _read_host(endpoint.hostname)
    path = endpoint.path.strip("/")
    name = bucket.name or name_in_host or path
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise _unusable(bucket, "the bucket has no name")
    host = endpoint.netloc.removeprefix(f"{name_in_host}.")
    return BucketLocation(
        endpoint_url=f"{endpoint.scheme}://{host}/{'' if path == name else path}",
        region=bucket.region or region,
        name=name,
    )


def client_arguments(bucket: BucketSettings) -> dict[str, Any]:
    """What `Session.client` of boto3 takes for this bucket, beside `config`.

    Raises:
        InvalidInputError, StorageNotConfiguredError: see `locate`.
    """
    location = locate(bucket)
    return {
        "endpoint_url": location.endpoint_url,
        "region_name": location.region,
        "aws_access_key_id": bucket.access_key_id,
        "aws_secret_access_key": bucket.secret_access_key.get_secret_value(),
    }


def client_config(bucket: BucketSettings) -> dict[str, Any]:
    """What `Config` of botocore takes for this bucket."""
    return {
        "signature_version": "s3v4",
        "s3": {"addressing_style": bucket.addressing_style},
        # boto3's own default adds checksums that R2, GCS and old MinIO refuse
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "read_timeout": READ_TIMEOUT_SECONDS,
        "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
    }


def upload_error(
    error: Exception, code: str | None = None, *, field: str | None = None
) -> UploadError:
    """What is told of a failed call of a store.

    Args:
        error: boto3's.
        code: the store's own, which is the store's text; None if there was no answer.
        field: of the request, if that named the bucket.
    """
    if code is None:
        kind = type(error).__name__
        return UploadError(f"the object store did not answer as it should ({kind})", field=field)
    plain = re.sub(r"[^A-Za-z0-9.]", "", code)[:64]
    return UploadError(f"the object store answered {plain}", field=field)


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
