"""How the local endpoint answers under load: many clients, two workers, no generation time.

    python -m benchmarks.endpoint_load [--jobs 200] [--clients 20]

The endpoint runs in a process of its own. All clients at once submit their share of the jobs, and
then ask for the status of one after another until it is over. The bare answer beside it is the same
server's 404, which touches no job: what is left when the endpoint's own work is taken away.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import psutil

from local_endpoint import LocalEndpoint, WorkerProcess

HANDLER = """
import runpod

async def handler(job):
    return {"number": job["input"]["number"]}

if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
"""


def serve(pipe: Connection, directory: str) -> None:
    """The endpoint with two workers, until the pipe brings a word."""
    script = Path(directory, "handler.py")
    script.write_text(HANDLER)
    with ExitStack() as stack:
        endpoint = stack.enter_context(LocalEndpoint(Path(directory, "state")))
        workers = [
            stack.enter_context(WorkerProcess(endpoint, Path(directory, name), script=script))
            for name in "ab"
        ]
        for worker in workers:
            worker.wait_until_polling(60)
        pipe.send((endpoint.url, endpoint.api_key))
        pipe.recv()


def follow(client: httpx.Client, numbers: range) -> tuple[list[float], list[dict[str, Any]]]:
    """Seconds of each status answer, and the last state of each job."""
    seconds: list[float] = []
    states = []
    job_ids = []
    for number in numbers:
        job = {"input": {"number": number}}
        job_ids.append(client.post("/run", json=job).raise_for_status().json()["id"])
    for job_id in job_ids:
        state: dict[str, Any] = {"status": "IN_QUEUE"}
        while state["status"].startswith("IN_"):
            time.sleep(0.05)
            begun = time.perf_counter()
            state = client.get(f"/status/{job_id}").raise_for_status().json()
            seconds.append(time.perf_counter() - begun)
        states.append(state)
    return seconds, states


def main() -> int:
    """Prints the table; 1 if a job did not end well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endpoint_load")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    arguments = parser.parse_args()
    share = arguments.jobs // arguments.clients
    ours, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory() as directory:
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(theirs, directory)
        )
        server.start()
        url, key = ours.recv()
        assert server.pid is not None
        process = psutil.Process(server.pid)
        with (
            httpx.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {key}"},
                timeout=60,
                limits=httpx.Limits(max_connections=arguments.clients),
            ) as client,
            ThreadPoolExecutor(arguments.clients) as pool,
        ):
            memory = [process.memory_info().rss]
            shares = [range(n * share, (n + 1) * share) for n in range(arguments.clients)]
            begun = time.perf_counter()
            running = [pool.submit(follow, client, numbers) for numbers in shares]
            while not all(future.done() for future in running):
                time.sleep(1)
                memory.append(process.memory_info().rss)
            seconds = [value for future in running for value in future.result()[0]]
            states = [state for future in running for state in future.result()[1]]
            took = time.perf_counter() - begun
            bare = []
            for _ in range(200):
                start = time.perf_counter()
                client.get("/status/none")
                bare.append(time.perf_counter() - start)
        ours.send("end")
        server.join()
    cuts = statistics.quantiles(seconds, n=100)
    rows = {
        "processors": os.cpu_count(),
        "jobs": len(states),
        "completed": sum(state["status"] == "COMPLETED" for state in states),
        "seconds in all": round(took, 1),
        "status answers": len(seconds),
        "status median, ms": round(1000 * statistics.median(seconds), 1),
        "status 95 %, ms": round(1000 * cuts[94], 1),
        "bare answer alone, median, ms": round(1000 * statistics.median(bare), 1),
        "endpoint's memory first, MiB": round(memory[0] / 2**20, 1),
        "endpoint's memory most, MiB": round(max(memory) / 2**20, 1),
        "endpoint's memory last, MiB": round(memory[-1] / 2**20, 1),
    }
    for name, value in rows.items():
        print(f"{name:>30}  {value}")  # noqa: T201
    print(json.dumps(rows))  # noqa: T201
    return 0 if rows["completed"] == arguments.jobs else 1


if __name__ == "__main__":
    sys.exit(main())
