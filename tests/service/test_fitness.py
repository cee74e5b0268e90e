"""What keeps a worker from taking jobs."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from worker.service import fitness
from worker.service.worker import Worker
from worker.settings import Settings


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_worker_starts_only_if_the_platforms_variable_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [gpu] = [check for check in fitness.checks(Worker(Settings())) if check.__name__ == "gpu"]
    with pytest.raises(RuntimeError, match="no CUDA device is visible"):
        gpu()
    monkeypatch.setenv("RUNPOD_SKIP_GPU_CHECK", "true")
    gpu()


@pytest.mark.parametrize(
    ("settings", "needed_gib"),
    [(Settings(), 2.0), (Settings(max_input_bytes=4 * 2**30), 8.6)],
)
def test_a_worker_starts_only_with_room_for_the_largest_job_that_it_allows(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, needed_gib: float
) -> None:
    [disk] = [check for check in fitness.checks(Worker(settings)) if check.__name__ == "disk"]
    free_gib = needed_gib + 0.1
    monkeypatch.setattr(psutil, "disk_usage", lambda _: SimpleNamespace(free=int(free_gib * 2**30)))
    disk()
    free_gib = needed_gib - 0.1
    with pytest.raises(RuntimeError, match="of disk are free, and the largest job"):
        disk()
