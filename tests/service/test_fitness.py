"""What keeps a worker from taking jobs."""

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
