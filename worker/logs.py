"""The log: one line an event, the job's id on each, no secrets.

Two things take secrets out of a line: `redact` knows their shapes and names, and `hide` is told the
very values, as a secret under a mistyped name has neither. Both work where a line is written, and
all loggers lead to that one handler, so that it makes no difference which library wrote it.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import quote

from avatar_client.contract.redaction import redact

job_id: ContextVar[str | None] = ContextVar("job_id", default=None)

# At DEBUG these write signed requests, headers and whole answers.
CHATTY = ("boto3", "botocore", "s3transfer", "urllib3", "httpx", "httpcore", "PIL")
MIN_HIDDEN_CHARACTERS = 6  # what is shorter would also stand in other words

_hidden: list[frozenset[str]] = []  # of the operator, and of each job that is here


def configure(level: str, process: str = "") -> None:
    """Sends all logging of this process to stderr, redacted, one line an event.

    `process` names one that is not the worker itself, on each of its lines.

    Call it before the SDK's import, which sets up the root logger unless somebody has.
    """
    handler = _Handler(sys.stderr)
    handler.setFormatter(_LineFormatter(process))
    known = logging.getLevelNamesMapping()
    logging.basicConfig(level=known.get(level, logging.DEBUG), handlers=[handler], force=True)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def take_over() -> None:
    """Leads what this process writes by other ways to the same handler.

    Those are the handlers that libraries have given their own loggers, warnings, and exceptions
    that nobody has caught. Call it once the libraries are imported.
    """
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda event: _log_uncaught(
        event.exc_type, event.exc_value, event.exc_traceback
    )


def hide(values: Iterable[str]) -> None:
    """Keeps these values out of the log from now on."""
    _hidden.append(_spellings(values))


@contextmanager
def hiding(values: Iterable[str]) -> Iterator[None]:
    """Keeps these values out of the log while the context is open."""
    spellings = _spellings(values)
    _hidden.append(spellings)
    try:
        yield
    finally:
        _hidden.remove(spellings)


def clean(text: str) -> str:
    """The text without secrets."""
    for value in sorted({each for group in list(_hidden) for each in group}, key=len, reverse=True):
        text = text.replace(value, "...")
    return redact(text)


def _spellings(values: Iterable[str]) -> frozenset[str]:
    """The values as they may stand in a line: plain, in JSON, in Python, in a URL."""
    return frozenset(
        spelled
        for value in values
        if len(value) >= MIN_HIDDEN_CHARACTERS
        for spelled in (
            value,
            json.dumps(value)[1:-1],
            json.dumps(value, ensure_ascii=False)[1:-1],
            repr(value)[1:-1],
            quote(value, safe="", errors="replace"),
        )
    )


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    information: Any = (kind, error, traceback)
    logging.getLogger(__name__).critical("nobody has caught this", exc_info=information)


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Says so, where logging itself would print the event as it is."""
        self.stream.write(f"an event of {record.name} could not be written\n")


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
        lines = clean(super().format(record)).splitlines()
        return "\\n".join(lines)
