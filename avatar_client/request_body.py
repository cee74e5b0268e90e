"""The body of a request: checked by the worker's own schema before anything is sent.

Files travel inside the body as base64. What the platform does not take in one body goes to a bucket
first, and its address takes its place.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import HttpUrl, TypeAdapter, ValidationError

from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.contract.request import JobInput
from avatar_client.contract.schema import validated
from avatar_client.upload import upload

MAX_BODY_BYTES = 9_990_000  # 10 MB on /run (RunPod's limit), less room for addresses of uploads
MIN_EXECUTION_SECONDS, MAX_EXECUTION_SECONDS = 5.0, 604_800.0  # RunPod's limits

Media = Path | bytes | str


def build_request(
    image: Media,
    audio: Media | None,
    *,
    webhook: str | None,
    execution_timeout_seconds: float,
    input_fields: dict[str, Any],
    uploads: BucketSettings | None,
) -> dict[str, Any]:
    """The JSON body of `/run`. Reads files, and writes to the bucket if it has to.

    `audio` is None where `input_fields` holds `speakers`, whose recordings come in the same forms.

    Raises:
        InvalidInputError: a value that no worker would take; names the field.
        UploadError: the bucket refused a file or did not answer.
    """
    fields = {**input_fields, "image": image}
    if audio is not None:
        fields["audio"] = audio
    inputs = list(_inputs(fields))
    for source in inputs:
        # the schema does not look into a file: one byte stands for it, which is replaced below
        source.place(source.url or "AA==")
    validated(JobInput, fields)
    body: dict[str, Any] = {
        "input": fields,
        "policy": {"executionTimeout": _milliseconds(execution_timeout_seconds)},
    }
    if webhook is not None:
        body["webhook"] = _checked_webhook(webhook)
    room_bytes = MAX_BODY_BYTES - len(encode(body))
    if room_bytes < 0:
        longest = max(inputs, key=lambda source: len(source.url or ""))
        raise InvalidInputError(
            f"does not fit into a request of {MAX_BODY_BYTES} bytes", field=longest.field
        )
    files = [source for source in inputs if source.url is None]
    for source in _too_many(files, room_bytes):
        if uploads is None:
            raise InvalidInputError(
                f"{source.size_bytes} bytes do not fit into a request of {MAX_BODY_BYTES} bytes: "
                "pass an https URL, or give the endpoint a bucket with uploads=BucketSettings(...)",
                field=source.field,
            )
        try:
            source.url = upload(source.content, uploads)
        except OSError as error:
            raise _unreadable(source.field, source.content, error) from None
    for source in inputs:
        source.place(source.url or base64.b64encode(source.read()).decode())
    return body


def encode(body: dict[str, Any]) -> bytes:
    """The body as it is sent.

    Raises:
        InvalidInputError: it holds what JSON does not know.
    """
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError):
        raise InvalidInputError("must be plain JSON", field="input") from None


def _inputs(fields: dict[str, Any]) -> "Iterator[_Input]":
    """The portrait and the recordings, wherever they stand; those of speakers in a copy of them."""
    for name in ("image", "audio"):
        if name in fields:
            yield _Input.of(name, fields[name], fields, name)
    given = fields.get("speakers")
    if not isinstance(given, list | tuple):
        return
    fields["speakers"] = speakers = [
        dict(each) if isinstance(each, Mapping) else each for each in given
    ]
    for index, speaker in enumerate(speakers):
        if isinstance(speaker, dict) and "audio" in speaker:
            yield _Input.of(f"speakers.{index}.audio", speaker["audio"], speaker, "audio")


@dataclass(slots=True)
class _Input:
    """A file of the request, and its place there: an address, or content with its size."""

    field: str
    holder: dict[str, Any]
    key: str
    url: str | None = None
    content: Path | bytes = b""
    size_bytes: int = 0

    @classmethod
    def of(cls, field: str, media: Media, holder: dict[str, Any], key: str) -> "_Input":
        if isinstance(media, str):
            if ":" not in media:
                raise InvalidInputError(
                    'a string must be an https URL or a data: URI; a file is Path("...")',
                    field=field,
                )
            return cls(field, holder, key, url=media)
        if isinstance(media, bytes):
            size_bytes = len(media)
        elif isinstance(media, Path):
            try:
                size_bytes = media.stat().st_size
            except OSError as error:
                raise _unreadable(field, media, error) from None
        else:
            raise InvalidInputError("must be a Path, bytes or a URL", field=field)
        if size_bytes == 0:
            raise InvalidInputError("is empty", field=field)
        return cls(field, holder, key, content=media, size_bytes=size_bytes)

    def place(self, text: str) -> None:
        """Puts what stands for the file into the request."""
        self.holder[self.key] = text

    @property
    def num_characters(self) -> int:
        """As base64."""
        return 4 * -(-self.size_bytes // 3)

    def read(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        try:
            return self.content.read_bytes()
        except OSError as error:
            raise _unreadable(self.field, self.content, error) from None


def _unreadable(field: str, path: object, error: OSError) -> InvalidInputError:
    return InvalidInputError(f"{path} cannot be read: {error.strerror}", field=field)


def _too_many(files: list[_Input], room_bytes: int) -> list[_Input]:
    """Those that have to go so that the others fit into the room; the largest first."""
    kept = sorted(files, key=lambda source: source.size_bytes)
    gone = []
    while kept and sum(source.num_characters for source in kept) > room_bytes:
        gone.append(kept.pop())
    return gone


def _milliseconds(execution_timeout_seconds: float) -> int:
    if not MIN_EXECUTION_SECONDS <= execution_timeout_seconds <= MAX_EXECUTION_SECONDS:
        raise InvalidInputError(
            f"must be {MIN_EXECUTION_SECONDS:g} to {MAX_EXECUTION_SECONDS:g} seconds",
            field="policy.executionTimeout",
        )
    return round(execution_timeout_seconds * 1000)


def _checked_webhook(url: str) -> str:
    try:
        TypeAdapter(HttpUrl).validate_python(url)
    except ValidationError:
        raise InvalidInputError("must be an https URL", field="webhook") from None
    return url
