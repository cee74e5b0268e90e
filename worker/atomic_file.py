"""Files that are there whole or not at all: written under another name, then renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of files for all users: safetensors leaves one to its owner alone, and the worker is another user.
READABLE = 0o644


@contextmanager
def atomic_write(
    path: Path, *, durable: bool = False, mode: int | None = None, shared: bool = False
) -> Iterator[Path]:
    """Gives the path of a file to write, which replaces that at `path` when the context is left.

    After an exception it is removed, and what was at `path` stays.

    Args:
        durable: its content reaches the disk before it gets its name.
        mode: its permissions from the beginning; None leaves them to whoever writes it.
        shared: others may write the same file at the same time. Then each has a name of its own;
            else what a process that was killed has left is written over by the next.
    """
    own = f".{secrets.token_hex(4)}" if shared else ""
    part = path.with_name(f"{path.name}{own}.part")
    try:
        if mode is not None:
            part.unlink(missing_ok=True)
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        yield part
        if mode is not None:  # some libraries replace the file that they are to write
            part.chmod(mode)
        publish(part, path, durable=durable)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(
    path: Path, text: str, *, durable: bool = False, mode: int | None = None, shared: bool = False
) -> None:
    """Writes a text as `atomic_write` does."""
    with atomic_write(path, durable=durable, mode=mode, shared=shared) as part:
        part.write_text(text)


def publish(part: Path, path: Path, *, durable: bool = False) -> None:
    """Gives a finished file its name, in place of what had it."""
    if durable:
        with part.open("rb") as file:
            os.fsync(file.fileno())
    part.replace(path)
