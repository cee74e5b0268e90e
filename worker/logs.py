"""The log: one line an event, the job's id on each, no secrets."""

import logging
import sys
import time
from contextvars import ContextVar

from avatar_client.contract.redaction import redact

job_id: ContextVar[str | None] = ContextVar("job_id", default=None)

# At DEBUG these write signed requests, headers and whole answers.
CHATTY = ("boto3", "botocore", "s3transfer", "urllib3", "httpx", "httpcore", "PIL")


def configure(level: str, process: str = "") -> None:
    """Sends all logging of this process to stderr, redacted, one line an event.

    `process` names one that is not the worker itself, on each of its lines.

    Call it before the SDK's import, which sets up the root logger unless somebody has.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(process))
    known = logging.getLevelNamesMapping()
    logging.basicConfig(level=known.get(level, logging.DEBUG), handlers=[handler], force=True)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


class _LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00Z INFO job abc: what happened`, a traceback on the same line."""

    converter = staticmethod(time.gmtime)

    def __init__(self, process: str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self._process = process

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        job = job_id.get()
        subjects = [f"job {job}" if job else "", self._process, record.message]
        record.message = ": ".join(subject for subject in subjects if subject)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        lines = redact(super().format(record)).splitlines()
        return "\\n".join(lines)
