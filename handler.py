"""The worker's entry: RunPod calls `handler` once a job, with the model loaded before the first.

`worker` comes before any other import: importing it arms the guard against broken packages.
Nothing heavy happens on import, because the SDK's heartbeat process imports this file again.
"""

import functools
import gc
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

from worker import import_guard, logs
from worker.service.worker import Worker
from worker.settings import Settings, secret_values


@functools.cache
def _worker() -> Worker:
    return Worker(Settings.from_env())


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """One job in, one video address out; a failure comes back as `{"error": ...}`."""
    return await _worker().handle(job)


def main() -> None:
    """Serves RunPod's queue, or one job with `--test_input`."""
    gc.disable()  # imports leave next to no garbage, and the search for it is a fifth of the start
    worker = _worker()
    logs.configure(worker.settings.runpod_log_level)
    logs.hide(secret_values())
    import_guard.ensure()
    with ThreadPoolExecutor(max_workers=1) as beside:
        # the SDK, whose import waits a second for a process that asks for the processor's name
        serving = beside.submit(import_module, "worker.service.serve")
        worker.load()
    gc.freeze()  # what is there now stays
    gc.enable()
    serving.result().serve(worker)


if __name__ == "__main__":
    main()
