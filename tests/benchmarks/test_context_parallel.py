"""The benchmark of a shared CFG branch, with processes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOY = "--device cpu --sizes 64x32 32x32 --num-frames 2 --times 1 --num-layers 2"
TOY += " --num-single-layers 2 --num-attention-heads 2"


@pytest.mark.slow
def test_it_times_each_size_alone_and_shared() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.context_parallel", *TOY.split()],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *sizes = map(json.loads, done.stdout.splitlines())
    assert first["num_gpus"] == 2
    assert [size["size"] for size in sizes] == ["64x32", "32x32"]
    for size in sizes:
        assert size["relative_difference"] < 1e-5
        assert min(size[name] for name in ("ratio", "to_heads_ms", "back_ms")) > 0
