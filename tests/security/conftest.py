"""A worker that generates nothing, and its log as an operator would read it."""

import asyncio
import base64
import io
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from worker import logs
from worker.service.job import JobRun
from worker.service.worker import Worker
from worker.settings import Settings

SMALL_INPUT = {
    "image": base64.b64encode(b"a portrait").decode(),
    "audio": base64.b64encode(b"a recording").decode(),
}

Handle = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def log() -> Iterator[Callable[[], str]]:
    """What this process has logged and printed, at the level that shows most."""
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    names = [*logs.CHATTY]
    levels = [logging.getLogger(name).level for name in names]
    written, stderr, stdout = io.StringIO(), sys.stderr, sys.stdout
    sys.stderr = sys.stdout = written
    logs.configure("DEBUG")
    try:
        yield written.getvalue
    finally:
        sys.stderr, sys.stdout = stderr, stdout
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Handle:
    """The worker's own way with a job, up to the generation, which answers what it was asked."""

    def execute(run: JobRun, *_: Any) -> dict[str, Any]:
        params = run.request.input
        return {"user_data": params.user_data, "prompt": params.prompt}

    monkeypatch.setattr(JobRun, "execute", execute)
    monkeypatch.setattr(Worker, "_load_once", lambda worker: None)
    worker = Worker(Settings())
    return lambda job: asyncio.run(worker.handle(job))
