"""The worker's entry: RunPod calls `handler` once a job, with the model loaded before the first.

`worker` comes before any other import: importing it arms the guard against broken packages.
Nothing heavy happens on import, because the SDK's heartbeat process imports this file again.
"""

import functools
from typing import Any

from worker import import_guard
from worker.jobs import Worker
from worker.settings import Settings


@functools.cache
def _worker() -> Worker:
    return Worker(Settings.from_env())


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """One job in, one video address out; a failure comes back as `{"error": ...}`."""
    return await _worker().handle(job)


def main() -> None:
    """Serves RunPod's queue, or one job with `--test_input`."""
    worker = _worker()
    import_guard.ensure()
    from worker.serve import serve  # imports the SDK, which takes a second

    serve(worker)


if __name__ == "__main__":
    main()
