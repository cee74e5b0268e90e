"""The loader's benchmark, at toy size on the CPU."""

from pathlib import Path

from tests.support.benchmarks import run_benchmark


def test_it_times_loads_that_gave_the_tensors_of_the_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    only = "disk 'by_worker warm' 'by_worker_in_other_settings warm'"
    machine, *lines = run_benchmark("loading", f"--directory {model} --size tiny --only {only}")
    assert machine["device"] == "cpu"
    first, compared, *others = [line for line in lines if line["step"] != "disk"]
    assert compared["tensors_compared"] == 20
    assert len(others) == 6
    for line in (first, *others):
        assert line["bytes"] == sum(path.stat().st_size for path in model.glob("*/*.safetensors"))
        assert 0 < line["seconds"] < line["seconds_with_preparation"]
        assert line["cached_share"] > 0.99
