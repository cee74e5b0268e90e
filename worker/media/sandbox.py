"""Runs a function on a client's bytes in a process that can do nothing else.

A template process is started with the worker and forks one for each file (`sandbox_process.py`),
which is killed when the job is stopped, when its time is over, and when it has answered. Nothing
that it says is believed: the answer is bounded, and parsed as numbers and words.
"""

import atexit
import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from avatar_client.contract.job_errors import WorkerFailedError
from worker.media.sandbox_process import BEGUN, OUT_OF_MEMORY, Limits
from worker.settings import bare_environment

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
CHECK_SECONDS = 0.1  # between two looks whether the job was stopped
START_SECONDS = 60.0  # for a template to import the decoders, and for a fork of it
SLOWEST = 3  # seconds that pass in one of processor time, where a machine has much to do
GRACE_SECONDS = 2.0
END_SECONDS = 3.0  # for the template to tell how a process ended
MAX_HEADER_BYTES = 2**16
PIPE_BYTES = 2**20

# Said of the file.
TOO_SLOW = "takes too long to decode"
TOO_BIG = "takes too much memory to decode"
CRASHED = "makes its decoder fail"


class SandboxError(Exception):
    """A file that was given up, in words for the client that follow on the file's name."""


class TemplateLostError(Exception):
    """The template process has ended."""


class _Array(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Literal["uint8", "int16", "float32"]
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**40)]], Field(min_length=1, max_length=3)]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class _Header(BaseModel):
    """What comes before the arrays: facts and their forms, or a failure."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    facts: dict[str, int | float | str | list[str]] = {}
    arrays: Annotated[list[_Array], Field(max_length=4)] = []
    failed: str | None = None
    message: Annotated[str, Field(max_length=3000)] = ""
    field: str | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a process answered: facts, of which the kinds alone have been checked, and arrays."""

    facts: dict[str, int | float | str | list[str]]
    arrays: list[NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Failure:
    """What a process raised: a WorkerError's code, message and field, or another kind."""

    kind: str
    message: str
    field: str | None


class Sandbox:
    """One template process, started when it is first needed and whenever it has ended.

    Its methods are for any thread.

    Args:
        module: what the template imports; its `warm_up` is called there.
    """

    def __init__(self, module: str) -> None:
        self.peak_bytes = 0  # of the process that ended last
        self._module = module
        self._lock = threading.Lock()
        self._template: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        atexit.register(self.close)
        # a forked child of the worker (the SDK's heartbeat) must not keep the template alive
        os.register_at_fork(after_in_child=self._forget)

    @property
    def template_pid(self) -> int | None:
        """Of the template that was started last."""
        return self._template.pid if self._template else None

    def start(self) -> None:
        """Starts the template, unless it runs. Returns before it is ready."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """Ends the template and all that it has forked."""
        with self._lock:
            self._forget()
            if self._template is not None:
                self._template.kill()
                self._template.wait()
                self._template = None

    def run(
        self,
        function: str,
        file: BinaryIO,
        arguments: dict[str, Any],
        limits: Limits,
        check: Callable[[], None],
    ) -> Decoded | Failure:
        """What the function ("module:name") makes of the file, or how it failed.

        `check` may raise to give it up.

        Raises:
            SandboxError: the file took too much time or memory, or ended its process.
            WorkerFailedError: there was no process for it.
        """
        request = {
            "function": function,
            "arguments": arguments,
            "limits": asdict(limits),
        }
        for _ in range(2):  # a template that has ended meanwhile is started anew
            try:
                return self._run_once(request, file, limits, check)
            except TemplateLostError:
                self.close()
        logger.error("the template process of the decoders does not stay alive")
        raise WorkerFailedError("no process could be started to read the file")

    def _run_once(
        self,
        request: dict[str, Any],
        file: BinaryIO,
        limits: Limits,
        check: Callable[[], None],
    ) -> Decoded | Failure:
        reading, writing = os.pipe()
        lifeline, other_end = socket.socketpair()
        with FileIO(reading) as answer, lifeline:
            try:
                self._send(request, [file.fileno(), writing, other_end.fileno()])
            finally:
                os.close(writing)
                other_end.close()
            if sys.platform == "linux":
                with contextlib.suppress(OSError):  # a user has so much of it
                    fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            try:
                return _Answer(answer, check).read(limits)
            except EOFError:
                pass
            finally:
                status = self._end(lifeline)
        if status is None:
            raise TemplateLostError
        raise SandboxError(_how_it_ended(status))

    def _send(self, request: dict[str, Any], descriptors: list[int]) -> None:
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            requests = self._start()
            try:
                sent = socket.send_fds(requests, [line], descriptors)
                requests.sendall(line[sent:])
            except OSError as error:
                raise TemplateLostError from error

    def _start(self) -> socket.socket:
        """The socket that takes requests. Called with the lock held."""
        if self._requests is not None and self._template is not None:
            if self._template.poll() is None:
                return self._requests
            logger.warning("the decoders' template process ended: it is started anew")
            self._requests.close()
        self._requests, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
            "from worker.media.sandbox_process import main; "
            f"main({theirs.fileno()}, {self._module!r})"
        )
        with theirs:
            self._template = subprocess.Popen(  # noqa: S603  # our own module
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=bare_environment(),
            )
        return self._requests

    def _end(self, lifeline: socket.socket) -> int | None:
        """Has the process killed, if it has not ended; the status that it had, if it is known."""
        try:
            lifeline.shutdown(socket.SHUT_WR)
            lifeline.settimeout(END_SECONDS)
            told = json.loads(lifeline.recv(1024) or b"null")
        except OSError:
            return None
        if told is None:
            return None
        self.peak_bytes = int(told["peak_bytes"])
        return int(told["status"])

    def _forget(self) -> None:
        if self._requests is not None:
            self._requests.close()
            self._requests = None


@dataclass(frozen=True, slots=True)
class _Answer:
    """What comes through the pipe of a process that may be anybody's by now."""

    pipe: FileIO
    check: Callable[[], None]

    def read(self, limits: Limits) -> Decoded | Failure:
        """All of it.

        Raises:
            EOFError: the process ended before.
            WorkerFailedError: it has not begun.
            SandboxError: it takes too long, or is no answer.
        """
        try:
            self._bytes(len(BEGUN), time.monotonic() + START_SECONDS)
        except SandboxError:
            raise WorkerFailedError("no process was started to read the file") from None
        end = time.monotonic() + SLOWEST * limits.max_seconds + GRACE_SECONDS
        length = int.from_bytes(self._bytes(4, end), "little")
        if length > MAX_HEADER_BYTES:
            raise SandboxError(CRASHED)
        try:
            header = _Header.model_validate_json(self._bytes(length, end))
        except ValidationError as error:
            logger.warning("no answer of a decoder: %s", error.errors(include_input=False)[:3])
            raise SandboxError(CRASHED) from None
        if header.failed is not None:
            if header.failed == OUT_OF_MEMORY:
                raise SandboxError(TOO_BIG)
            return Failure(header.failed, header.message, header.field)
        if sum(array.num_bytes for array in header.arrays) > limits.answer_bytes:
            raise SandboxError(CRASHED)
        arrays = [
            np.frombuffer(self._bytes(form.num_bytes, end), form.dtype).reshape(form.shape)
            for form in header.arrays
        ]
        return Decoded(header.facts, arrays)

    def _bytes(self, length: int, end: float) -> bytearray:
        content = bytearray(length)
        rest = memoryview(content)
        while rest:
            ready, _, _ = select.select([self.pipe], [], [], CHECK_SECONDS)
            self.check()
            if time.monotonic() > end:
                raise SandboxError(TOO_SLOW)
            if not ready:
                continue
            taken = self.pipe.readinto(rest)
            if not taken:
                raise EOFError
            rest = rest[taken:]
        return content


def _how_it_ended(status: int) -> str:
    """In words, the status of a process that ended without an answer."""
    if status in (-signal.SIGPROF, -signal.SIGXCPU):
        return TOO_SLOW
    if status == -signal.SIGKILL:  # by the kernel, whose memory it was
        return TOO_BIG
    logger.warning("a decoder ended its process with status %d", status)
    return CRASHED
