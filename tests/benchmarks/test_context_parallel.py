"""The benchmark of a shared CFG branch, with processes on the CPU."""

import pytest

from tests.support.benchmarks import run_benchmark

TOY = "--device cpu --sizes 64x32 32x32 --num-frames 2 --times 1 --num-layers 2"
TOY += " --num-single-layers 2 --num-attention-heads 2"


@pytest.mark.slow
def test_it_times_each_size_alone_and_shared() -> None:
    first, *sizes = run_benchmark("context_parallel", TOY)
    assert first["num_gpus"] == 2
    assert [size["size"] for size in sizes] == ["64x32", "32x32"]
    for size in sizes:
        assert size["relative_difference"] < 1e-5
        assert size["carrier"] == "collective"
        assert min(size["ratio"], size["swaps_ms"]) > 0
