"""Calls that may hang are left behind when their job must not wait any longer."""

import contextvars
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

CHECK_SECONDS = 0.25  # between two looks whether the job was stopped

T = TypeVar("T")


def call_abandonably(
    call: Callable[[], T], check: Callable[[], None], limit_seconds: float = math.inf
) -> T:
    """The result of a call that may hang: of a store that answers a byte a second, say.

    The call runs in a thread of its own, which ends with it or with the process.

    Args:
        check: raises once the job must not go on, which is met at once.

    Raises:
        TimeoutError: it took longer than the limit.
    """
    outcome: list[T | BaseException] = []
    context = contextvars.copy_context()  # the job's id, for the thread's log lines

    def run() -> None:
        try:
            outcome.append(context.run(call))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    end = time.monotonic() + limit_seconds
    while thread.is_alive():
        thread.join(CHECK_SECONDS)
        check()
        if thread.is_alive() and time.monotonic() > end:
            raise TimeoutError
    [answer] = outcome
    if isinstance(answer, BaseException):
        raise answer
    return answer
