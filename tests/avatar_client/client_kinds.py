"""The client in its two kinds, so that one test asks both."""

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from avatar_client import AsyncAvatarEndpoint, AsyncAvatarJob, AvatarEndpoint

KINDS = ("blocking", "asyncio")
KEY = "rpa_0123456789"


@contextmanager
def clients(kind: str, api_key: str = KEY) -> Iterator[Callable[..., Any]]:
    """Makes clients of an address; they pause for milliseconds where others pause for seconds."""
    made: list[Any] = []
    with asyncio.Runner() as runner:

        def make(url: str, **options: Any) -> Any:
            options = {"poll_seconds": 0.005, **options}
            if kind == "blocking":
                made.append(AvatarEndpoint(url, api_key, **options))
            else:
                made.append(InLoop(AsyncAvatarEndpoint(url, api_key, **options), runner))
            return made[-1]

        yield make
        for client in made:
            client.close() if kind == "blocking" else client.aclose()


class InLoop:
    """An asynchronous object used as a blocking one."""

    def __init__(self, wrapped: Any, runner: asyncio.Runner) -> None:
        self._wrapped, self._runner = wrapped, runner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            result = value(*arguments, **options)
            if inspect.isasyncgen(result):
                return self._items(result)
            if inspect.iscoroutine(result):
                result = self._runner.run(result)
            return InLoop(result, self._runner) if isinstance(result, AsyncAvatarJob) else result

        return call

    def _items(self, generator: Any) -> Iterator[Any]:
        while True:
            try:
                yield self._runner.run(anext(generator))
            except StopAsyncIteration:
                return
