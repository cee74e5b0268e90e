"""Where the time goes from the start of the worker's process to its first poll for a job.

    python -m benchmarks.startup [--runs 5]

Starts `handler.py` with the demo model against the local control plane, in turns as it is and with
a probe, which takes the time of some imports and calls. The rows of the table are medians; a row's
own time is its time without that of the rows that ran inside it, in the same thread. Processor time
says more than wall time where the machine is busy.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from local_endpoint import LocalEndpoint, WorkerProcess

TIMEOUT_SECONDS = 120.0

# Runs in the worker before anything else, by Python's own hook for that, and in no child of it.
PROBE = '''
import functools, importlib, importlib.machinery, json, os, sys, threading, time

MODULES = {
    "worker": [],
    "pydantic": [],
    "numpy": [],
    "av": [],
    "boto3": [],
    "worker.settings": [],
    "worker.service.worker": ["Worker.load"],
    "worker.service.serve": [],
    "worker.generation.engine": ["Engine.load"],
    "worker.loading.loader": ["load"],
    "worker.generation.pipeline": [],
    "worker.model.transformer": [],
    "torch": [],
    "torch._C": [],
    "torch._dynamo": [],
    "torch.distributed.tensor": [],
    "sympy": [],
    "transformers": [],
    "transformers.modeling_utils": [],
    "transformers.generation": [],
    "diffusers": [],
    "diffusers.models.modeling_utils": [],
    "diffusers.models.transformers": [],
    "diffusers.pipelines.pipeline_utils": [],
    "accelerate": [],
    "runpod": [],
    "cpuinfo.cpuinfo": ["get_cpu_info"],
    "runpod.serverless.worker": ["run_worker"],
    "runpod.serverless.modules.rp_fitness": ["run_fitness_checks"],
    "runpod.serverless.modules.rp_ping": ["Heartbeat.start_ping"],
    "runpod.serverless.modules.rp_job": ["get_job"],
}
FIRST_POLL = "runpod.serverless.modules.rp_job.get_job"
spans = []
inside = threading.local()


def span(name, action):
    """Runs the action and notes its time, and that of what it ran inside."""
    stack = inside.__dict__.setdefault("stack", [])
    note = {"name": name, "thread": threading.current_thread().name, "nested": [0.0, 0.0]}
    stack.append(note)
    begun, begun_cpu = time.monotonic(), time.thread_time()
    try:
        return action()
    finally:
        wall, cpu = time.monotonic() - begun, time.thread_time() - begun_cpu
        stack.pop()
        if stack:
            stack[-1]["nested"][0] += wall
            stack[-1]["nested"][1] += cpu
        nested = note.pop("nested")
        own = {"own_seconds": wall - nested[0], "own_cpu_seconds": cpu - nested[1]}
        spans.append(note | {"starts_at": begun, "seconds": wall, **own})


def finish():
    times = os.times()
    facts = {"spans": spans, "first_poll_at": time.monotonic(), "cpu_seconds": sum(times[:2])}
    with open(os.environ["STARTUP_PROBE"], "w") as file:  # read after the first poll
        json.dump(facts, file)


def wrap(module, dotted):
    """Has calls of the module's function or method noted."""
    *owners, name = dotted.split(".")
    owner = functools.reduce(getattr, owners, module)
    original = owner.__dict__[name] if owners else getattr(owner, name)
    function = original.__func__ if isinstance(original, classmethod) else original
    label = f"{module.__name__}.{dotted}"

    @functools.wraps(function)
    def noted(*args, **kwargs):
        if label == FIRST_POLL:
            finish()
            setattr(owner, name, original)
        return span(label + "()", lambda: function(*args, **kwargs))

    setattr(owner, name, classmethod(noted) if isinstance(original, classmethod) else noted)


class Finder:
    """Has the execution of the modules noted."""

    def find_spec(self, name, path=None, target=None):
        if name not in MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            span("import " + name, lambda: execute(module))
            for dotted in MODULES[name]:
                wrap(sys.modules[name], dotted)

        spec.loader.exec_module = exec_module
        return spec


if sys.orig_argv[-1].endswith("handler.py"):
    spans.append({"name": "interpreter", "thread": "MainThread", "starts_at": None})
    spans[0]["ends_at"], spans[0]["own_cpu_seconds"] = time.monotonic(), time.process_time()
    sys.meta_path.insert(0, Finder())
'''


@dataclass(frozen=True)
class Start:
    """One start of the worker."""

    seconds: float  # from the start of the process until it polled
    cpu_seconds: float  # of the worker until then
    children_cpu_seconds: float  # of the processes that it had started and that have ended
    rows: dict[str, dict[str, float]]  # by name; empty without the probe
    threads: dict[str, str]


def start_once(endpoint: LocalEndpoint, *, probe: bool) -> Start:
    """Starts a worker, waits for its first poll, and ends it."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        environment = {"AVATAR_MODEL": "demo"}
        notes_path = directory / "notes.json"
        if probe:
            (directory / "sitecustomize.py").write_text(PROBE)
            environment |= {"PYTHONPATH": name, "STARTUP_PROBE": str(notes_path)}
        worker = WorkerProcess(endpoint, directory / "worker", environment=environment)
        begun = time.monotonic()
        with worker:
            worker.wait_until_polling(TIMEOUT_SECONDS)
            seconds = time.monotonic() - begun
            times = psutil.Process(worker.pid).cpu_times()
        notes = json.loads(notes_path.read_text()) if probe else {"spans": []}
    rows, threads = {}, {}
    for span in notes["spans"]:
        if span["starts_at"] is None:  # the interpreter, until the probe was there
            span |= {"starts_at": begun, "seconds": span["ends_at"] - begun}
            span["own_seconds"] = span["seconds"]
        rows[span["name"]] = {
            "starts at": span["starts_at"] - begun,
            "wall": span["seconds"],
            "own wall": span["own_seconds"],
            "own CPU": span["own_cpu_seconds"],
        }
        threads[span["name"]] = span["thread"]
    return Start(
        seconds,
        times.user + times.system,
        times.children_user + times.children_system,
        rows,
        threads,
    )


def median(values: list[float]) -> float:
    return statistics.median(values)


def print_rows(starts: list[Start]) -> None:
    """The table of the probed starts."""
    names = [name for name in starts[0].rows if all(name in start.rows for start in starts)]

    def column(name: str, key: str) -> float:
        return median([start.rows[name][key] for start in starts]) * 1000

    write = sys.stdout.write
    write(f"\n{'ms':52}{'starts at':>10}{'wall':>8}{'own wall':>10}{'own CPU':>9}  thread\n")
    for name in sorted(names, key=lambda name: column(name, "starts at")):
        cells = [column(name, key) for key in ("starts at", "wall", "own wall", "own CPU")]
        write(f"{name:52}{cells[0]:10.0f}{cells[1]:8.0f}{cells[2]:10.0f}{cells[3]:9.0f}")
        write(f"  {starts[0].threads[name]}\n")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs: int = parser.parse_args().runs
    plain, probed = [], []
    with LocalEndpoint() as endpoint:
        start_once(endpoint, probe=False)  # brings the files into the page cache
        for _ in range(runs):
            plain.append(start_once(endpoint, probe=False))
            probed.append(start_once(endpoint, probe=True))
    print_rows(probed)
    figures: dict[str, Callable[[Start], Any]] = {
        "seconds until the first poll": lambda start: start.seconds,
        "processor seconds of the worker": lambda start: start.cpu_seconds,
        "processor seconds of its children": lambda start: start.children_cpu_seconds,
    }
    sys.stdout.write(f"\nas it is, medians of {runs} (least to most); load {psutil.getloadavg()}\n")
    for label, figure in figures.items():
        values = [figure(start) for start in plain]
        sys.stdout.write(
            f"{label:40}{median(values):6.2f}  ({min(values):.2f} to {max(values):.2f})\n"
        )


if __name__ == "__main__":
    main()
