"""The log: one line an event, the job's id on each, no secrets."""

import logging
import re
import sys
import time
from contextvars import ContextVar

job_id: ContextVar[str | None] = ContextVar("job_id", default=None)

# At DEBUG these write signed requests, headers and whole answers.
CHATTY = ("boto3", "botocore", "s3transfer", "urllib3", "PIL")

# The whole of any URL, so that each letter is read once however many URLs a hostile text holds.
_URL = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,20}://)(?P<user>[^\s/?@\"'<>]+@)?(?P<path>[^\s?\"'<>]*)"
    r"(?P<query>\?[^\s\"'<>]*)?",
    re.IGNORECASE,
)
_SECRETS = [
    # a signature without its URL, and the header that carries one
    (
        re.compile(r"((?:X-Amz-\w+|X-Goog-\w+|AWSAccessKeyId|Signature|Credential)=)[^\s&,\"'<>]+"),
        r"\1...",
    ),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]+"), r"\1 ..."),
    # a key by its name, in JSON, Python or environment form
    (
        re.compile(
            r"((?:access_?key(?:_?id)?|secret\w{0,30}|access_?id|access_?secret|api_?key|password"
            r"|token)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;}&]+",
            re.IGNORECASE,
        ),
        r"\1...",
    ),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), "..."),
    # media inside a request, or inside a result
    (re.compile(r"[A-Za-z0-9+/_-]{200,}={0,2}"), "<base64>"),
]


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


def redact(text: str) -> str:
    """The text without queries of URLs, access keys, signatures and long base64."""
    text = _URL.sub(_without_query, text)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _without_query(url: re.Match[str]) -> str:
    user, query = ("...@" if url["user"] else ""), ("?..." if url["query"] else "")
    return url["scheme"] + user + url["path"] + query


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
