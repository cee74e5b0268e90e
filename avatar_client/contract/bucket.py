"""A bucket of an S3-compatible store: how it is named, where it is, and how its store is spoken to.

What the worker's storage and the client's uploads both have to know. boto3 is not imported here:
each of them hands it these values, by `bucket_session`.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ConfigDict, SecretStr

from avatar_client.contract.job_errors import (
    InvalidInputError,
    StorageNotConfiguredError,
    StoreRefusedError,
    UploadError,
    WorkerError,
)

SEVEN_DAYS_SECONDS = 604_800  # the longest life that S3 gives a presigned URL
CONNECT_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 60.0
ATTEMPTS = 5
MULTIPART_BYTES = 64 * 2**20  # below it one request, which R2, GCS and old stores all take

AddressingStyle = Literal["auto", "path", "virtual"]
ServerSideEncryption = Literal["AES256", "aws:kms", "aws:kms:dsse"]
Checksums = Literal["when_required", "when_supported"]

# Hosts of known stores, behind the bucket if it stands there, and the region where none is named.
_HOSTS = {
    r"s3-accelerate(?:\.dualstack)?\.amazonaws\.com": "us-east-1",
    r"s3[.-](?:dualstack\.)?(?:(?P<region>[a-z0-9-]+)\.)?amazonaws\.com(?:\.cn)?": "us-east-1",
    r"s3\.(?P<region>[a-z0-9-]+)\.(?:backblazeb2\.com|wasabisys\.com|scw\.cloud)": "us-east-1",
    r"(?P<region>[a-z0-9-]+)\.cdn\.digitaloceanspaces\.com": "us-east-1",
    r"(?P<region>[a-z0-9-]+)\.(?:digitaloceanspaces|your-objectstorage)\.com": "us-east-1",
    r"s3\.(?P<region>[a-z0-9-]+)\.(?:(?:io|perf)\.)?cloud\.ovh\.(?:net|us)": "us-east-1",
    r"s3[.-](?P<region>[a-z0-9-]+)\.ionoscloud\.com": "de",
    r"sos-(?P<region>[a-z0-9-]+)\.exo\.io": "us-east-1",
    r"[0-9a-f]{32}\.(?:[a-z]+\.)?r2\.cloudflarestorage\.com": "auto",
    r"storage\.googleapis\.com": "auto",
}
_REGION_NAMES = {("ionoscloud.com", "eu-central-1"): "de"}  # where the host's word is not the name
_REGION_CODES = {
    *("AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "301", "307"),
    *("IllegalLocationConstraintException", "InvalidRegion"),
}
_RUNPOD_VOLUME = re.compile(r"s3api-[a-z0-9-]+\.runpod\.io")
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63})*|[0-9a-f:.]+")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
# Suffixes that make botocore choose a host of AWS by itself: directory buckets and outposts.
_OTHER_HOSTS = re.compile(r".*--[a-z]+-s3")


class BucketSettings(BaseModel):
    """Where objects go: one bucket of an S3-compatible store, and the keys to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    endpoint_url: str | None = None  # None: AWS, in the region
    access_key_id: str
    secret_access_key: SecretStr
    session_token: SecretStr | None = None  # of keys that end, as STS and R2 give them
    name: str | None = None  # None: the endpoint's host names it
    region: str | None = None  # None: derived from the endpoint
    addressing_style: AddressingStyle = "auto"
    server_side_encryption: ServerSideEncryption | None = None  # None: as the bucket is set up
    kms_key_id: str | None = None
    checksums: Checksums = "when_required"  # not of R2, GCS and old MinIO, which refuse them
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
    addressing_style: Literal["path", "virtual"] = "path"

    @property
    def host(self) -> str:
        """The one host that is spoken to, with its port if the endpoint names one."""
        host = urlsplit(self.endpoint_url).netloc
        return host if self.addressing_style == "path" else f"{self.name}.{host}"


def locate(bucket: BucketSettings) -> BucketLocation:
    """The place of a bucket.

    Its name may also stand in the endpoint: in front of the host of a known store, or as the path.
    The consoles of AWS, DigitalOcean and Cloudflare show such addresses. In front of another host
    it counts where the bucket's own name is given beside it: the address then stays as it is, since
    the store may know no other. `addressing_style="path"` says that it is no bucket.

    Raises:
        InvalidInputError: a client's bucket whose endpoint or name is no use.
        StorageNotConfiguredError: the same of any other bucket.
    """
    endpoint = _endpoint(bucket)
    host = endpoint.hostname or ""
    if _RUNPOD_VOLUME.fullmatch(host):
        message = (
            "RunPod's network volumes have no presigned URLs, so nobody could fetch the video; "
            "name a bucket of another store"
        )
        raise _unusable(bucket, message, "endpoint_url")
    name_in_host, region = _read_host(host)
    path = endpoint.path.strip("/")
    name = bucket.name or name_in_host or path
    if not _NAME.fullmatch(name) or _OTHER_HOSTS.fullmatch(name):
        message = "the bucket has no name" if not name else "the bucket's name is none"
        raise _unusable(bucket, f"{message}; give the bucket's plain name", "name")
    is_in_other_host = host.startswith(f"{name}.") and not _is_known(host)
    style = bucket.addressing_style
    if style == "auto":
        style = "virtual" if is_in_other_host or ".s3-accelerate." in f".{host}" else "path"
    elif style == "path":
        is_in_other_host = False
    prefix = f"{name_in_host}." if name_in_host else f"{name}." if is_in_other_host else ""
    netloc = endpoint.netloc.lower().removeprefix(prefix)
    netloc = netloc.replace(".cdn.digitaloceanspaces.", ".digitaloceanspaces.")  # only serves
    if netloc == "s3.amazonaws.com" and bucket.region:  # else each answer leads to the region's
        netloc = f"s3.{bucket.region}.amazonaws.com"
    return BucketLocation(
        endpoint_url=f"{endpoint.scheme}://{netloc}/{'' if path == name else path}",
        region=bucket.region or region,
        name=name,
        addressing_style=style,
    )


def client_arguments(bucket: BucketSettings) -> dict[str, Any]:
    """What `Session.client` of boto3 takes for this bucket, beside `config`.

    Raises:
        InvalidInputError, StorageNotConfiguredError: see `locate`.
    """
    location = locate(bucket)
    token = bucket.session_token
    return {
        "endpoint_url": location.endpoint_url,
        "region_name": location.region,
        "aws_access_key_id": bucket.access_key_id,
        "aws_secret_access_key": bucket.secret_access_key.get_secret_value(),
        "aws_session_token": token.get_secret_value() if token else None,
    }


def client_config(bucket: BucketSettings) -> dict[str, Any]:
    """What `Config` of botocore takes for this bucket.

    Raises:
        InvalidInputError, StorageNotConfiguredError: see `locate`.
    """
    return {
        "signature_version": "s3v4",
        "s3": {"addressing_style": locate(bucket).addressing_style},
        # boto3's own default adds checksums that R2, GCS and old MinIO refuse
        "request_checksum_calculation": bucket.checksums,
        "response_checksum_validation": "when_required",
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "read_timeout": READ_TIMEOUT_SECONDS,
        "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
    }


def upload_options(bucket: BucketSettings, content_type: str) -> dict[str, Any]:
    """What each upload into this bucket says, as `ExtraArgs` of boto3. Never an ACL."""
    kind = bucket.server_side_encryption
    options = {
        "ContentType": content_type,
        "ServerSideEncryption": kind or ("aws:kms" if bucket.kms_key_id else None),
        "SSEKMSKeyId": bucket.kms_key_id,
    }
    return {name: value for name, value in options.items() if value}


def upload_error(
    error: Exception, code: str | None = None, *, field: str | None = None, is_final: bool = False
) -> UploadError:
    """What is told of a failed call of a store.

    Args:
        error: boto3's.
        code: the store's own, which is the store's text; None if there was no answer.
        field: of the request, if that named the bucket. Then it is not told what was wrong with
            the connection: the client chose where it leads.
        is_final: whether the store would say the same again.
    """
    if code is None:
        kind = "" if field else f" ({type(error).__name__})"
        return UploadError(f"the object store did not answer as it should{kind}", field=field)
    plain = re.sub(r"[^A-Za-z0-9.]", "", code)[:64] or "an error"
    hint = "; the bucket is in another region than the one that was told" * (plain in _REGION_CODES)
    kind_of_error = StoreRefusedError if is_final else UploadError
    return kind_of_error(f"the object store answered {plain}{hint}", field=field)


def _endpoint(bucket: BucketSettings) -> Any:
    """The parts of the endpoint's address."""
    address = bucket.endpoint_url
    if not address:
        if not bucket.region:
            raise _unusable(bucket, "needs an address, or for AWS a region", "endpoint_url")
        end = ".cn" if bucket.region.startswith("cn-") else ""
        address = f"https://s3.{bucket.region}.amazonaws.com{end}"
    problem = "is no address of a store: https:// and a host"
    try:
        endpoint = urlsplit(address)
        host, _ = endpoint.hostname or "", endpoint.port
    except ValueError:  # a port, brackets
        raise _unusable(bucket, problem, "endpoint_url") from None
    is_plain = not (endpoint.username or endpoint.password or endpoint.query or endpoint.fragment)
    if endpoint.scheme not in ("https", "http") or not is_plain or not _HOST.fullmatch(host):
        raise _unusable(bucket, problem, "endpoint_url")
    return endpoint


def _read_host(host: str) -> tuple[str, str]:
    """The bucket (may be empty) and the region that a store's host names."""
    for pattern, region in _HOSTS.items():
        if match := re.fullmatch(r"(?:(?P<bucket>[a-z0-9.-]+)\.)?" + pattern, host):
            found = match.groupdict(default="")
            named = found.get("region") or region
            store = ".".join(host.split(".")[-2:])
            return found["bucket"], _REGION_NAMES.get((store, named), named)
    return "", "us-east-1"


def _is_known(host: str) -> bool:
    return any(re.fullmatch(r"(?:[a-z0-9.-]+\.)?" + pattern, host) for pattern in _HOSTS)


_FIELDS = {"endpoint_url": "endpointUrl", "name": "bucketName"}
_VARIABLES = {"endpoint_url": "BUCKET_ENDPOINT_URL", "name": "BUCKET_NAME"}


def _unusable(bucket: BucketSettings, message: str, part: str) -> WorkerError:
    if bucket.from_client:
        return InvalidInputError(message, field=f"s3Config.{_FIELDS[part]}")
    return StorageNotConfiguredError(f"{_VARIABLES[part]}: {message}")
