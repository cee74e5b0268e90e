"""The workers of an endpoint: started, watched, and started again when they end.

They are noted in a file. When the endpoint itself was killed, the next one finds its workers
there, still at work, and keeps them.
"""

import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from local_endpoint import private_files
from local_endpoint.endpoint import LocalEndpoint
from local_endpoint.worker_process import REPOSITORY, WorkerProcess, kill_group, new_worker_id

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.5
FIRST_PAUSE_SECONDS = 1.0  # before a worker that ended is started again; doubled each time
LONGEST_PAUSE_SECONDS = 60.0
SETTLED_SECONDS = 60.0  # a worker that ran this long was no failed start
KEPT_LOGS = 10


class Fleet:
    """Keeps `count` workers running while its context is open.

    Args:
        endpoint: a running one.
        count: how many workers.
        environment: what the operator sets for each.
        script: the handler.
    """

    def __init__(
        self,
        endpoint: LocalEndpoint,
        count: int,
        *,
        environment: Mapping[str, str],
        script: Path = REPOSITORY / "handler.py",
    ) -> None:
        self._endpoint = endpoint
        self._count = count
        self._environment = environment
        self._script = script
        self._directory = endpoint.directory / "workers"
        self._notes_path = endpoint.directory / "workers.json"
        self._processes: dict[str, psutil.Process] = {}  # by worker id
        self._children: dict[str, WorkerProcess] = {}  # those that were not adopted
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._next_start = 0.0  # of time.monotonic
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        private_files.make_directory(self._directory)
        self._adopt()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._thread.join()
        for worker_id in list(self._processes):
            self._end(worker_id)

    @property
    def processes(self) -> dict[str, psutil.Process]:
        """The running workers, by their ids."""
        return dict(self._processes)

    def log_path(self, worker_id: str) -> Path:
        """What the worker has printed."""
        return self._directory / worker_id / "worker.log"

    def _watch(self) -> None:
        while not self._closing.wait(WATCH_SECONDS if self._processes else 0.0):
            for worker_id, process in self.processes.items():
                if not _runs(process):
                    logger.warning("%s ended: see %s", worker_id, self.log_path(worker_id))
                    self._end(worker_id)
                    self._put_off_the_next(time.time() - process.create_time())
            if len(self._processes) < self._count:
                if time.monotonic() >= self._next_start:
                    self._start()
                else:
                    self._closing.wait(WATCH_SECONDS)

    def _start(self) -> None:
        worker_id = new_worker_id()
        worker = WorkerProcess(
            self._endpoint,
            self._directory / worker_id,
            script=self._script,
            environment=self._environment,
            worker_id=worker_id,
        )
        worker.start()
        logger.info("%s started", worker_id)
        self._children[worker_id] = worker
        self._processes[worker_id] = psutil.Process(worker.pid)
        self._note()
        self._drop_old_logs()

    def _end(self, worker_id: str) -> None:
        """Ends a worker's process with all it has started, and removes its temporary files."""
        process = self._processes.pop(worker_id)
        # with all it has started: the heartbeats of a dead worker would go on
        if child := self._children.pop(worker_id, None):
            child.kill()
        else:
            kill_group(process.pid)
            with suppress(psutil.TimeoutExpired):
                process.wait(10)
        shutil.rmtree(self._directory / worker_id / "tmp", ignore_errors=True)
        self._note()

    def _put_off_the_next(self, ran_seconds: float) -> None:
        if ran_seconds > SETTLED_SECONDS:
            self._pause_seconds = FIRST_PAUSE_SECONDS
        self._next_start = time.monotonic() + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _adopt(self) -> None:
        """Keeps the workers of a killed endpoint with these addresses; ends the others."""
        try:
            notes = json.loads(self._notes_path.read_text())
        except FileNotFoundError:
            return
        for note in notes:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(note["pid"])
                if process.create_time() == note["created"] and _runs(process):
                    self._processes[note["worker_id"]] = process
                    if note["urls"] != self._urls() or len(self._processes) > self._count:
                        self._end(note["worker_id"])
                    else:
                        logger.info("%s goes on", note["worker_id"])
        self._note()

    def _note(self) -> None:
        notes = [
            {
                "worker_id": worker_id,
                "pid": process.pid,
                "created": process.create_time(),  # tells it from a later process of this pid
                "urls": self._urls(),
            }
            for worker_id, process in self._processes.items()
        ]
        private_files.write(self._notes_path, json.dumps(notes))

    def _urls(self) -> list[str | None]:
        """What the workers call: the endpoint, and the store of their videos."""
        return [self._endpoint.url, self._environment.get("BUCKET_ENDPOINT_URL")]

    def _drop_old_logs(self) -> None:
        places = sorted(self._directory.iterdir(), key=lambda place: place.stat().st_mtime)
        ended = [place for place in places if place.name not in self._processes]
        for place in ended[:-KEPT_LOGS]:
            shutil.rmtree(place, ignore_errors=True)


def _runs(process: psutil.Process) -> bool:
    """Whether it is more than an entry that its parent has not read yet."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
