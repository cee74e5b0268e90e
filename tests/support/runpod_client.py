"""What RunPod's own client library does, in a process of its own: it reads its address on import.

    RUNPOD_ENDPOINT_BASE_URL=... runpod_client.py WAY KEY ENDPOINT_ID < job.json   # see WAYS

Prints what it saw, as one JSON object.
"""

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp
import runpod
from runpod.endpoint.asyncio.asyncio_runner import Endpoint as AsyncEndpoint


def follow_blocking(key: str, endpoint_id: str, job: dict[str, Any]) -> dict[str, Any]:
    endpoint = runpod.Endpoint(endpoint_id, api_key=key)
    seen = {"health": endpoint.health()}
    running = endpoint.run(job)
    statuses: list[str] = []
    progress: list[Any] = []
    while not statuses or statuses[-1] in ("IN_QUEUE", "IN_PROGRESS"):
        statuses.append(running.status())
        output = running.output()
        if isinstance(output, dict) and "progress" in output:
            progress.append(output["progress"])
        time.sleep(0.05)
    seen |= {"id": running.job_id, "statuses": statuses, "progress": progress}
    seen["output"] = running.output()
    small = {**job, "input": {**job["input"], "num_inference_steps": 1}}
    small.pop("webhook", None)
    seen["run_sync"] = endpoint.run_sync(small, timeout=300)
    long = endpoint.run({**small, "input": {**job["input"], "num_inference_steps": 100}})
    while long.status() == "IN_QUEUE":
        time.sleep(0.1)
    seen["cancel"] = long.cancel()
    seen["after_cancel"] = long.status()
    seen["purge"] = endpoint.purge_queue()
    return seen


async def follow_async(key: str, endpoint_id: str, job: dict[str, Any]) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        endpoint = AsyncEndpoint(endpoint_id, session, api_key=key)
        running = await endpoint.run({**job["input"], "num_inference_steps": 1})
        output = await running.output(timeout=300)
        status = await running.status()
        waiting = await endpoint.run({**job["input"], "num_inference_steps": 100})
        return {
            "output": output,
            "status": status,
            "health": await endpoint.health(),
            "cancel": await waiting.cancel(),
            "purge": await endpoint.purge_queue(),
        }


def stream_blocking(key: str, endpoint_id: str, job: dict[str, Any]) -> list[int]:
    return [part["part"] for part in runpod.Endpoint(endpoint_id, key).run(job).stream()]


async def stream_async(key: str, endpoint_id: str, job: dict[str, Any]) -> list[int]:
    async with aiohttp.ClientSession() as session:
        running = await AsyncEndpoint(endpoint_id, session, api_key=key).run(job["input"])
        return [part["part"] async for part in running.stream()]


WAYS = {
    "sync": follow_blocking,
    "async": lambda *what: asyncio.run(follow_async(*what)),
    "stream": stream_blocking,
    "async-stream": lambda *what: asyncio.run(stream_async(*what)),
}

if __name__ == "__main__":
    way, key, endpoint_id = sys.argv[1:]
    print(json.dumps(WAYS[way](key, endpoint_id, json.load(sys.stdin))))
