"""How fast a disk is, measured in a process of its own.

The worker's own threads would measure how often they get to run, while it imports and builds.
"""

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def probe(
    path: Path, num_threads: int, block_bytes: int, seconds: float
) -> Iterator[Callable[[], float | None]]:
    """Starts a measurement, and gives what waits for the result of `speed`; None if that failed.

    Leaving the context waits for its end.
    """
    values = [str(value) for value in (path, num_threads, block_bytes, seconds)]
    command = [sys.executable, "-I", "-S", __file__, *values]  # starts in 0.04 s
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603

        def result() -> float | None:
            output, _ = process.communicate()
            return float(output) if process.returncode == 0 else None

        yield result


def speed(path: Path, num_threads: int, block_bytes: int, seconds: float) -> float:
    """Bytes a second of reads past the page cache, from the end of the file on.

    Args:
        block_bytes: of one read; whole pages.
        seconds: after which no read begins.

    Raises:
        OSError: the file cannot be read, or not past the page cache.
    """
    blocks = iter(reversed(range(path.stat().st_size // block_bytes)))
    lock = threading.Lock()
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read(buffer: mmap.mmap) -> int:
        """Bytes that a thread reads in the time."""
        num_bytes = 0
        while time.monotonic() < deadline:
            with lock:
                block = next(blocks, None)
            if block is None:
                break
            num_bytes += os.preadv(descriptor, [buffer], block * block_bytes)
        return num_bytes

    flags = mmap.MAP_PRIVATE | mmap.MAP_POPULATE  # begins at a page, as such reads must
    buffers = [mmap.mmap(-1, block_bytes, flags=flags) for _ in range(num_threads)]
    with ThreadPoolExecutor(num_threads) as threads:
        started = time.monotonic()
        deadline = started + seconds
        num_bytes = sum(threads.map(read, buffers))
        elapsed = time.monotonic() - started
    os.close(descriptor)
    return num_bytes / elapsed


if __name__ == "__main__":
    _, path, num_threads, block_bytes, seconds = sys.argv
    try:
        result = speed(Path(path), int(num_threads), int(block_bytes), float(seconds))
    except OSError as error:
        sys.exit(f"the disk's speed was not measured: {error}")
    sys.stdout.write(str(result))
