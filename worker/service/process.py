"""This process itself: its memory given back to the system, and an end that waits for nobody."""

import ctypes
import gc
import logging
import multiprocessing
import os
import sys
from contextlib import suppress
from typing import NoReturn


def exit_now(status: int) -> NoReturn:
    """Ends this process and its children, whatever its threads do.

    Python's own end would join them, and one may wait for a lost rank in vain; so does torch's.
    """
    for process in multiprocessing.active_children():  # the SDK's, which would go on
        process.terminate()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def trim_memory() -> None:
    """Frees what a job has left in cycles, and returns to the system what has been freed.

    Clients of stores are in cycles, and their connections would stay open for dozens of jobs; what
    is freed glibc keeps, and the process would swell.
    """
    gc.collect()  # quick: what was there at the start is frozen
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
