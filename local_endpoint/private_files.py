"""Files that this machine's other users cannot read: jobs hold portraits, results and keys."""

import os
import secrets
from pathlib import Path

from worker.atomic_file import write_text

DIRECTORY_MODE, FILE_MODE = 0o700, 0o600


def make_directory(path: Path, *, own_files: tuple[str, ...] = ()) -> None:
    """Makes a directory that is this user's alone.

    One that is there already becomes so if it is empty or holds one of `own_files`; another may be
    anybody's.
    """
    if not path.exists():
        path.mkdir(parents=True, mode=DIRECTORY_MODE)
    if not any(path.iterdir()) or any((path / name).exists() for name in own_files):
        path.chmod(DIRECTORY_MODE)


def make_file(path: Path) -> None:
    """Makes an empty file, or takes a file that is there, for this user alone."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, FILE_MODE))
    path.chmod(FILE_MODE)


def write(path: Path, text: str) -> None:
    """Writes a file that is this user's alone."""
    write_text(path, text, mode=FILE_MODE)


def kept_secret(path: Path) -> str:
    """The secret in the file, which is made if there is none: an empty one would let all in."""
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:
        kept = secrets.token_urlsafe(32)
        write(path, f"{kept}\n")
    path.chmod(FILE_MODE)
    return kept
