"""The ranks of the other GPUs: a process for each, started, watched and ended by the worker.

The worker's own process is rank 0. A rank process loads the model onto its GPU
(`rank_process.py`), joins the process group and takes part in each job that the worker generates.
Small messages go over a pipe to each (`messages.py`): a job's header, "the step begins", "the job
is over"; tensors go from GPU to GPU (`process_group.py`). Between two jobs a rank process sleeps at
its pipe and keeps its GPU idle. The end of the pipe is its end too, so none outlives the worker,
however that ends.
"""

import contextlib
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import torch

from avatar_client.contract.job_errors import WorkerError
from worker import logs
from worker.multi_gpu.messages import (
    HEARTBEAT_SECONDS,
    Message,
    RankDecoding,
    RankFailure,
    RankJob,
    RankStart,
    TileArithmetic,
)
from worker.multi_gpu.parallel import BranchParallel, NoParallel, RankParallel, SharedWork
from worker.multi_gpu.process_group import NUM_CFG_BRANCHES, ProcessGroup, tensor_specs
from worker.multi_gpu.tiles import TileGatherer
from worker.own_directory import own_directory
from worker.settings import Settings, configure_collectives, environment_without_secrets

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]

# Without a heartbeat a rank process is lost: a call may keep Python from sending one, but not so
# long. One that the system has stopped runs no call; it may be a debugger's for a moment.
HEARTBEAT_TIMEOUT_SECONDS = 60.0
STOPPED_TIMEOUT_SECONDS = 10.0
GATHER_TIMEOUT_SECONDS = 180.0  # for another rank's velocity; more than compiling takes
LONGEST_LOOK_SECONDS = 2 * HEARTBEAT_SECONDS  # that counts between two looks at the ranks
GRACE_SECONDS = 2.0  # for a thread to notice by itself that another rank is lost
JOIN_TIMEOUT_SECONDS = 120.0  # to meet, and to find the ways between GPUs
EXIT_TIMEOUT_SECONDS = 5.0  # before a process that should end is killed

# A forked child of the worker (the SDK's heartbeat) must not keep the pipes open.
_pipes: "weakref.WeakSet[Connection]" = weakref.WeakSet()


def _close_pipes() -> None:
    for pipe in list(_pipes):
        with contextlib.suppress(OSError):
            pipe.close()


os.register_at_fork(after_in_child=_close_pipes)


@dataclass(slots=True)
class Rank:
    """The controller's handle of one rank process."""

    number: int  # from 1; the worker itself is rank 0
    process: "subprocess.Popen[bytes]"
    pipe: Connection
    silent_seconds: float | None = None  # since its last sign of life; None: it is still importing
    last_message: Message | None = None  # heartbeats aside
    tile_arithmetic: str = ""  # of its loaded model

    @classmethod
    def start(cls, number: int, load: str) -> "Rank":
        """Starts the process, whose model is loaded by the function with that import path."""
        ours, theirs = multiprocessing.Pipe()
        _pipes.add(ours)
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
            "from worker.multi_gpu.rank_process import main; "
            f"main({theirs.fileno()}, {load!r})"
        )
        with theirs:
            process = subprocess.Popen(  # noqa: S603  # our own module
                [sys.executable, "-c", code],
                env=environment_without_secrets(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        return cls(number, process, ours)

    def send(self, message: object) -> None:
        """Sends one message. A process that has ended gets none; the watch tells of its end."""
        with contextlib.suppress(OSError):
            self.pipe.send(message)

    def silence(self) -> str | None:
        """For the log, if it was silent for so long that it is lost."""
        if self.silent_seconds is None or self.silent_seconds < STOPPED_TIMEOUT_SECONDS:
            return None
        if self.silent_seconds > HEARTBEAT_TIMEOUT_SECONDS:
            return "gave no sign of life"
        with contextlib.suppress(psutil.Error):  # it has ended: its pipe tells
            if psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED:
                return "is stopped"
        return None

    def how_it_ended(self) -> str:
        """For the log, once its end of the pipe is closed."""
        try:
            status = self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


class RankController:
    """The rank processes of a worker. Its methods are for one thread, but for the properties.

    It is in one of these states:
        starting: the processes import and load their models. The constructor returns here.
        idle: all have joined the process group and sleep at their pipes. From `join`, and from
            each job's end.
        in a job: between two steps. `job` and `decoding` begin it; its end, or an exception, leads
            back to idle.
        in a step: the ranks need each other's tensors. Before the first step, too, and after the
            last until all GPUs are done. An exception here leads to lost; but while tiles are
            decoded one of rank 0's own does not, as it still takes what the others send.
        lost: a rank process ended, said that it failed, was silent, or left rank 0's GPU waiting;
            or rank 0 failed in a step. From any state above, for good: no job is begun any more,
            and only `close` is left.
        closed: the processes have ended. By `close`, from any state.

    A thread of its own watches for the loss. The thread that generates may then wait for ever;
    `stuck_error` says so to whoever waits for it.

    Args:
        settings: the worker's.
        devices: one for each rank; the first is the worker's own.
        load: what loads a rank's model, as `rank_process.main` takes it.
    """

    def __init__(self, settings: Settings, devices: list[torch.device], load: str) -> None:
        configure_collectives()
        self.num_ranks = len(devices)
        self._device = devices[0]
        self._directory = contextlib.ExitStack()
        self._rendezvous = self._directory.enter_context(own_directory("ranks")) / "rendezvous"
        self._group: ProcessGroup | None = None
        self._parallel: SharedWork | None = None  # of the running job
        self._changed = threading.Condition()
        self._failure: RankFailure | None = None
        self._failed_at = 0.0
        self._closing = False
        self._ranks = [Rank.start(number, load) for number in range(1, len(devices))]
        for each in self._ranks:
            device = devices[each.number]
            each.send(RankStart(settings, each.number, len(devices), device, self._rendezvous))
        self._watch = threading.Thread(target=self._watch_ranks, name="ranks", daemon=True)
        self._watch.start()

    def join(self, transformer: Any, timeout_seconds: float) -> None:
        """Returns when each rank has loaded its model and joined the process group.

        Args:
            transformer: this process's, which may have to share its passes.
            timeout_seconds: for their models.

        Raises:
            RuntimeError: a rank failed or was too slow; says which and why.
        """
        self._await(Message.LOADED, timeout_seconds)
        self._send(Message.JOIN, range(self.num_ranks))
        deadline = time.monotonic() + JOIN_TIMEOUT_SECONDS
        self._group = ProcessGroup(0, self.num_ranks, self._rendezvous, self._device)
        self._group.check(lambda: self._failure is not None or time.monotonic() > deadline)
        self._group.enable_context_parallel(transformer)
        self._await(Message.JOINED, max(0.0, deadline - time.monotonic()))

    def num_active_ranks(self, num_cfg_branches: int) -> int:
        """How many ranks, with this one, compute so many CFG branches."""
        assert self._group is not None
        return len(self._group.active_ranks(num_cfg_branches))

    @contextlib.contextmanager
    def job(
        self, conditioning: Any, options: Any, seed: int, num_cfg_branches: int
    ) -> Iterator[BranchParallel]:
        """A job on all ranks that its CFG branches need. An exception ends it on them, too.

        One that comes between two steps leaves the ranks idle; after any other they may wait for
        each other for ever, and are lost.

        Args:
            conditioning: a dataclass; its tensors are sent.
            options, seed: whatever the ranks' engines take besides.
            num_cfg_branches: that the job has.

        Raises:
            WorkerError: a rank was lost.
        """
        assert self._group is not None
        if self.num_active_ranks(num_cfg_branches) == 1:
            yield NoParallel()
            return
        ranks = self._group.active_ranks(num_cfg_branches)
        parallel = RankParallel(self._group, num_cfg_branches, lambda: self._begin_step(ranks))
        specs = tensor_specs(conditioning)
        header = RankJob(logs.job_id.get(), specs, options, seed, num_cfg_branches)
        with self._together(parallel, header, conditioning, num_cfg_branches):
            yield parallel

    @contextlib.contextmanager
    def decoding(self, latents: torch.Tensor, options: Any) -> Iterator[TileGatherer]:
        """The decoding of a video on all ranks. An exception ends it on them, too.

        One that comes from this process leaves the ranks idle, whenever it comes.

        Args:
            latents: they are sent.
            options: whatever the ranks' engines take besides.

        Raises:
            WorkerError: a rank was lost.
        """
        assert self._group is not None
        ranks = range(self.num_ranks)
        gatherer = TileGatherer(self._group, lambda: self._begin_step(ranks))
        decoding = RankDecoding(logs.job_id.get(), latents, options)
        with self._together(gatherer, tensor_specs(decoding), decoding, NUM_CFG_BRANCHES):
            try:
                yield gatherer
            finally:
                if self._failure is None:
                    gatherer.take_begun()

    def decode_alike(self, tile_arithmetic: str) -> bool:
        """Whether all ranks decode a tile to the same values as one of that arithmetic."""
        return all(rank.tile_arithmetic == tile_arithmetic for rank in self._ranks)

    @contextlib.contextmanager
    def _together(
        self, work: SharedWork, header: object, tensors: Any, num_cfg_branches: int
    ) -> Iterator[None]:
        """Work of the ranks that so many CFG branches need, from its header to its end."""
        assert self._group is not None
        ranks = self._group.active_ranks(num_cfg_branches)
        self._parallel = work
        try:
            self._require_all()
            self._send(header, ranks)
            self._group.send_tensors(tensors, num_cfg_branches)
            yield
            self._finish(work)
        except BaseException as error:
            loss = self._loss_behind(error) if work.in_step else None
            if loss is not None:
                raise loss from error
            raise
        finally:
            self._parallel = None
            self._send(Message.END, ranks)

    def _begin_step(self, ranks: range) -> None:
        self._require_all()
        self._send(Message.STEP, ranks)

    def _require_all(self) -> None:
        if self._failure is not None:
            raise self._failure.as_error()

    def _finish(self, work: SharedWork) -> None:
        """Waits for the last step, so that a rank that fails in it fails this job."""
        work.in_step = True
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def _loss_behind(self, error: BaseException) -> WorkerError | None:
        """The loss of another rank that led to an error inside a step; None: it came first."""
        with self._changed:  # the watch may learn of it a little later than the thread
            self._changed.wait_for(lambda: self._failure is not None, GRACE_SECONDS)
        if self._failure is not None:
            return self._failure.as_error()
        self._lose(RankFailure(f"the worker's own process failed in a step: {error!r}"))
        return None

    @property
    def is_lost(self) -> bool:
        """Whether a rank is lost: the worker must end, and be started anew."""
        return self._failure is not None

    @property
    def stuck_error(self) -> WorkerError | None:
        """The error of a job whose thread waits in vain for a lost rank; None: it does not."""
        failure = self._failure
        late = time.monotonic() - self._failed_at > GRACE_SECONDS
        parallel = self._parallel
        waits = parallel is not None and parallel.in_step
        return failure.as_error() if failure is not None and waits and late else None

    def close(self) -> None:
        """Ends the rank processes."""
        if self._closing:
            return
        self._closing = True
        self._watch.join()  # it reads the pipes
        for rank in self._ranks:
            rank.pipe.close()
        deadline = time.monotonic() + EXIT_TIMEOUT_SECONDS
        for rank in self._ranks:
            try:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
        if self._group is not None:
            self._group.close()
        self._directory.close()

    def _send(self, message: object, ranks: range) -> None:
        for rank in self._ranks:
            if rank.number in ranks:
                rank.send(message)

    def _await(self, message: Message, timeout_seconds: float) -> None:
        """Returns when each rank has sent the message."""

        def is_over() -> bool:
            return self._failure is not None or all(
                rank.last_message is message for rank in self._ranks
            )

        with self._changed:
            in_time = self._changed.wait_for(is_over, timeout_seconds)
        if self._failure is not None:
            raise RuntimeError(self._failure.reason)
        if not in_time:
            late = [str(rank.number) for rank in self._ranks if rank.last_message is not message]
            raise RuntimeError(f"GPU {', '.join(late)}: not ready after {timeout_seconds:.0f} s")

    def _lose(self, failure: RankFailure) -> None:
        with self._changed:
            if self._failure is None and not self._closing:
                self._failed_at = time.monotonic()
                self._failure = failure
                logger.error("%s", failure.reason)
            self._changed.notify_all()

    def _watch_ranks(self) -> None:
        """Receives what the rank processes send until the first loss, or the end."""
        awaited, waited = None, 0.0
        looked_at = time.monotonic()
        ranks = {rank.pipe: rank for rank in self._ranks}
        while not self._closing and self._failure is None:
            for pipe in wait(list(ranks), timeout=HEARTBEAT_SECONDS):
                self._receive(ranks[pipe])  # type: ignore[index]
            # while the whole machine stood still (it was moved, say) nobody could give a sign
            now = time.monotonic()
            passed, looked_at = min(now - looked_at, LONGEST_LOOK_SECONDS), now
            for rank in self._ranks:
                if rank.silent_seconds is not None:
                    rank.silent_seconds += passed
                if silence := rank.silence():
                    rank.process.kill()
                    self._lose(RankFailure(f"GPU {rank.number}: its process {silence}"))
            parallel = self._parallel
            waits_for = None
            with contextlib.suppress(RuntimeError):  # of this process's GPU: its thread tells
                waits_for = parallel.awaited_gather() if parallel is not None else None
            waited = waited + passed if waits_for is not None and waits_for is awaited else 0.0
            awaited = waits_for
            if waited > GATHER_TIMEOUT_SECONDS:
                self._lose(RankFailure("a GPU does not send what it should compute"))

    def _receive(self, rank: Rank) -> None:
        try:
            message = rank.pipe.recv()
        except (EOFError, OSError):
            self._lose(RankFailure(f"GPU {rank.number}: its process {rank.how_it_ended()}"))
            return
        rank.silent_seconds = 0.0
        if isinstance(message, RankFailure):
            self._lose(message)
        elif isinstance(message, TileArithmetic):
            rank.tile_arithmetic = message.description
        elif message is not Message.HEARTBEAT:
            with self._changed:
                rank.last_message = message
                self._changed.notify_all()
