"""A worker as the platform runs it: `python handler.py` in a process and environment of its own."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil

from local_endpoint import private_files
from local_endpoint.endpoint import LocalEndpoint

REPOSITORY = Path(__file__).parents[1]


class WorkerProcess:
    """One running worker; leaving the context ends it and whatever it has started.

    Args:
        endpoint: where it takes its jobs.
        directory: holds its log, its home and its temporary files.
        script: the handler, run in the repository's root.
        environment: what the operator sets, and nothing else of this process's environment.
        worker_id: None: a new one.
    """

    def __init__(
        self,
        endpoint: LocalEndpoint,
        directory: Path,
        *,
        script: Path = REPOSITORY / "handler.py",
        environment: Mapping[str, str] | None = None,
        worker_id: str | None = None,
    ) -> None:
        self.worker_id = worker_id or new_worker_id()
        self.log_path = directory / "worker.log"
        self.temporary_directory = directory / "tmp"
        self._endpoint = endpoint
        self._command = [sys.executable, str(script)]
        home = directory / "home"
        private_files.make_directory(home)
        private_files.make_directory(self.temporary_directory)
        self._environment = {
            "PATH": os.defpath,
            "TMPDIR": str(self.temporary_directory),
            **endpoint.worker_environment(self.worker_id, home),
            **(environment or {}),
        }

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def start(self) -> None:
        """Starts the process. It needs a while until it takes jobs: see `wait_until_polling`."""
        private_files.make_file(self.log_path)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own script
                self._command,
                cwd=REPOSITORY,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                umask=0o077,  # its log and files tell of jobs
                start_new_session=True,  # so that `kill` reaches its heartbeat process too
            )

    @property
    def pid(self) -> int:
        """Of the process, which leads a group of its own."""
        return self._process.pid

    def wait_until_polling(self, timeout_seconds: float) -> None:
        """Returns when the worker asks for its first job.

        Raises:
            RuntimeError: it ended, or asked for none in time; the message holds its log.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self._endpoint.wait_for_worker(self.worker_id, timeout_seconds=0.2):
            if self._process.poll() is not None:
                raise RuntimeError(f"the worker ended:\n{self.log}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no job taken in {timeout_seconds} s:\n{self.log}")

    def terminate(self) -> None:
        """Asks the worker to end, as the platform does before it takes the machine away."""
        self._process.terminate()

    def wait(self, timeout_seconds: float) -> int:
        """The exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        return self._process.wait(timeout_seconds)

    def kill(self) -> None:
        """Ends the worker and its heartbeat process at once, if they still run."""
        kill_group(self.pid)
        self._process.wait()

    @property
    def log(self) -> str:
        """What the worker has printed so far."""
        return self.log_path.read_text(errors="replace")

    def rss_bytes(self) -> int:
        """Resident memory of the worker and its children."""
        worker = psutil.Process(self.pid)
        family = [worker, *worker.children(recursive=True)]
        return sum(process.memory_info().rss for process in family)

    def open_files(self) -> int:
        """Open descriptors of the worker: files, sockets, pipes."""
        return int(psutil.Process(self.pid).num_fds())


def new_worker_id() -> str:
    """An id that no worker has had."""
    return f"worker-{secrets.token_hex(4)}"


def kill_group(pid: int) -> None:
    """Ends the process and all that it has started, if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
