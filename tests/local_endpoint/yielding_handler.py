"""A handler that yields as many parts as its job says, in the SDK's own loop."""

import time
from collections.abc import Iterator
from typing import Any

import runpod


def handler(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in range(job["input"].get("parts", 1)):
        time.sleep(job["input"].get("sleep", 0.0))
        yield {"part": part, "filler": "x" * job["input"].get("size", 0)}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler, "return_aggregate_stream": True})
