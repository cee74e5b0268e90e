"""What an endpoint says about a job, as checked values.

Text that comes from outside is made fit for a log and a terminal here: one line, no escape codes,
no queries of URLs.
"""

import contextlib
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
)

from avatar_client.contract import plain_json, preview, signature
from avatar_client.contract.job_errors import WorkerError
from avatar_client.contract.redaction import redact
from avatar_client.contract.request import JobInput
from avatar_client.endpoint_errors import SignatureError

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
MAX_TEXT_CHARACTERS = 1000
MAX_READ_CHARACTERS = 16 * MAX_TEXT_CHARACTERS


def plain(text: Any) -> str:
    """Text of others in one line that can be shown and logged."""
    if not isinstance(text, str):  # whose text may be as large and as deep as an answer
        is_number = isinstance(text, int | float) and abs(text) < 1e18
        text = str(text) if is_number else type(text).__name__
    words = redact(text[:MAX_READ_CHARACTERS]).split()
    line = " ".join(words)[:MAX_TEXT_CHARACTERS]
    return "".join(character for character in line if character.isprintable())


def small_jpeg(value: Any) -> bytes | None:
    """The JPEG of a preview; None where there is none, or something else."""
    with contextlib.suppress(ValueError):
        return preview.read(value)
    return None


Text = Annotated[str, AfterValidator(plain)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Seconds = Annotated[float, Field(ge=0, le=10**9, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running job is; the fields are those that the worker posts."""

    stage: Text
    progress: Annotated[float, Field(ge=0, le=1)]  # never decreasing
    message: Text
    stage_index: Count | None = None
    stage_count: Count | None = None
    step: Count | None = None
    total_steps: Count | None = None
    elapsed_seconds: Seconds | None = None
    eta_seconds: Seconds | None = None
    # a middle frame as it will roughly look: a JPEG; None unless asked for, and at first
    preview: Annotated[bytes | None, BeforeValidator(small_jpeg)] = field(default=None, repr=False)

    @staticmethod
    def parse(output: Any) -> "Progress | None":
        """The progress in the output of a running job; None if it holds none."""
        try:
            return _PROGRESS.validate_python(output)
        except ValidationError:
            return None


_PROGRESS = TypeAdapter(Progress)
_SECONDS = TypeAdapter(Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)])


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed."""

    code: str  # of the README's table; "UNKNOWN" if it was not the worker that said why
    message: str
    field: str | None = None
    retryable: bool = False

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.code, self.field, self.message)))

    @classmethod
    def parse(cls, error: Any, output: Any = None) -> Self:
        """The reason in a failed job: the worker's `error_info` if it came, else its text."""
        info = output.get("error_info") if isinstance(output, dict) else None
        if isinstance(info, dict) and info.keys() >= {"code", "message"}:
            where = info.get("field")
            return cls(
                plain(info["code"]),
                plain(info["message"]),
                plain(where) if where else None,
                info.get("retryable") is True,
            )
        text = _reason(error)
        code, _, rest = text.partition(": ")
        if code not in _RETRYABLE:
            return cls("UNKNOWN", text or "the endpoint gives no reason")
        name, colon, message = rest.partition(": ")
        if colon and name.partition(".")[0] in _FIELDS:
            return cls(code, message, name, _RETRYABLE[code])
        return cls(code, rest, None, _RETRYABLE[code])


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job as the endpoint described it. `output` is the result, once there is one."""

    id: str
    status: str  # IN_QUEUE, IN_PROGRESS, COMPLETED, FAILED, CANCELLED or TIMED_OUT
    progress: Progress | None = None
    output: dict[str, Any] | None = field(default=None, repr=False)  # holds a signed address
    error: JobError | None = None
    delay_seconds: float | None = None  # in the queue
    execution_seconds: float | None = None

    @property
    def is_over(self) -> bool:
        """True once nothing will change any more."""
        return self.status in OVER

    @classmethod
    def parse(cls, body: dict[str, Any], *, signing_key: str | SecretStr | None = None) -> Self:
        """The status in an answer of the endpoint, or in what it posts to a webhook.

        Args:
            signing_key: the endpoint's `RESULT_SIGNING_KEY`. A result must then be signed with it,
                for this very job. What the platform says of a job is not signed.

        Raises:
            SignatureError: it is not; a ValueError, too.
            ValueError: there is no status, or the key is none.
        """
        job_id, status, output = body.get("id"), body.get("status"), body.get("output")
        if not isinstance(job_id, str) or not isinstance(status, str):
            raise ValueError("neither the id nor the status of a job")
        completed = status == "COMPLETED" and isinstance(output, dict)
        if signing_key is not None and status == "COMPLETED":
            if isinstance(signing_key, SecretStr):
                signing_key = signing_key.get_secret_value()
            if (reason := signature.problem(signing_key, job_id, output)) is not None:
                raise SignatureError(reason)
        return cls(
            id=checked_id(job_id),
            status=plain(status),
            progress=None if status in OVER else Progress.parse(output),
            output=output if completed else None,
            error=JobError.parse(body.get("error"), output) if status == "FAILED" else None,
            delay_seconds=_seconds(body.get("delayTime")),
            execution_seconds=_seconds(body.get("executionTime")),
        )


def checked_id(job_id: str) -> str:
    """The id if it can stand in a path.

    Raises:
        ValueError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", job_id):
        raise ValueError(f"{plain(job_id)[:60]!r} is not the id of a job")
    return job_id


def _reason(error: Any) -> str:
    """The text of a failure. What the SDK makes of an exception holds its traceback as well."""
    if isinstance(error, str) and error.startswith("{"):
        with contextlib.suppress(ValueError):
            error = plain_json.read(error.encode())
    if isinstance(error, dict):
        error = error.get("error_message") or error.get("message") or ""
    return plain(error or "")


def _seconds(milliseconds: Any) -> float | None:
    try:
        return _SECONDS.validate_python(milliseconds) / 1000
    except ValidationError:
        return None


def _codes(kind: type[WorkerError]) -> dict[str, bool]:
    """Every code of the tree, and whether a job that failed so may be sent again."""
    codes = {kind.code: kind.retryable} if hasattr(kind, "code") else {}
    for narrower in kind.__subclasses__():
        codes |= _codes(narrower)
    return codes


_RETRYABLE = _codes(WorkerError)
_FIELDS = {info.alias or name for name, info in JobInput.model_fields.items()} | {"input"}
