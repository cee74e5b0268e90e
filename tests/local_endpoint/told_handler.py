"""A handler that only does as its job tells it, in the SDK's own loop."""

import asyncio
from pathlib import Path
from typing import Any

import runpod


async def handler(job: dict[str, Any]) -> dict[Any, Any]:
    do = job["input"]
    for percent in range(0, do.get("progress", 0), 10):
        runpod.serverless.progress_update(job, {"percent": percent})
        await asyncio.sleep(0.1)
    await asyncio.sleep(do.get("sleep", 0))
    while "until" in do and not Path(do["until"]).exists():  # a file that the test makes
        await asyncio.sleep(0.05)
    if do.get("raise"):
        raise RuntimeError("as told")
    return {"echo": job, "filler": "x" * do.get("size", 0), **do.get("return", {})}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
