"""A bucket of an S3-compatible store, as an operator or a client names it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, SecretStr

SEVEN_DAYS_SECONDS = 604_800  # the longest life that S3 gives a presigned URL


class BucketSettings(BaseModel):
    """Where videos go: one bucket of an S3-compatible store, and the keys to it."""

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
