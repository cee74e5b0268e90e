"""The process of one further GPU: loads the model, then follows the jobs of the worker's first GPU.

It serves no queue and knows no client: what to do comes over a pipe from the worker that started
it, and the end of that pipe is its end. See `worker/multi_gpu/controller.py`.
"""

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from avatar_client.contract.job_errors import OutOfMemoryError
from worker import logs
from worker.generation.engine import Engine, go_on
from worker.multi_gpu.controller import BEAT_SECONDS, Failure, Job, Start, Word
from worker.multi_gpu.process_group import Group, GroupSharing
from worker.settings import Settings

logger = logging.getLogger(__name__)

Load = Callable[[Settings, torch.device], Engine]

_PR_SET_PDEATHSIG = 1


class _JobEndedError(Exception):
    """The worker has ended the job before its last step."""


def main(descriptor: int, load: Load = Engine.load) -> None:
    """Follows until the worker ends; never returns.

    Args:
        descriptor: of the pipe to the worker.
        load: gives the model on its device.
    """
    # The worker may finish a job after a signal that all processes get; the pipe says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    leader = _Leader(Connection(descriptor))
    start: Start = leader.hear()
    who = f"GPU {start.rank}"
    logs.configure(start.settings.runpod_log_level, process=who)
    try:
        engine = load(start.settings, start.device)
        leader.say(Word.LOADED)
        leader.hear()
        group = Group(start.rank, start.num_processes, start.rendezvous, start.device)
        group.check(lambda: False)  # the worker waits for it with a limit, and ends this process
        group.share_tokens(engine.pipeline.transformer)
        leader.say(Word.JOINED)
        while True:
            _follow(leader.hear(), leader, engine, group)
    except BaseException as error:
        logger.exception("the process failed")
        cause = error.__cause__ or error
        reason = f"{who}: {type(cause).__name__}: {cause}"
        out_of_memory = isinstance(error, OutOfMemoryError | torch.OutOfMemoryError)
        leader.say(Failure(reason, out_of_memory))
        os._exit(1)  # what torch would wait for on its way out may be what failed


def _follow(message: Any, leader: "_Leader", engine: Engine, group: Group) -> None:
    """Takes part in one job."""
    if not isinstance(message, Job):
        return  # the end of a job that ended here, too
    logs.job_id.set(message.job_id)
    conditioning = group.receive(message.conditioning, message.num_sides)
    sharing = GroupSharing(group, message.num_sides, leader.await_step)
    try:
        engine.denoise(conditioning, message.params, message.seed, go_on, sharing)
        if group.device.type != "cpu":
            torch.accelerator.synchronize(group.device)  # a failure shows itself here at the latest
    except _JobEndedError:
        pass
    finally:
        logs.job_id.set(None)


class _Leader:
    """The worker, as this process hears it. This process ends with it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._heard: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._listen, name="pipe", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def say(self, message: object) -> None:
        """Sends one message."""
        with self._lock:
            self._pipe.send(message)

    def hear(self) -> Any:
        """The next message."""
        return self._heard.get()

    def await_step(self) -> None:
        """Returns when the next step begins.

        Raises:
            _JobEndedError: it does not.
        """
        if self.hear() is not Word.STEP:
            raise _JobEndedError

    def _listen(self) -> None:
        try:
            while True:
                self._heard.put(self._pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # the main thread may be waiting for a GPU

    def _beat(self) -> None:
        pause = threading.Event()
        try:
            while not pause.wait(BEAT_SECONDS):
                self.say(Word.BEAT)
        except OSError:
            os._exit(0)
