"""Waiting, on the server's event loop, until something holds that any request may bring about."""

import asyncio
import time
from collections.abc import Callable


class Changes:
    """Made and used on one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._next = self._loop.create_future()

    def notify(self) -> None:
        """Wakes everything that waits, to look again."""
        self._next.set_result(None)
        self._next = self._loop.create_future()

    async def until(self, condition: Callable[[], bool], timeout_seconds: float) -> bool:
        """Whether `condition` came to hold in time."""
        deadline = time.monotonic() + timeout_seconds
        while not (holds := condition()) and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait({self._next}, timeout=left)
        return holds
