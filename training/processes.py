"""Results that other processes compute ahead of their use, in an order that no timing changes."""

import itertools
import logging
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
LOG_FORMAT = "%(asctime)s %(message)s"


@contextmanager
def prefetched(
    make: Callable[[int], Result], num_processes: int, first: int = 0
) -> Iterator[Iterator[Result]]:
    """The results of `make(first)`, `make(first + 1)` and so on; without processes, made in turn.

    The processes begin at once, and stop when so many results wait for their use.

    Args:
        make: what can be pickled; so can its results, without tensors, which take file handles.
    """
    numbers = itertools.count(first)
    if num_processes == 0:
        yield map(make, numbers)
        return
    pool = process_pool(num_processes)
    waiting: deque[Future[Result]] = deque()
    for number in itertools.islice(numbers, PREFETCHED_PER_PROCESS * num_processes):
        waiting.append(pool.submit(make, number))

    def results() -> Iterator[Result]:
        for number in numbers:
            result = waiting.popleft().result()
            waiting.append(pool.submit(make, number))
            yield result

    try:
        yield results()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def process_pool(num_processes: int) -> ProcessPoolExecutor:
    """Processes of one thread of work each, which end with this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_processes, context, initializer=_begin)


def _begin() -> None:
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
