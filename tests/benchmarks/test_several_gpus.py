"""The benchmark of several GPUs, with processes on the CPU."""

import pytest

from tests.support.benchmarks import run_benchmark

TOY = "--device cpu --backend native --sizes 64x32 32x32 --num-steps 2 --num-layers 2"
TOY += " --num-single-layers 2 --num-attention-heads 1"


@pytest.mark.slow
def test_it_times_each_size_alone_and_together() -> None:
    first, *runs, last = run_benchmark("several_gpus", TOY)
    assert first["num_gpus"] == 2
    sizes, decoded = runs[:2], runs[2:]
    assert [run["size"] for run in runs] == 2 * ["64x32", "32x32"]
    for size in decoded:
        assert size["decode_ratio"] > 0
        assert size["same_frames"]
    for size in sizes:
        assert size["ratio"] > 0
        assert size["relative_difference"] < 1e-3
    assert last["seconds_in_all"] > 0
