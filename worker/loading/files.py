"""Reading of files in blocks, through the page cache or past it (O_DIRECT)."""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Self

import numpy as np

PAGE_BYTES = 4096  # reads past the page cache begin and end at pages, on the disk and in memory

_LIBC = ctypes.CDLL(None, use_errno=True)


class BlockReader:
    """A file that is open for reading until the context is left. Any thread may read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._through_cache = os.open(path, os.O_RDONLY)
        try:
            self._past_cache = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # not every file system can
            self._past_cache = os.open(path, os.O_RDONLY)
        self._mapping = mmap.mmap(self._through_cache, 0, prot=mmap.PROT_READ)
        self._address = np.frombuffer(self._mapping, np.uint8).ctypes.data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._mapping.close()
        os.close(self._through_cache)
        os.close(self._past_cache)

    def is_cached(self, start: int, end: int) -> bool:
        """Whether the page cache holds most of these bytes, which begin at a page.

        Yes where the kernel does not tell: it tells root, the file's owner, and whoever may write
        it. Yes also past the end of the file, where reading fails.
        """
        end = min(end, len(self._mapping))
        if end <= start:
            return True
        pages = np.empty(-(-(end - start) // PAGE_BYTES), np.uint8)
        failed = _LIBC.mincore(
            ctypes.c_void_p(self._address + start),
            ctypes.c_size_t(end - start),
            ctypes.c_void_p(pages.ctypes.data),
        )
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed", str(self._path))
        return bool((pages & 1).mean() > 0.5)

    def read(self, buffer: memoryview, start: int, num_bytes: int, *, past_cache: bool) -> None:
        """Reads `num_bytes` from `start` on into the buffer, or up to the end of their last page.

        Args:
            buffer: begins at a page of memory if the read goes past the cache.

        Raises:
            OSError: the file ends before.
        """
        descriptor = self._past_cache if past_cache else self._through_cache
        room = buffer[: -(-num_bytes // PAGE_BYTES) * PAGE_BYTES]
        filled = 0
        while filled < num_bytes:
            count = os.preadv(descriptor, [room[filled:]], start + filled)
            if count == 0:
                raise OSError(f"{self._path} ends at byte {start + filled}, inside a tensor")
            filled += count
