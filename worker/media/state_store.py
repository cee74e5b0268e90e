"""Where the states of running jobs lie: on the network volume, else in the operator's bucket.

Both outlive the worker. Neither is a client's: a client's bucket holds no states, and in the
operator's no key that a job can name or gets ends as a state's does.
"""

import errno
import os
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from shutil import disk_usage
from typing import Protocol

from avatar_client.contract.bucket import BucketSettings
from worker.atomic_file import atomic_write
from worker.media.storage import Storage
from worker.media.store_client import Patience
from worker.own_directory import own_directory

VOLUME = Path("/runpod-volume")  # of an endpoint that has one
FOLDER = "states"
SUFFIX = ".state"
RETRY_SECONDS = 20.0  # for a store that stumbles: a state is worth it, and not much more
ROOM_BYTES = 2**30  # of this machine's disk that are left for the job itself
MAX_SWEPT = 1000  # files that a start looks at


class StateStore(Protocol):
    """Files by name, which outlive the worker. Names are of letters and digits."""

    def put(self, name: str, write: Callable[[Path], object], num_bytes: int) -> None:
        """Keeps the file that `write` writes at the path that it is given: whole or not at all.

        `num_bytes` is about its size.

        Raises:
            OSError, UploadError: it could not be kept.
        """

    def get(self, name: str, max_bytes: int, check: Callable[[], None]) -> bytes | None:
        """A file's content; None: there is none. `check` is asked meanwhile, and may raise.

        Raises:
            OSError, UploadError: it could not be read, or is larger.
        """

    def delete(self, name: str) -> None:
        """Removes a file; there need not be one.

        Raises:
            OSError, UploadError: it could not be removed.
        """

    def sweep(self, max_age_seconds: float) -> int:
        """How many old files were removed, of the first thousand that are there.

        Raises:
            OSError, UploadError: they could not be listed or removed.
        """


class DirectoryStore:
    """States in a directory, which is made when it is needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __str__(self) -> str:
        return str(self._directory)

    def put(self, name: str, write: Callable[[Path], object], num_bytes: int) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # two workers may have the same job, where the platform took one for dead
        with atomic_write(self._path(name), durable=True, mode=0o600, shared=True) as part:
            write(part)

    def get(self, name: str, max_bytes: int, check: Callable[[], None]) -> bytes | None:
        try:
            with self._path(name).open("rb") as file:
                if os.fstat(file.fileno()).st_size > max_bytes:
                    raise OSError(f"the state is larger than {max_bytes} bytes")
                return file.read(max_bytes)
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def sweep(self, max_age_seconds: float) -> int:
        if not self._directory.is_dir():
            return 0
        num_removed = 0
        for path in islice(self._directory.iterdir(), MAX_SWEPT):  # parts of killed workers too
            if SUFFIX not in path.suffixes:
                continue
            try:
                if time.time() - path.stat().st_mtime > max_age_seconds:
                    path.unlink()
                    num_removed += 1
            except FileNotFoundError:  # another worker sweeps, too
                continue
        return num_removed

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}{SUFFIX}"


class BucketStore:
    """States in a bucket, in a folder of their own."""

    def __init__(self, bucket: BucketSettings) -> None:
        self._bucket = bucket

    def __str__(self) -> str:
        return f"the folder {self._bucket.key(FOLDER)!r} of the bucket"

    def put(self, name: str, write: Callable[[Path], object], num_bytes: int) -> None:
        with own_directory("state") as directory:
            if disk_usage(directory).free < num_bytes + ROOM_BYTES:
                raise OSError(errno.ENOSPC, "the job itself needs what is left of the disk")
            path = directory / name
            write(path)
            self._storage().put(
                path,
                self._key(name),
                content_type="application/octet-stream",
                patience=Patience(RETRY_SECONDS),
            )

    def get(self, name: str, max_bytes: int, check: Callable[[], None]) -> bytes | None:
        return self._storage().get(self._key(name), max_bytes, Patience(RETRY_SECONDS, check))

    def delete(self, name: str) -> None:
        self._storage().delete(self._key(name), Patience(RETRY_SECONDS))

    def sweep(self, max_age_seconds: float) -> int:
        storage = self._storage()
        ages = storage.ages(self._bucket.key(f"{FOLDER}/"))
        old = [
            key
            for key, age_seconds in ages.items()
            if key.endswith(SUFFIX) and age_seconds > max_age_seconds
        ]
        for key in old:
            storage.delete(key, Patience(RETRY_SECONDS))
        return len(old)

    def _storage(self) -> Storage:
        """A client of its own for each call: one that was left behind may still be in use."""
        return Storage(self._bucket)

    def _key(self, name: str) -> str:
        return self._bucket.key(FOLDER, f"{name}{SUFFIX}")


def find(directory: str, bucket: BucketSettings | None) -> StateStore | None:
    """The first that there is of a given directory, a mounted volume and the operator's bucket.

    A bucket that anyone may read holds none: latents are the video.
    """
    if directory:
        return DirectoryStore(Path(directory))
    if VOLUME.is_mount() and os.access(VOLUME, os.W_OK):
        return DirectoryStore(VOLUME / f"avatar-{FOLDER}")
    if bucket is not None and not bucket.public_base_url:
        return BucketStore(bucket)
    return None
