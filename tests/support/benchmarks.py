"""Benchmarks as whoever measures runs them: in a process of their own."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def run_benchmark(name: str, options: str) -> list[dict[str, Any]]:
    """The JSON objects that it prints, a line each; not what it prints beside them."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *shlex.split(options)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
