"""Results that other processes compute ahead of their use, in an order that no timing changes."""

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

Result = TypeVar("Result")

PREFETCHED_PER_PROCESS = 4  # results that wait for their use


@contextmanager
def prefetched(
    make: Callable[[int], Result], num_processes: int, first: int = 0
) -> Iterator[Iterator[Result]]:
    """The results of `make(first)`, `make(first + 1)` and so on; without processes, made in turn.

    Args:
        make: what can be pickled; so can its results, without tensors, which take file handles.
    """
    numbers = itertools.count(first)
    if num_processes == 0:
        yield map(make, numbers)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, context, initializer=_begin)
    waiting: deque[Future[Result]] = deque()

    def results() -> Iterator[Result]:
        while True:
            while len(waiting) < PREFETCHED_PER_PROCESS * num_processes:
                waiting.append(pool.submit(make, next(numbers)))
            yield waiting.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    """One thread of work a process, which ends with its parent."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
