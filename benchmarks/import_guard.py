"""What the import guard costs a process that imports what the worker does.

    python -m benchmarks.import_guard [--runs 7]

Each row is a process of its own, and the rows take turns, so that what else the machine does falls
on all of them. Linux, with a CPU build of torch: PyPI's torchvision is then really broken.
"""

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests.import_guard.real_packages import healthy_torchvision, release, run_python

CHILD = """
import sys, time
started, started_cpu = time.perf_counter(), time.process_time()
import torch
own = 0.0
if "guard" in sys.argv:
    began = time.perf_counter()
    import worker
    worker.import_guard.ensure()
    own = time.perf_counter() - began
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPTextModel
from transformers import LlavaForConditionalGeneration, WhisperFeatureExtractor, WhisperModel
from diffusers import AutoencoderKLHunyuanVideo, DiffusionPipeline
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
wall, cpu = time.perf_counter() - started, time.process_time() - started_cpu
import json, os
from tests.import_guard.model_classes import use
use()  # what is resident once models have run, not before the first operator
pages = int(open("/proc/self/statm").read().split()[1])
print(json.dumps({
    "own_ms": own * 1000,
    "wall_ms": wall * 1000,
    "cpu_ms": cpu * 1000,
    "resident_mb": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
}))
"""


@dataclass(frozen=True)
class Row:
    """One state of the environment, and the row that it is measured against."""

    name: str
    packages: tuple[Path, ...]
    policy: str | None  # None: no guard
    baseline: str | None = None


def rows(directory: Path) -> list[Row]:
    """The table's rows. A broken package without the guard has none: it ends in an error."""
    broken = (release("torchvision", "0.28.0"),)
    broken_xformers = (release("xformers", "0.0.33.post2"),)
    broken_torchaudio = (release("torchaudio", "2.11.0"),)
    healthy = (healthy_torchvision(directory),)
    return [
        Row("absent, no guard", (), None),
        Row("absent", (), "auto", "absent, no guard"),
        Row("blocked unexamined", broken, "block", "absent, no guard"),
        Row("torchvision broken", broken, "auto", "absent, no guard"),
        Row("torchaudio broken", broken_torchaudio, "auto", "absent, no guard"),
        Row("xformers broken", broken_xformers, "auto", "absent, no guard"),
        Row("healthy, no guard", healthy, None),
        Row("healthy", healthy, "auto", "healthy, no guard"),
    ]


def measure(row: Row) -> dict[str, float]:
    """The child's own measurements."""
    if row.policy is None:
        child = run_python("-c", CHILD, packages=row.packages)
    else:
        child = run_python("-c", CHILD, "guard", packages=row.packages, IMPORT_GUARD=row.policy)
    (facts,) = child.facts
    return facts


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs: int = parser.parse_args().runs
    measured: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        table = rows(Path(directory))
        for _ in range(runs):
            for row in table:
                measured[row.name].append(measure(row))
    write = sys.stdout.write
    write(f"medians of {runs} runs; + is over the same environment without the guard\n")
    write(f"{'torchvision, guard':22}{'guard ms':>9}{'wall ms':>9}{'CPU ms':>9}{'MB':>8}")
    write(f"{'+wall':>8}{'+CPU':>7}{'+MB':>7}\n")
    medians = {
        name: {key: statistics.median(run[key] for run in each) for key in each[0]}
        for name, each in measured.items()
    }
    for row in table:
        own, wall, cpu, resident = medians[row.name].values()
        write(f"{row.name:22}{own:9.1f}{wall:9.0f}{cpu:9.0f}{resident:8.1f}")
        if row.baseline:
            _, wall_0, cpu_0, resident_0 = medians[row.baseline].values()
            write(f"{wall - wall_0:+8.0f}{cpu - cpu_0:+7.0f}{resident - resident_0:+7.1f}")
        write("\n")


if __name__ == "__main__":
    main()
