"""What other processes make ahead of its use, in an order that no timing changes."""

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Made = TypeVar("Made")

AHEAD = 4  # results a process that wait for their use


@contextmanager
def made_ahead(
    make: Callable[[int], Made], num_processes: int, first: int = 0
) -> Iterator[Iterator[Made]]:
    """Gives the results of `make(first)`, `make(first + 1)` and so on; with no processes, in turn.

    Args:
        make: what can be pickled; so can its results, without tensors, which take file handles.
    """
    numbers = itertools.count(first)
    if num_processes == 0:
        yield map(make, numbers)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, context, initializer=_begin)
    waiting: deque[Future[Made]] = deque()

    def results() -> Iterator[Made]:
        while True:
            while len(waiting) < AHEAD * num_processes:
                waiting.append(pool.submit(make, next(numbers)))
            yield waiting.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    """One thread of work a process, and no life without the one that asked for it."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
