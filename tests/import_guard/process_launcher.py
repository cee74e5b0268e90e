"""Starts processes in each of the ways that servers do; every one of them prints its facts.

    python tests/import_guard/process_launcher.py <way>

GUARD says where the guard is: "package" as in the worker, where importing anything of ours arms it;
"main" only in the process that was started first; or "nowhere".
"""

import functools
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

if os.environ["GUARD"] == "package":
    import worker  # noqa: F401

from tests.import_guard.model_classes import print_facts, use


@functools.cache
def _outcome() -> str:
    try:
        use()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers each request with this server process's id and what became of its models."""
    body = json.dumps({"process": os.getpid(), "outcome": _outcome()}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def _start_one(method: str) -> int:
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=print_facts)
    process.start()
    process.join()
    return process.exitcode


def _start_pool() -> int:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(print_facts) for _ in range(2)]:
            future.result()
    return 0


def _serve() -> int:
    import uvicorn

    port = int(os.environ["PORT"])
    uvicorn.run("tests.import_guard.process_launcher:app", port=port, workers=2, lifespan="off")
    return 0


def main(way: str) -> int:
    """The exit code: not 0 if a process failed."""
    if os.environ["GUARD"] == "main":
        import worker  # noqa: F401
    if way == "main":
        print_facts()
        return 0
    if way == "pool":
        return _start_pool()
    if way == "uvicorn":
        return _serve()
    return _start_one(way)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
