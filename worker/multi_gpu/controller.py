"""The other GPUs of this worker: a process for each, started, watched and ended by the worker.

A process loads the model onto its GPU (`rank_process.py`), joins the group and follows each job
that the worker generates. Small words go over a pipe to each: a job's header, "the step begins",
"the job is over"; tensors go from GPU to GPU (`process_group.py`). Between two jobs a process
sleeps at its pipe and keeps its GPU idle. The end of the pipe is its end too, so none outlives the
worker, however that ends.

A thread of the worker watches: a process that ends, that says that it failed, that is silent, or
that leaves the worker's own GPU waiting is the loss of the whole team. The thread that generates
may then wait for ever; `hopeless` says so to whoever waits for it.
"""

import contextlib
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from avatar_client.contract.job_errors import GpuFaultError, OutOfMemoryError, WorkerError
from avatar_client.contract.request import GenerationParams
from worker import logs
from worker.multi_gpu.process_group import Group, GroupSharing, Sharing, outline
from worker.settings import Settings, keep_to_this_machine

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
FOLLOWER = "worker.multi_gpu.rank_process"  # its `main(descriptor)` is what a process runs

BEAT_SECONDS = 1.0  # how often a process says that it lives
SILENT_SECONDS = 60.0  # without a beat a process is stopped; more than any call keeps it from one
LAGGING_SECONDS = 180.0  # for another GPU's velocity; more than compiling takes
GRACE_SECONDS = 2.0  # for a thread to notice by itself that another process is lost
JOIN_SECONDS = 120.0  # to meet, and to find the ways between GPUs
LEAVE_SECONDS = 5.0  # before a process that should end is killed

# A forked child of the worker (the SDK's heartbeat) must not keep the pipes open.
_pipes: "weakref.WeakSet[Connection]" = weakref.WeakSet()


def _close_pipes() -> None:
    for pipe in list(_pipes):
        with contextlib.suppress(OSError):
            pipe.close()


os.register_at_fork(after_in_child=_close_pipes)


@dataclass(frozen=True, slots=True)
class Start:
    """To a process, first: who it is."""

    settings: Settings
    rank: int
    num_processes: int
    device: torch.device
    rendezvous: Path


@dataclass(frozen=True, slots=True)
class Job:
    """To a process: what to generate together. The tensors come afterwards, from GPU to GPU."""

    job_id: str | None
    conditioning: Any  # outlines in the place of tensors
    params: GenerationParams
    seed: int
    num_sides: int


class Word(Enum):
    """What else the pipes carry."""

    JOIN = auto()  # to a process: all have loaded, now meet
    STEP = auto()  # to a process: the next step begins
    END = auto()  # to a process: the job is over, or was ended
    LOADED = auto()  # from a process
    JOINED = auto()  # from a process
    BEAT = auto()  # from a process


@dataclass(frozen=True, slots=True)
class Failure:
    """From a process, last: why it ends."""

    reason: str  # for the log
    out_of_memory: bool

    def as_error(self) -> WorkerError:
        """What the client of the job is told."""
        if self.out_of_memory:
            return OutOfMemoryError("the memory of a GPU is too small for this resolution")
        return GpuFaultError("one of the GPUs that work together failed")


@dataclass(slots=True)
class _Member:
    """One of the other processes."""

    rank: int
    process: "subprocess.Popen[bytes]"
    pipe: Connection
    heard_at: float | None = None  # None: it is still importing
    said: Word | None = None  # last, beats aside


class Team:
    """The processes of the other GPUs. Its methods are for one thread, but for the properties.

    Starts the processes and returns at once; `join` waits for them.

    Args:
        settings: the worker's.
        devices: one for each process; the first is the worker's own.
    """

    def __init__(self, settings: Settings, devices: list[torch.device]) -> None:
        keep_to_this_machine()
        self.num_processes = len(devices)
        self._device = devices[0]
        self._directory = tempfile.TemporaryDirectory(prefix="avatar-team-")
        self._rendezvous = Path(self._directory.name) / "rendezvous"
        self._group: Group | None = None
        self._sharing: GroupSharing | None = None  # of the running job
        self._changed = threading.Condition()
        self._failure: Failure | None = None
        self._failed_at = 0.0
        self._closing = False
        self._members = [_start_member(rank) for rank in range(1, len(devices))]
        for member in self._members:
            rank = member.rank
            start = Start(settings, rank, len(devices), devices[rank], self._rendezvous)
            with contextlib.suppress(OSError):  # it has ended: the watch says so
                member.pipe.send(start)
        self._watch = threading.Thread(target=self._watch_members, name="team", daemon=True)
        self._watch.start()

    def join(self, transformer: Any, patience_seconds: float) -> None:
        """Returns when each process has loaded its model and met the others.

        Args:
            transformer: this process's, which may have to share its passes.
            patience_seconds: how long to wait for their models.

        Raises:
            RuntimeError: a process failed or was too slow; says which and why.
        """
        self._await(Word.LOADED, patience_seconds)
        self._tell(Word.JOIN)
        deadline = time.monotonic() + JOIN_SECONDS
        self._group = Group(0, self.num_processes, self._rendezvous, self._device)
        self._group.check(lambda: self._failure is not None or time.monotonic() > deadline)
        self._group.share_tokens(transformer)
        self._await(Word.JOINED, max(0.0, deadline - time.monotonic()))

    def num_workers(self, num_sides: int) -> int:
        """How many processes compute so many sides of the guidance."""
        assert self._group is not None
        return len(self._group.ranks(num_sides))

    @contextlib.contextmanager
    def job(
        self, conditioning: Any, params: GenerationParams, seed: int, num_sides: int
    ) -> Iterator[Sharing]:
        """A job in all processes that its sides need. An exception ends it in them, too.

        One that comes between two steps leaves the team whole; after any other the processes may
        wait for each other for ever, and the team is lost.

        Raises:
            WorkerError: another process was lost.
        """
        assert self._group is not None
        if self.num_workers(num_sides) == 1:
            yield Sharing()
            return
        ranks = self._group.ranks(num_sides)
        sharing = GroupSharing(self._group, num_sides, lambda: self._begin_step(ranks))
        self._sharing = sharing
        try:
            self._require_whole()
            params = GenerationParams(  # without a job's pictures and sounds
                **{name: getattr(params, name) for name in GenerationParams.model_fields}
            )
            header = Job(logs.job_id.get(), outline(conditioning), params, seed, num_sides)
            self._tell(header, ranks)
            self._group.send(conditioning, num_sides)
            yield sharing
            self._finish()
        except BaseException as error:
            loss = self._loss_behind(error) if sharing.in_step else None
            if loss is not None:
                raise loss from error
            raise
        finally:
            self._sharing = None
            self._tell(Word.END, ranks)

    def _begin_step(self, ranks: range) -> None:
        self._require_whole()
        self._tell(Word.STEP, ranks)

    def _require_whole(self) -> None:
        if self._failure is not None:
            raise self._failure.as_error()

    def _finish(self) -> None:
        """Waits for the last step, so that a process that fails in it fails this job."""
        assert self._sharing is not None
        self._sharing.in_step = True
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def _loss_behind(self, error: BaseException) -> WorkerError | None:
        """The loss of another process that led to an error inside a step; None: it came first."""
        with self._changed:  # the watch may hear of it a little later than the thread
            self._changed.wait_for(lambda: self._failure is not None, GRACE_SECONDS)
        if self._failure is not None:
            return self._failure.as_error()
        self._lose(Failure(f"the worker's own process failed in a step: {error!r}", False))
        return None

    @property
    def is_lost(self) -> bool:
        """Whether a process is lost: the worker must end, and be started anew."""
        return self._failure is not None

    @property
    def hopeless(self) -> WorkerError | None:
        """The error of a job whose thread waits in vain for a lost process."""
        failure = self._failure
        late = time.monotonic() - self._failed_at > GRACE_SECONDS
        sharing = self._sharing
        waits = sharing is not None and sharing.in_step
        return failure.as_error() if failure is not None and waits and late else None

    def close(self) -> None:
        """Ends the processes."""
        if self._closing:
            return
        self._closing = True
        self._watch.join()  # it reads the pipes
        for member in self._members:
            member.pipe.close()
        deadline = time.monotonic() + LEAVE_SECONDS
        for member in self._members:
            try:
                member.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
        if self._group is not None:
            self._group.close()
        self._directory.cleanup()

    def _tell(self, message: object, ranks: range | None = None) -> None:
        for member in self._members:
            if ranks is None or member.rank in ranks:
                with contextlib.suppress(OSError):  # it has ended: the watch says so
                    member.pipe.send(message)

    def _await(self, word: Word, patience_seconds: float) -> None:
        """Returns when each process has said the word."""

        def is_over() -> bool:
            return self._failure is not None or all(m.said is word for m in self._members)

        with self._changed:
            in_time = self._changed.wait_for(is_over, patience_seconds)
        if self._failure is not None:
            raise RuntimeError(self._failure.reason)
        if not in_time:
            silent = ", ".join(str(m.rank) for m in self._members if m.said is not word)
            raise RuntimeError(f"GPU {silent}: not ready after {patience_seconds:.0f} s")

    def _lose(self, failure: Failure) -> None:
        with self._changed:
            if self._failure is None and not self._closing:
                self._failed_at = time.monotonic()
                self._failure = failure
                logger.error("%s", failure.reason)
            self._changed.notify_all()

    def _watch_members(self) -> None:
        """Listens to the processes until the first loss, or the end."""
        awaited, since = None, time.monotonic()
        pipes = {member.pipe: member for member in self._members}
        while not self._closing and self._failure is None:
            for pipe in wait(list(pipes), timeout=BEAT_SECONDS):
                self._hear(pipes[pipe])  # type: ignore[index]
            now = time.monotonic()
            for member in self._members:
                if member.heard_at and now - member.heard_at > SILENT_SECONDS:
                    member.process.kill()
                    self._lose(Failure(f"GPU {member.rank}: no sign of life", False))
            sharing = self._sharing
            waits_for = None
            with contextlib.suppress(RuntimeError):  # of this process's GPU: its thread tells
                waits_for = sharing.awaited() if sharing is not None else None
            if waits_for is None or waits_for is not awaited:
                awaited, since = waits_for, now
            elif now - since > LAGGING_SECONDS:
                self._lose(Failure("a GPU does not send what it should compute", False))

    def _hear(self, member: _Member) -> None:
        try:
            message = member.pipe.recv()
        except (EOFError, OSError):
            self._lose(Failure(f"GPU {member.rank}: its process {_ended(member.process)}", False))
            return
        member.heard_at = time.monotonic()
        if isinstance(message, Failure):
            self._lose(message)
        elif message is not Word.BEAT:
            with self._changed:
                member.said = message
                self._changed.notify_all()


def _start_member(rank: int) -> _Member:
    ours, theirs = multiprocessing.Pipe()
    _pipes.add(ours)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {FOLLOWER} import main; "
    with theirs:
        process = subprocess.Popen(  # noqa: S603  # our own module
            [sys.executable, "-c", f"{code}main({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    return _Member(rank, process, ours)


def _ended(process: "subprocess.Popen[bytes]") -> str:
    """How a process ended whose pipe is closed."""
    try:
        status = process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return "closed its pipe"
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
