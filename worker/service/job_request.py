"""A job of the queue as checked values, before anything is fetched."""

import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.contract.request import (
    GenerationParams,
    JobInput,
    S3Config,
    no_bucket_if_empty,
    validated,
)

# 10 MB on /run and 20 MB on /runsync, less room for the rest of the reply (RunPod's limits).
MAX_INLINE_CHARACTERS = {"run": 9_500_000, "runsync": 19_000_000}


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One checked job."""

    job_id: str
    input: JobInput
    bucket: BucketSettings | None  # the client's own; None: the operator's, if there is one

    @property
    def max_inline_characters(self) -> int:
        """How long an inline video may be: ids of /runsync begin with `sync-`."""
        return MAX_INLINE_CHARACTERS["runsync" if self.job_id.startswith("sync-") else "run"]

    @property
    def fingerprint(self) -> str:
        """Equal for two deliveries of one job; another for any other job, however alike."""
        params = self.input.model_dump(mode="json", include=set(GenerationParams.model_fields))
        sources = [self.input.image.digest, self.input.audio.digest]
        text = json.dumps([self.job_id, params, sources], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def parse(job: dict[str, Any]) -> JobRequest:
    """A job of the queue as checked values.

    Raises:
        InvalidInputError: a value cannot be served; names the field.
        InputUrlBlockedError: an input names an address that is never fetched.
    """
    raw = job.get("input")
    if not isinstance(raw, dict):
        raise InvalidInputError("must be an object", field="input")
    checked = validated(JobInput, raw)
    top_level = no_bucket_if_empty(job.get("s3Config"))
    s3 = checked.s3_config if top_level is None else validated(S3Config, top_level, "s3Config.")
    if s3 is not None and s3.object_name is not None and checked.output.key is None:
        output = checked.output.model_copy(update={"key": s3.object_name})
        checked = checked.model_copy(update={"output": output})
    return JobRequest(safe_id(job.get("id")), checked, s3.bucket() if s3 else None)


def draw_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbelow(2**31)


def safe_id(job_id: Any) -> str:
    """The job's id if it can stand in a key and a log line, else a fingerprint of it."""
    text = str(job_id)
    if re.fullmatch(r"[A-Za-z0-9_-]{1,128}", text):
        return text
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]
