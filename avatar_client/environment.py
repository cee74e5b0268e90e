"""Settings that come from environment variables: those of a bucket, and those of the client."""

import os
from collections.abc import Mapping
from typing import Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from avatar_client.contract.bucket import SEVEN_DAYS_SECONDS, BucketSettings


class FromEnvironment(BaseModel):
    """Settings whose fields are environment variables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """The settings of this process. An empty variable counts as not set.

        Raises:
            ValueError: a value is not allowed; the message names the variable, never its value.
        """
        environ = os.environ if environ is None else environ
        names = {name: name.upper() for name in cls.model_fields}
        given = {
            name: _as_named(value, cls.model_fields[name])
            for name, variable in names.items()
            if (value := environ.get(variable, "").strip())
        }
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problems = "; ".join(f"{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors())
            raise ValueError(f"settings: {problems}") from None


def _as_named(value: str, field: FieldInfo) -> str:
    """The value in the letters of the choice that it names: `info` is `INFO`."""
    if get_origin(field.annotation) is not Literal:
        return value
    choices = {choice.casefold(): choice for choice in get_args(field.annotation)}
    return str(choices.get(value.casefold(), value))


class BucketVariables(FromEnvironment):
    """`BUCKET_*`: the bucket of whoever runs this process."""

    bucket_endpoint_url: str | None = Field(
        default=None, description="Address of the S3-compatible store."
    )
    bucket_access_key_id: str | None = Field(default=None, description="Access key of the store.")
    bucket_secret_access_key: SecretStr | None = Field(
        default=None, description="Secret key of the store."
    )
    bucket_name: str | None = Field(
        default=None, description="The bucket. Empty: the host of the endpoint names it."
    )
    bucket_region: str | None = Field(
        default=None, description="Region of the store. Empty: derived from the endpoint."
    )
    bucket_prefix: str = Field(
        default="avatar", description="Folder in the bucket under which every key lies."
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
    bucket_addressing_style: Literal["auto", "path", "virtual"] = Field(
        default="auto", description="How the bucket stands in the address."
    )

    @property
    def missing_bucket_variables(self) -> list[str]:
        """What a bucket needs and is not set, if anything of one is."""
        needed = ("bucket_endpoint_url", "bucket_access_key_id", "bucket_secret_access_key")
        given = [name for name in (*needed, "bucket_name") if getattr(self, name)]
        return [name.upper() for name in needed if not getattr(self, name)] if given else []

    @property
    def bucket(self) -> BucketSettings | None:
        """The bucket; None if endpoint or keys are missing."""
        if not (
            self.bucket_endpoint_url and self.bucket_access_key_id and self.bucket_secret_access_key
        ):
            return None
        return BucketSettings(
            endpoint_url=self.bucket_endpoint_url,
            access_key_id=self.bucket_access_key_id,
            secret_access_key=self.bucket_secret_access_key,
            name=self.bucket_name,
            region=self.bucket_region,
            addressing_style=self.bucket_addressing_style,
            prefix=self.bucket_prefix,
            public_base_url=self.bucket_public_base_url,
        )


class ClientSettings(BucketVariables):
    """What the command `avatar` finds in the environment."""

    runpod_api_key: SecretStr | None = None
    runpod_endpoint_id: str | None = None  # or the endpoint's base URL
