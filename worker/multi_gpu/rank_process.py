"""The process of one further GPU: loads the model, then takes part in the jobs of rank 0.

It serves no queue and knows no client: what to do comes over a pipe from the controller that
started it, and the end of that pipe is its end. What loads the model is named by its import path,
so that nothing of the model is known here.
"""

import ctypes
import logging
import os
import pkgutil
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from avatar_client.contract.job_errors import OutOfMemoryError
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
from worker.multi_gpu.parallel import BranchParallel, RankParallel
from worker.multi_gpu.process_group import NUM_CFG_BRANCHES, ProcessGroup
from worker.multi_gpu.tiles import TileSender
from worker.settings import Settings

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


class RankEngine(Protocol):
    """What a rank process asks of its loaded model."""

    @property
    def pipeline(self) -> Any:
        """Holds the `transformer` whose passes may have to be shared."""

    @property
    def tile_arithmetic(self) -> str:
        """Ranks of which it is the same decode a tile to the same values."""

    def denoise_part(
        self, conditioning: Any, options: Any, seed: int, parallel: BranchParallel
    ) -> object:
        """Denoises this rank's part of a job. What comes out is rank 0's to use."""

    def decode_tiles(self, latents: Tensor, options: Any, tile_map: Any) -> None:
        """Has `tile_map` decode and send this rank's tiles of a video."""


class _JobEndedError(Exception):
    """The controller has ended the job before its last step."""


def main(descriptor: int, load: str) -> None:
    """Takes part in jobs until the controller ends; never returns.

    Args:
        descriptor: of the pipe to the controller.
        load: the import path, `module:name`, of a function that takes the worker's settings and
            a device and returns a `RankEngine`.
    """
    # The worker may finish a job after a signal that all processes get; the pipe says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # before the first heartbeat: an import may keep Python from the next one for long
    load_engine: Callable[[Settings, torch.device], RankEngine] = pkgutil.resolve_name(load)
    pipe = ControllerPipe(Connection(descriptor))
    start: RankStart = pipe.recv()
    name = f"GPU {start.rank}"
    logs.configure(start.settings.runpod_log_level, process=name)
    try:
        engine = load_engine(start.settings, start.device)
        pipe.send(TileArithmetic(engine.tile_arithmetic))
        pipe.send(Message.LOADED)
        pipe.recv()
        group = ProcessGroup(start.rank, start.num_ranks, start.rendezvous, start.device)
        group.check(lambda: False)  # the controller waits with a limit, and ends this process
        group.enable_context_parallel(engine.pipeline.transformer)
        pipe.send(Message.JOINED)
        while True:
            message = pipe.recv()
            # else it is the end of a job that ended here, too
            if isinstance(message, RankJob | RankDecoding):
                _take_part(message, pipe, engine, group)
    except BaseException as error:
        logger.exception("the rank process failed")
        cause = error.__cause__ or error
        reason = f"{name}: {type(cause).__name__}: {cause}"
        out_of_memory = isinstance(error, OutOfMemoryError | torch.OutOfMemoryError)
        pipe.send(RankFailure(reason, out_of_memory))
        os._exit(1)  # what torch would wait for on its way out may be what failed


def _take_part(
    job: RankJob | RankDecoding, pipe: "ControllerPipe", engine: RankEngine, group: ProcessGroup
) -> None:
    """Denoises or decodes one job together with the other ranks."""
    logs.job_id.set(job.job_id)
    try:
        if isinstance(job, RankDecoding):
            decoding = group.receive_tensors(job, NUM_CFG_BRANCHES)
            sender = TileSender(group, pipe.await_step)
            engine.decode_tiles(decoding.latents, decoding.options, sender.map)
        else:
            conditioning = group.receive_tensors(job.conditioning, job.num_cfg_branches)
            parallel = RankParallel(group, job.num_cfg_branches, pipe.await_step)
            engine.denoise_part(conditioning, job.options, job.seed, parallel)
        if group.device.type != "cpu":
            torch.accelerator.synchronize(group.device)  # a failure shows itself here at the latest
    except _JobEndedError:
        pass
    finally:
        logs.job_id.set(None)


class ControllerPipe:
    """A rank process's end of the pipe to the controller. The process ends with the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._received: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._receive, name="pipe", daemon=True).start()
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    def send(self, message: object) -> None:
        """Sends one message."""
        with self._lock:
            self._connection.send(message)

    def recv(self) -> Any:
        """The next message, once there is one."""
        return self._received.get()

    def await_step(self) -> None:
        """Returns when the next step begins.

        Raises:
            _JobEndedError: it does not.
        """
        if self.recv() is not Message.STEP:
            raise _JobEndedError

    def _receive(self) -> None:
        try:
            while True:
                self._received.put(self._connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the main thread may be waiting for a GPU

    def _send_heartbeats(self) -> None:
        pause = threading.Event()
        try:
            while not pause.wait(HEARTBEAT_SECONDS):
                self.send(Message.HEARTBEAT)
        except OSError:
            os._exit(0)
