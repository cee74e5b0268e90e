"""An endpoint of its own for the studio: `python -m local_endpoint`, which ends with it."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import httpx
from pydantic import SecretStr

from avatar_client.contract.bucket import BucketSettings
from studio.connection import Connection

REPOSITORY = Path(__file__).parents[1]
WORKER_PYTHON = REPOSITORY / ".venv" / "bin" / "python"
START_SECONDS = 180
END_SECONDS = 20
NAME = "local"
NOTE = (
    "This machine runs the demo model, which makes drawn faces speak. "
    "For the face of a person, name an endpoint that has the published weights."
)
INITIAL_VALUES = {"resolution": 256, "preset": "draft", "num_inference_steps": 20}  # without a GPU
ENVIRONMENT = {"PATH": os.defpath}  # of its own: keys and buckets of the person stay out of it


class LocalEndpointError(Exception):
    """The local endpoint cannot be started; the message says why."""


class LocalEndpointProcess:
    """A local endpoint with the demo model, to be entered as a context.

    Args:
        directory: holds its state, which outlives it.
        python: of the environment that the worker is installed in.
        model_dir: another model; None is the demo's.
    """

    def __init__(
        self, directory: Path, python: Path = WORKER_PYTHON, model_dir: Path | None = None
    ) -> None:
        self._directory = directory.absolute()
        model = {"MODEL_DIR": str(model_dir.absolute())} if model_dir else {"AVATAR_MODEL": "demo"}
        self._environment = ENVIRONMENT | model
        self._python = python
        self._port = _free_port()
        self._log_path = self._directory / "endpoint.log"

    def __enter__(self) -> Self:
        if not self._python.exists():
            raise LocalEndpointError(
                f"there is no {self._python}: `make demo` makes it; or name another with "
                "--worker-python, or an endpoint with --endpoint"
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own module
                self._command(),
                cwd=REPOSITORY,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the studio alone, which then ends it
                preexec_fn=_end_with_parent,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def connection(self) -> Connection:
        """How to use it."""
        return Connection(
            name=NAME,
            url=f"http://127.0.0.1:{self._port}/v2/local",
            api_key=SecretStr(self._key_path.read_text().strip()),
            uploads=BucketSettings(**json.loads((self._directory / "bucket.json").read_text())),
            key_path=self._key_path,
            note=NOTE,
            initial_values=INITIAL_VALUES,
        )

    def end(self) -> None:
        """Ends it and what it has started."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def _key_path(self) -> Path:
        return self._directory / "api-key"

    def _command(self) -> list[str]:
        options = {"--port": self._port, "--state": self._directory, "--workers": 1}
        words = [str(word) for option in options.items() for word in option]
        return [str(self._python), "-m", "local_endpoint", *words]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise LocalEndpointError(f"it ended at once: see {self._log_path}")
            with suppress(httpx.HTTPError, OSError):
                connection = self.connection()
                key = connection.api_key.get_secret_value()
                headers = {"Authorization": f"Bearer {key}"}
                if httpx.get(f"{connection.url}/health", headers=headers).is_success:
                    return
            time.sleep(0.2)
        raise LocalEndpointError(f"it was not ready in {START_SECONDS} s: see {self._log_path}")


def _end_with_parent() -> None:
    """Has Linux end this process when its parent is killed; elsewhere it goes on."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


_PR_SET_PDEATHSIG = 1
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # found here: nothing is loaded after a fork


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
