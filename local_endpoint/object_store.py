"""The local endpoint's own object store, for videos where the operator names no bucket."""

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path
from typing import Self

from avatar_client.contract.bucket import BucketSettings

SERVER = Path(__file__).with_name("moto_server.py")
BUCKET = "avatars"


class ObjectStore:
    """One bucket of an S3-compatible server on the loopback interface, in a process of its own.

    Entered as a context, or started and stopped by hand. It is empty at first, and its objects are
    gone when it stops, or when this process ends in whatever way.

    Args:
        directory: holds its log, and the objects that are too large for its memory.
        access_key_id: what each request must name: the secret, since no signature is checked.
        secret_access_key: what clients sign with.
        port: the one to take if it is free.
    """

    def __init__(
        self, directory: Path, *, access_key_id: str, secret_access_key: str, port: int = 0
    ) -> None:
        self._directory = directory
        self._keys = {"access_key_id": access_key_id, "secret_access_key": secret_access_key}
        self._wanted_port = port
        self.endpoint_url = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process. Requests may be sent at once: they wait for it on the open socket.

        Raises:
            ModuleNotFoundError: moto is not installed.
        """
        if importlib.util.find_spec("moto") is None:
            raise ModuleNotFoundError(
                "the object store needs the packages of the extra `local`; or set BUCKET_*"
            )
        with (
            _listen(self._wanted_port) as listener,
            (self._directory / "object-store.log").open("wb") as log,
        ):
            self._process = subprocess.Popen(  # noqa: S603  # our own script
                [sys.executable, "-P", str(SERVER), str(listener.fileno()), BUCKET],
                env={"TMPDIR": str(self._directory)},
                stdin=subprocess.PIPE,  # ends with this process, and ends that one
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[listener.fileno()],
                umask=0o077,
                start_new_session=True,  # Ctrl-C is for the endpoint, whose workers still deliver
            )
            self.endpoint_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._keys['access_key_id']}\n".encode())
        self._process.stdin.flush()

    def stop(self) -> None:
        """Ends the process, and all objects with it."""
        self._process.kill()
        self._process.communicate()

    @property
    def bucket(self) -> BucketSettings:
        """What a client or a worker needs."""
        return BucketSettings.model_validate(self.settings)

    @property
    def settings(self) -> dict[str, str]:
        """The same as plain values, the secret ones too."""
        return {"endpoint_url": self.endpoint_url, "name": BUCKET, **self._keys}

    @property
    def environment(self) -> dict[str, str]:
        """The same as a worker's variables."""
        return {f"BUCKET_{name.upper()}": value for name, value in self.settings.items()}


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return socket.create_server(("127.0.0.1", 0))
