"""What a client sees when one of several GPUs' processes is lost, through handler.py.

    python -m benchmarks.rank_faults --directory DIR [--num-gpus 2] [--faults kill stop memory]
    python -m benchmarks.rank_faults --demo --resolution 256 --faults kill stop

A worker of the local endpoint denoises a job on all GPUs when the fault strikes: the process of the
last GPU is killed or stopped by a signal, or its GPU's memory is taken by another process before
the job, which then has the largest picture. A line each says after how many seconds the job had
failed, as what, and the worker was gone; then a new worker takes the same job again. Takes the
model directory that `python -m benchmarks.loading` writes, or the demo model on a CPU.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.random_model import report
from benchmarks.served_jobs import SIZES, request
from local_endpoint import JobRecord, LocalEndpoint, WorkerProcess

START_SECONDS = 600.0
JOB_SECONDS = 3600.0
END_SECONDS = 120.0  # of the worker, once its job has failed
LONG, SHORT = 100, 4  # steps: to be met while it runs; to see that all is well again
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
# Leaves less free than a step takes, and says so when it is done.
HOG = """
import sys, torch
free, _ = torch.cuda.mem_get_info(int(sys.argv[1]))
held = torch.empty(free - 2**28, dtype=torch.uint8, device=f"cuda:{sys.argv[1]}")
print("held", flush=True)
sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--directory", type=Path, help="of the model")
    model.add_argument("--demo", action="store_true")
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--resolution", type=int, choices=SIZES, default=384)
    parser.add_argument("--faults", nargs="+", choices=[*SIGNALS, "memory"], default=[*SIGNALS])
    given = parser.parse_args()
    chosen = {"AVATAR_MODEL": "demo", "RUNPOD_SKIP_GPU_CHECK": "true"}
    if given.directory:
        chosen = {"MODEL_DIR": str(given.directory)}
    environment = os.environ | chosen | {"NUM_GPUS": str(given.num_gpus)}  # noqa: TID251 (theirs)
    with LocalEndpoint() as endpoint, tempfile.TemporaryDirectory() as directory:
        for fault in given.faults:
            with _worker(endpoint, Path(directory) / fault, environment) as worker:
                strike(endpoint, worker, fault, given.num_gpus - 1, given.resolution)
            with _worker(endpoint, Path(directory) / f"{fault}-again", environment):
                job = _run(endpoint, given.resolution, SHORT)
                report(fault=fault, again=job.status, num_gpus=_metrics(job).get("num_gpus"))


def strike(
    endpoint: LocalEndpoint, worker: WorkerProcess, fault: str, last: int, resolution: int
) -> None:
    """Reports what one fault does to a job, and to the worker."""
    if fault == "memory":
        with _full(last):
            begun = time.monotonic()
            job = _run(endpoint, max(SIZES), SHORT)
    else:
        job_id = endpoint.submit(_job(resolution, LONG))
        endpoint.wait_until(job_id, lambda job: _has_begun(job) or job.is_over, JOB_SECONDS)
        begun = time.monotonic()
        _rank_process(worker.pid, last).send_signal(SIGNALS[fault])
        job = endpoint.wait(job_id, JOB_SECONDS)
    failed = time.monotonic() - begun
    status = worker.wait(END_SECONDS) if job.status == "FAILED" else None
    report(
        fault=fault,
        status=job.status,
        seconds_until_known=round(failed, 2),
        error=job.error,
        is_retryable=(job.output or {}).get("error_info", {}).get("retryable"),
        seconds_until_gone=round(time.monotonic() - begun, 2),
        exit_status=status,
        log=[line for line in worker.log.splitlines() if f"GPU {last}:" in line][-2:],
    )


@contextmanager
def _worker(
    endpoint: LocalEndpoint, directory: Path, environment: dict[str, str]
) -> Iterator[WorkerProcess]:
    with WorkerProcess(endpoint, directory, environment=environment) as worker:
        worker.wait_until_polling(START_SECONDS)
        yield worker


@contextmanager
def _full(device: int) -> Iterator[None]:
    """Another process holds that GPU's memory."""
    command = [sys.executable, "-c", HOG, str(device)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as hog:  # noqa: S603  # our own
        assert hog.stdin is not None
        assert hog.stdout is not None
        try:
            if hog.stdout.readline() != b"held\n":
                raise SystemExit(f"GPU {device} has no memory that can be held")
            yield
        finally:
            hog.stdin.close()


def _rank_process(pid: int, number: int) -> psutil.Process:
    """That of the GPU with this number."""
    ranks = [
        process
        for process in psutil.Process(pid).children(recursive=True)
        if "worker.multi_gpu.rank_process" in " ".join(process.cmdline())
    ]
    return sorted(ranks, key=lambda process: process.create_time())[number - 1]


def _job(resolution: int, steps: int) -> dict[str, Any]:
    return {"input": request(resolution, "quality", steps)}


def _run(endpoint: LocalEndpoint, resolution: int, steps: int) -> JobRecord:
    return endpoint.wait(endpoint.submit(_job(resolution, steps)), JOB_SECONDS)


def _has_begun(job: JobRecord) -> bool:
    return any(payload["step"] for payload in job.progress)


def _metrics(job: JobRecord) -> dict[str, Any]:
    metrics: dict[str, Any] = (job.output or {}).get("metrics", {})
    return metrics


if __name__ == "__main__":
    main()
