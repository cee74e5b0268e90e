"""Temporary directories that end with their use, or with a later worker's start.

A worker that is killed leaves its own behind, and would fill the disk of those after it. The kernel
knows whether its process is still there: that holds a lock on a file inside.
"""

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "avatar-"
LOCK = ".lock"


@contextmanager
def own_directory(purpose: str) -> Iterator[Path]:
    """A directory, removed with all that is in it when the context is left.

    What cannot be removed is left to `remove_leftovers`, and no error.

    Raises:
        OSError: it cannot be made.
    """
    with (
        tempfile.TemporaryDirectory(
            prefix=f"{PREFIX}{purpose}-", ignore_cleanup_errors=True
        ) as name,
        (Path(name) / LOCK).open("w") as lock,
    ):
        with suppress(OSError):  # a file system without locks: then nobody removes it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Path(name)


def remove_leftovers() -> None:
    """Removes such directories of processes that are gone, and no others."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if _is_left_over(path):
                logger.info("removing %s, which a worker has left behind", path)
                shutil.rmtree(path, ignore_errors=True)


def _is_left_over(path: Path) -> bool:
    """Whether it is such a directory of this user's, and no process holds its lock.

    Raises:
        OSError: it cannot be asked; another process may have it, or has just removed it.
    """
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return False
    with (path / LOCK).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
