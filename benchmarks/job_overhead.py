"""What a job costs beside generation: the way to the worker and back, its inputs, the store.

    python -m benchmarks.job_overhead [--jobs 20]

Jobs one after the other, through the local endpoint and its object store to a worker as RunPod runs
it, whose model draws at once. Of the time between the hand-over and the result, that of encoding,
denoising and decoding (which writes the mp4) is taken away. The first job stands apart: a worker
tries its store once. Exit code 1 if the median is over the limit, or if the jobs leave a process, a
file or an open descriptor behind.
"""

import argparse
import base64
import contextlib
import os
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

import psutil

from local_endpoint import JobRecord, LocalEndpoint, WorkerProcess

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
WORKER = ROOT / "benchmarks" / "drawing_worker.py"
GENERATION = ("preprocess_seconds", "denoise_seconds", "decode_seconds")
LIMIT_SECONDS = 0.5
JOB_SECONDS = 300.0


def overhead_seconds(job: JobRecord) -> float:
    """What of the job's time was not generation."""
    assert job.status == "COMPLETED", job.error
    assert job.ended_at_seconds is not None
    assert job.claimed_at_seconds is not None
    metrics = job.output["metrics"]
    generation = sum(metrics[name] for name in GENERATION)
    return float(job.ended_at_seconds - job.claimed_at_seconds - generation)


def belongings(worker: WorkerProcess) -> Counter[str]:
    """What the worker has: processes, dead ones that nobody waited for, descriptors, files."""
    own = psutil.Process(worker.pid)
    held = Counter[str](files=sum(1 for _ in worker.temporary_directory.rglob("*")))
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            held["zombies"] += process.status() == psutil.STATUS_ZOMBIE
            held["descriptors"] += process.num_fds()
            held["processes"] += 1
    return held


def main() -> int:
    """Prints the table; 1 if a job costs too much or leaves something behind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.job_overhead")
    parser.add_argument("--jobs", type=int, default=20)
    arguments = parser.parse_args()
    job = {
        "input": {
            "image": base64.b64encode((DEMO / "portrait.png").read_bytes()).decode(),
            "audio": base64.b64encode((DEMO / "speech.wav").read_bytes()).decode(),
            "resolution": 256,
        }
    }
    with (
        tempfile.TemporaryDirectory() as name,
        LocalEndpoint(Path(name, "state"), with_object_store=True) as endpoint,
    ):
        environment = {
            "PYTHONPATH": str(ROOT),
            "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
            **endpoint.object_store.environment,
        }
        with WorkerProcess(
            endpoint, Path(name, "worker"), script=WORKER, environment=environment
        ) as worker:
            worker.wait_until_polling(timeout_seconds=120)
            jobs = [endpoint.wait(endpoint.submit(job), JOB_SECONDS)]
            before, memory = belongings(worker), psutil.Process(worker.pid).memory_info().rss
            jobs += [
                endpoint.wait(endpoint.submit(job), JOB_SECONDS) for _ in range(arguments.jobs)
            ]
            left = belongings(worker) - before
            grown = psutil.Process(worker.pid).memory_info().rss - memory
    first, *others = [overhead_seconds(job) for job in jobs]
    median = statistics.median(others)
    uploads = [job.output["metrics"]["upload_seconds"] for job in jobs[1:]]
    downloads = [job.output["metrics"]["download_seconds"] for job in jobs[1:]]
    rows = {
        "processors": os.cpu_count(),
        "jobs": len(others),
        "overhead of the first job": f"{first:.3f} s",
        "overhead of the others": f"{median:.3f} s median, {max(others):.3f} at most",
        "of it inputs": f"{statistics.median(downloads):.3f} s median",
        "of it upload": f"{statistics.median(uploads):.3f} s median",
        "left behind": ", ".join(f"{count} {name}" for name, count in left.items()) or "nothing",
        "memory grown by": f"{grown / 2**20:.0f} MiB",
    }
    for row, value in rows.items():
        sys.stdout.write(f"{row:28} {value}\n")
    return int(median > LIMIT_SECONDS or bool(left))


if __name__ == "__main__":
    sys.exit(main())
