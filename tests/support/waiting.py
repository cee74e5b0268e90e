"""Waiting in tests: for a state to come, and never for a time to pass."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Nothing that a test waits for takes so long, on however busy a machine: beyond it something hangs.
PATIENCE_SECONDS = 300.0
# What must come at once has come within it on a busy machine. What a test tells it from takes a
# minute at least.
AT_ONCE_SECONDS = 30.0
LOOK_SECONDS = 0.02


def wait_until(
    holds: Callable[[], T | None],
    tell: Callable[[], object] = lambda: "it did not come",
    seconds: float = PATIENCE_SECONDS,
) -> T:
    """What `holds` returns, once that is true; `tell` says what there is instead."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, tell()
        time.sleep(LOOK_SECONDS)
    return value
