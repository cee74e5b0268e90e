"""A worker whose model draws, which writes down each video that it begins.

A video with the prompt "hold" is not finished while the file `hold` lies beside the list.
"""

import os
import time
from pathlib import Path
from typing import Any

import runpod
from runpod.serverless.modules import rp_scale

from benchmarks import drawing_worker
from tests.service.outage_worker import QuickClock
from worker.media import claim

BEGUN = Path(os.environ["BEGUN"])  # a line for each video
DRAW_SECONDS = 0.3  # so that another worker gets the same request meanwhile


class CountingDrawing(drawing_worker.Drawing):
    def denoise(
        self,
        conditioning: Any,
        params: Any,
        seed: int,
        watch: Any,
        state: Any,
    ) -> int:
        with BEGUN.open("a") as file:
            file.write(f"{os.getpid()} {params.prompt}\n")
        end = time.monotonic() + DRAW_SECONDS
        while time.monotonic() < end or (
            params.prompt == "hold" and BEGUN.with_name("hold").exists()
        ):
            watch.on_step(1, 1)
            time.sleep(0.05)
        return seed


def start(config: dict[str, Any], of_the_sdk: Any = runpod.serverless.start) -> None:
    assert os.environ["RUNPOD_LOG_CAPTURE"] == "off"  # or a client could be sent the log
    of_the_sdk(config)


if __name__ == "__main__":
    runpod.serverless.start = start
    rp_scale.asyncio = QuickClock()  # the SDK waits for a second after each job
    claim.RENEW_SECONDS = 0.5
    claim.LEASE_SECONDS = float(os.environ["LEASE_SECONDS"])
    vars(drawing_worker)["Drawing"] = CountingDrawing
    drawing_worker.main()
