"""Items that are made while those before them are used."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterator[Item]) -> Generator[Item]:
    """The same items in order; while one is used, the next is made in a thread.

    A thread, although a GPU works by itself: it accepts about a thousand kernels ahead, and whoever
    gives it more waits.

    What the iterator raises comes out unchanged, in its place. Closing waits for the item in work
    and throws it away; no thread stays.
    """
    end = object()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item  # type: ignore[misc]  # `end` apart, what comes is an item
