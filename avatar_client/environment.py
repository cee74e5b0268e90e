"""Settings that come from environment variables: those of a bucket, and those of the client."""

import difflib
import os
from collections.abc import Mapping
from typing import ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo

from avatar_client.contract import signature
from avatar_client.contract.bucket import (
    SEVEN_DAYS_SECONDS,
    AddressingStyle,
    BucketSettings,
    Checksums,
    ServerSideEncryption,
)


class FromEnvironment(BaseModel):
    """Settings whose fields are environment variables."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    may_be_empty: ClassVar[tuple[str, ...]] = ()  # fields whose empty variable counts

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """The settings of this process. An empty variable counts as not set, but for a few.

        Raises:
            ValueError: a value is not allowed; the message names the variable, never its value.
        """
        environ = os.environ if environ is None else environ
        names = {name: name.upper() for name in cls.model_fields}
        given = {
            name: _as_named(environ[variable].strip(), cls.model_fields[name])
            for name, variable in names.items()
            if environ.get(variable, "").strip()
            or (name in cls.may_be_empty and variable in environ)
        }
        try:
            return cls.model_validate(cls._completed(given, environ))
        except ValidationError as error:
            problems = "; ".join(f"{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors())
            raise ValueError(f"settings: {problems}") from None

    @classmethod
    def _completed(cls, given: dict[str, str], environ: Mapping[str, str]) -> dict[str, str]:
        """What was given, and what takes the place of what was not."""
        return given


def misspelt(
    settings: type[FromEnvironment], environ: Mapping[str, str] | None = None
) -> list[str]:
    """Variables that nothing reads and that look like one of these settings, each in a sentence."""
    environ = os.environ if environ is None else environ
    known = [name.upper() for name in settings.model_fields]
    sentences = []
    for name in sorted(set(environ) - set(known)):
        # the platform's own are many, and alike
        near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85)
        if near and not name.startswith("RUNPOD_"):
            sentences.append(f"{name} is not read; did you mean {near[0]}?")
    return sentences


def _as_named(value: str, field: FieldInfo) -> str:
    """The value in the letters of the choice that it names: `info` is `INFO`."""
    if get_origin(field.annotation) is not Literal:
        return value
    choices = {choice.casefold(): choice for choice in get_args(field.annotation)}
    return str(choices.get(value.casefold(), value))


class BucketVariables(FromEnvironment):
    """`BUCKET_*`: the bucket of whoever runs this process."""

    may_be_empty: ClassVar[tuple[str, ...]] = ("bucket_prefix",)

    bucket_endpoint_url: str | None = Field(
        default=None,
        description="Address of the S3-compatible store. Empty: `AWS_ENDPOINT_URL_S3`, "
        "`AWS_ENDPOINT_URL`, or AWS itself in `BUCKET_REGION`.",
    )
    bucket_access_key_id: str | None = Field(
        default=None,
        description="Access key of the store. Where no key is set but a bucket, its name or its "
        "region is, all three keys are those of `AWS_*`.",
    )
    bucket_secret_access_key: SecretStr | None = Field(
        default=None, description="Secret key of the store."
    )
    bucket_session_token: SecretStr | None = Field(
        default=None, description="Session token of keys that end, as STS and R2 give them."
    )
    bucket_name: str | None = Field(
        default=None,
        description="The bucket. Empty: the host of the endpoint names it, if the store is known.",
    )
    bucket_region: str | None = Field(
        default=None,
        description="Region of the store. Empty: derived from the endpoint; without one, "
        "`AWS_REGION`.",
    )
    bucket_prefix: str = Field(
        default="avatar",
        description="Folder in the bucket under which every key lies. Set and empty: none.",
    )
    bucket_url_expires_seconds: int = Field(
        default=SEVEN_DAYS_SECONDS,
        ge=1,
        le=SEVEN_DAYS_SECONDS,
        description="Life of a presigned URL, in seconds; at most 7 days.",
    )
    bucket_public_base_url: str | None = Field(
        default=None,
        description="If the bucket is public: the address in front of the key. The result then "
        "carries that URL and no signature.",
    )
    bucket_addressing_style: AddressingStyle = Field(
        default="auto",
        description="How the bucket stands in the address: in the path, or `virtual`ly in the "
        "host. `auto`: in the path, unless the endpoint's host begins with its name.",
    )
    bucket_server_side_encryption: ServerSideEncryption | None = Field(
        default=None,
        description="How the store must encrypt objects, for buckets whose policy demands it.",
    )
    bucket_kms_key_id: str | None = Field(
        default=None, description="Key of `aws:kms` encryption. Empty: the account's own."
    )
    bucket_checksums: Checksums = Field(
        default="when_required",
        description="`when_supported` sends a checksum with each upload, which Object Lock needs "
        "and R2, GCS and old stores refuse.",
    )

    @classmethod
    def _completed(cls, given: dict[str, str], environ: Mapping[str, str]) -> dict[str, str]:
        """With the names that AWS's own tools read as the second choice.

        They count only where a variable of ours says that there is a bucket, since they may be
        there for something else. Keys belong together: none is taken beside one of ours.
        """
        found = dict(given)

        def take(field: str, *variables: str) -> None:
            values = [environ.get(variable, "").strip() for variable in variables]
            if field not in found and any(values):
                found[field] = next(value for value in values if value)

        ours = {name for name in given if name.startswith("bucket_")}
        if not ours & {"bucket_endpoint_url", "bucket_name", "bucket_region"}:
            return found
        take("bucket_endpoint_url", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        if not ours & {"bucket_access_key_id", "bucket_secret_access_key"}:
            take("bucket_access_key_id", "AWS_ACCESS_KEY_ID")
            take("bucket_secret_access_key", "AWS_SECRET_ACCESS_KEY")
            take("bucket_session_token", "AWS_SESSION_TOKEN")
        if "bucket_endpoint_url" not in found:
            take("bucket_region", "AWS_REGION", "AWS_DEFAULT_REGION")
        return found

    @property
    def missing_bucket_variables(self) -> list[str]:
        """What a bucket needs and is not set, if anything of one is."""
        needed = ["bucket_access_key_id", "bucket_secret_access_key"]
        if self.bucket_endpoint_url is None and self.bucket_region is None:
            needed.insert(0, "bucket_endpoint_url")
        given = [name for name in _SIGNS_OF_A_BUCKET if getattr(self, name)]
        return [name.upper() for name in needed if not getattr(self, name)] if given else []

    @property
    def bucket(self) -> BucketSettings | None:
        """The bucket; None if its place or keys are missing."""
        has_place = self.bucket_endpoint_url or (self.bucket_region and self.bucket_name)
        if not (has_place and self.bucket_access_key_id and self.bucket_secret_access_key):
            return None
        return BucketSettings(
            endpoint_url=self.bucket_endpoint_url,
            access_key_id=self.bucket_access_key_id,
            secret_access_key=self.bucket_secret_access_key,
            session_token=self.bucket_session_token,
            name=self.bucket_name,
            region=self.bucket_region,
            addressing_style=self.bucket_addressing_style,
            server_side_encryption=self.bucket_server_side_encryption,
            kms_key_id=self.bucket_kms_key_id,
            checksums=self.bucket_checksums,
            prefix=self.bucket_prefix,
            public_base_url=self.bucket_public_base_url,
        )


# Without these, the others say nothing of a bucket: the Hub's form sends their defaults.
_SIGNS_OF_A_BUCKET = (
    "bucket_endpoint_url",
    "bucket_access_key_id",
    "bucket_secret_access_key",
    "bucket_session_token",
    "bucket_name",
    "bucket_region",
    "bucket_kms_key_id",
    "bucket_server_side_encryption",
    "bucket_public_base_url",
)


class ResultSigning(FromEnvironment):
    """The key that the worker and those who get its results share."""

    result_signing_key: SecretStr | None = Field(
        default=None,
        description="Signs each result, so that whoever has the key knows it for this worker's: 32 "
        "characters or more, as `openssl rand -hex 32` makes them. Empty: no signature.",
    )

    @field_validator("result_signing_key")
    @classmethod
    def _usable(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            signature.require_key(value.get_secret_value())
        return value


class ClientSettings(BucketVariables, ResultSigning):
    """What the command `avatar` finds in the environment."""

    runpod_api_key: SecretStr | None = None
    runpod_endpoint_id: str | None = None  # or the endpoint's base URL
