"""A worker on the platform, where an hour takes half a minute.

What waits in the worker and in the SDK's loop waits so much less; all else is as it is.
"""

import asyncio
from typing import Any

from runpod.serverless.modules import rp_scale

from benchmarks import drawing_worker
from worker.media import store_client
from worker.service import control_plane, serve

HOUR_SECONDS = 30.0
TIME_LAPSE = 3600 / HOUR_SECONDS
SCALED: dict[Any, tuple[str, ...]] = {
    control_plane: ("FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS", "EARLY_SECONDS"),
    store_client: ("FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS"),
    serve: ("RETRY_SECONDS",),
}
ANSWER_SECONDS = 2.0  # for an answer of a busy machine: not of the platform, and so not scaled


class QuickClock:
    """asyncio, whose sleep is shorter."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / TIME_LAPSE)


def main() -> None:
    for module, names in SCALED.items():
        for name in names:
            setattr(module, name, getattr(module, name) / TIME_LAPSE)
    control_plane.ANSWER_SECONDS = ANSWER_SECONDS
    rp_scale.asyncio = QuickClock()
    drawing_worker.main()


if __name__ == "__main__":
    main()
