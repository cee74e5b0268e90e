"""A job of the queue as checked values, before anything is fetched."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.formats import require_suffix
from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.contract.request import (
    SPEECH_FIELDS,
    VIDEO_FIELDS,
    GenerationParams,
    JobInput,
    S3Config,
    no_bucket_if_empty,
)
from avatar_client.contract.schema import validated
from avatar_client.contract.speakers import PLACE_FIELDS

# 10 MB on /run and 20 MB on /runsync, less room for the rest of the reply (RunPod's limits).
MAX_INLINE_CHARACTERS = {"run": 9_500_000, "runsync": 19_000_000}
MAX_ADDRESS_CHARACTERS = 8192
MAX_SECRETS = 1000  # values of a bucket's settings that are looked at
MIN_SECRET_CHARACTERS = 8  # of a part of an address
PLACE_OF_BUCKET = (
    *("bucketName", "region", "objectPath"),
    *("addressingStyle", "serverSideEncryption", "checksums"),
)


# What of `output` says where and for how long, and nothing of the video.
NOT_OF_THE_VIDEO = {"delivery", "url_expires_seconds", "overwrite"}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Equal for two deliveries of one request; another for any other request, however alike."""

    sent: str  # with the inputs as the client sent them, addresses as such
    content: str | None = None  # with what the inputs are; None until they have been fetched


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
    def fingerprint(self) -> Fingerprint:
        """As far as it is known before anything is fetched."""
        sources = (self.input.image, *(each.audio for each in self.input.voices))
        sent = self._fingerprint([source.digest for source in sources])
        has_addresses = any(source.url is not None for source in sources)
        return Fingerprint(sent, None if has_addresses else sent)

    @property
    def seed(self) -> int:
        """Of the noise; for a request that names none, equal for all workers that may have it."""
        if self.input.seed is not None:
            return self.input.seed
        text = json.dumps(["seed", self.input.request_id or self.job_id])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()) % 2**31

    def fingerprint_with(self, digests: Sequence[str]) -> Fingerprint:
        """The same with the inputs' content. An address may be another at each sending.

        `digests` are those of the portrait and of each recording.
        """
        content = self._fingerprint(digests)
        return Fingerprint(self.fingerprint.sent, content)

    def _fingerprint(self, digests: Sequence[str]) -> str:
        included: dict[str, Any] = {
            **dict.fromkeys((*GenerationParams.model_fields, *SPEECH_FIELDS), True),
            "speakers": {"__all__": PLACE_FIELDS},
            "output": VIDEO_FIELDS,
        }
        params = self.input.model_dump(mode="json", include=included)
        identity: list[Any] = [self.job_id]
        if self.input.request_id is not None:  # whoever sends it again may send another
            output = self.input.output.model_dump(mode="json", exclude=NOT_OF_THE_VIDEO)
            identity = ["request", self.input.request_id, output]
        text = json.dumps([identity, params, digests], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def parse(job: dict[str, Any]) -> JobRequest:
    """A job of the queue as checked values.

    Raises:
        InvalidInputError: a value cannot be served, or not be sent back; names the field.
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
        require_suffix(s3.object_name, output.format, "s3Config.objectPath")
        checked = checked.model_copy(update={"output": output})
    return JobRequest(safe_id(job.get("id")), checked, s3.bucket() if s3 else None)


def secret_values(job: Any) -> set[str]:
    """What of a job no log may show, whatever its keys are called.

    That is all that stands in a bucket's settings but for the bucket's place, and what stands in
    the addresses of the job beside theirs: signatures, names and passwords.
    """
    top: dict[str, Any] = job if isinstance(job, dict) else {}
    given = top.get("input")
    if not isinstance(given, dict):
        given = {}
    buckets = [
        value
        for values in (top, given)
        for name, value in values.items()
        if isinstance(name, str) and re.search("s3|bucket", name, re.IGNORECASE)
    ]
    found = set()
    for text in _texts(buckets):
        found |= _secrets_of_address(text) if text.startswith(("https://", "http://")) else {text}
    output = given.get("output")
    mark = output.get("watermark") if isinstance(output, dict) else None
    speakers = given.get("speakers")
    holders = [given, mark, *(speakers[:MAX_SECRETS] if isinstance(speakers, list) else [speakers])]
    media = [
        each.get(name) for each in holders if isinstance(each, dict) for name in ("image", "audio")
    ]
    for address in (*media, top.get("webhook")):
        if isinstance(address, str) and len(address) <= MAX_ADDRESS_CHARACTERS:
            found |= _secrets_of_address(address)
    return found


def _texts(value: Any) -> Iterator[str]:
    """Each text and number in a value of any shape, but for those that name a bucket's place."""
    waiting = [value]
    for _ in range(MAX_SECRETS):
        if not waiting:
            return
        inner = waiting.pop()
        if isinstance(inner, dict):
            waiting += [each for name, each in inner.items() if name not in PLACE_OF_BUCKET]
        elif isinstance(inner, list):
            waiting += inner
        elif isinstance(inner, str):
            yield inner.strip()[:MAX_ADDRESS_CHARACTERS]
        elif isinstance(inner, int) and abs(inner) < 10**MIN_SECRET_CHARACTERS**2:
            yield str(inner)  # a password of digits; longer ones are refused


def _secrets_of_address(text: str) -> set[str]:
    """The query, and what stands before an `@`, as it was meant and as it may be misread."""
    query = text.partition("?")[2]
    user = text.partition("://")[2].rpartition("@")[0]
    found = {query, user, *re.split("[&=]", query), *re.split("[:/?#@&=]", user)}
    found |= set(map(unquote, found))
    return {part for part in found if len(part) >= MIN_SECRET_CHARACTERS}


def safe_id(job_id: Any) -> str:
    """The job's id if it can stand in a key and a log line, else a fingerprint of it."""
    text = job_id if isinstance(job_id, str) else f"{job_id:x}" if isinstance(job_id, int) else ""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,128}", text):
        return text
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]
