"""The template process of the sandbox, and the processes that it forks: one for a file.

The template has imported the decoders and nothing of the model, so that a fork of it is ready in
milliseconds. It never reads a client's bytes. What it forks puts up its walls first
(`sandbox_walls.py`), then reads its file, and answers through a pipe: a length, so many bytes of
JSON, the arrays' bytes; before them a byte that says that it has begun.
"""

import gc
import importlib
import json
import logging
import os
import resource
import selectors
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from avatar_client.contract.job_errors import WorkerError
from worker.media import sandbox_walls

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 2**16
NUM_FILES = 5  # standard input, output and error, all of them nothing; the file; the answer
FILE, ANSWER = 3, 4
BEGUN = b"."  # the first byte of each answer: from here on its time counts
OUT_OF_MEMORY = "out of memory"  # kinds of failures that are no WorkerError
UNFORESEEN = "unforeseen"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one file may take.

    Attributes:
        seconds, num_bytes: of processor time and memory, at first; the function may ask for more.
        max_seconds, max_bytes: at most.
        answer_bytes: of the arrays that come back.
    """

    seconds: float
    num_bytes: int
    max_seconds: float
    max_bytes: int
    answer_bytes: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a function in the sandbox gives back."""

    facts: dict[str, Any]  # JSON
    arrays: list[NDArray[Any]] = field(default_factory=list)


class Budget:
    """The time and memory of a process in the sandbox.

    Args:
        seconds: of processor time, whatever else the machine does; then the process is killed.
        num_bytes: of memory, beside what it has now; then a MemoryError is raised.
    """

    def __init__(self, seconds: float, num_bytes: int) -> None:
        self._seconds = 0.0
        self._num_bytes = _address_space()
        self.add(seconds, num_bytes)

    def add(self, seconds: float, num_bytes: int) -> None:
        """More, for a file that turns out to be of a kind that needs it."""
        self._seconds += seconds
        self._num_bytes += num_bytes
        signal.setitimer(signal.ITIMER_PROF, max(self._seconds - time.process_time(), 0.001))
        if sys.platform == "linux":
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (min(self._num_bytes, hard), hard))


def main(control: int, module: str) -> None:
    """Imports the module, then forks a process for each request, until the worker ends.

    A request is a line of JSON with three descriptors: the file, where to write the answer, and a
    socket whose other end the worker closes when it has no more interest.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C means the worker, whose end is this one's
    importlib.import_module(module).warm_up()
    if not sandbox_walls.filters_calls():
        logger.warning("the kernel lets no seccomp filter be set: decoders have one wall less")
    gc.collect()
    gc.freeze()
    children: dict[socket.socket, int] = {}
    with socket.socket(fileno=control) as requests, selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                if ready is requests:
                    lifeline = _start_next(requests, children)
                    if lifeline is None:
                        return  # and the kernel kills what was forked
                    selector.register(lifeline, selectors.EVENT_READ)
                else:
                    selector.unregister(ready)
                    _end(ready, children.pop(ready, None))


def _start_next(
    requests: socket.socket, children: dict[socket.socket, int]
) -> socket.socket | None:
    """Forks a process for the next request; None if there will be none."""
    line, descriptors = b"", []
    while not line.endswith(b"\n"):
        part, more, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 3)
        if not part:
            return None
        line += part
        descriptors += more
    file, answer, lifeline = descriptors
    ends = socket.socket(fileno=lifeline)
    try:
        child = os.fork()
    except OSError as error:
        # Said to the log alone: the worker sees that nothing has begun, which no decoder can feign.
        logger.error("no process can be forked: %s", error)
    else:
        if child == 0:
            _run(json.loads(line), file, answer)
        children[ends] = child
    os.close(file)
    os.close(answer)
    return ends


def _end(lifeline: socket.socket, child: int | None) -> None:
    """Kills a process that has not ended yet, and tells how it ended and what it took."""
    with lifeline:
        if child is None:
            return
        os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        told = {"status": os.waitstatus_to_exitcode(status), "peak_bytes": usage.ru_maxrss * 1024}
        try:
            lifeline.sendall(json.dumps(told).encode())
        except OSError:
            return  # the worker has not waited


def _run(request: dict[str, Any], file: int, answer: int) -> None:
    """Answers one request, in a process of its own. Does not return."""
    status = 1
    try:
        sandbox_walls.end_with_parent()
        _keep_only(file, answer)
        _write(BEGUN)
        module, _, name = request["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        source = os.fdopen(FILE, "rb")
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        limits = Limits(**request["limits"])
        if sys.platform == "linux":
            size = _address_space() + limits.max_bytes
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        seconds = int(limits.max_seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        budget = Budget(limits.seconds, limits.num_bytes)
        sandbox_walls.drop_everything(NUM_FILES)
        _answer(function, source, budget, request["arguments"])
        status = 0
    except BaseException:
        _write(_header({"failed": UNFORESEEN, "message": traceback.format_exc()[-2000:]}))
    finally:
        os._exit(status)


def _answer(function: Any, source: BinaryIO, budget: Budget, arguments: dict[str, Any]) -> None:
    try:
        found: Answer = function(source, budget, **arguments)
        arrays = [np.ascontiguousarray(array) for array in found.arrays]
        kinds = [{"dtype": array.dtype.name, "shape": array.shape} for array in arrays]
        header = _header({"facts": found.facts, "arrays": kinds})
    except MemoryError:
        return _write(_header({"failed": OUT_OF_MEMORY, "message": ""}))
    except WorkerError as error:
        told = {"failed": error.code, "message": error.message, "field": error.field}
        return _write(_header(told))
    _write(header)
    for array in arrays:
        _write(array.reshape(-1).view(np.uint8).data)
    return None


def _header(told: dict[str, Any]) -> bytes:
    content = json.dumps(told).encode()
    return len(content).to_bytes(4, "little") + content


def _write(content: "bytes | memoryview[Any]") -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(ANSWER, rest) :]


def _keep_only(file: int, answer: int) -> None:
    """Leaves the two descriptors, as FILE and ANSWER, and nothing behind the standard ones."""
    nothing = os.open(os.devnull, os.O_RDWR)
    high = [os.dup2(each, 100 + number) for number, each in enumerate((nothing, file, answer))]
    for number in range(FILE):
        os.dup2(high[0], number)
    os.dup2(high[1], FILE)
    os.dup2(high[2], ANSWER)


def _address_space() -> int:
    """Bytes of it that this process has; 0 where nothing says so."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
