"""What becomes of a job, and of the worker, when one of its processes is lost."""

import time

import pytest
import torch

from avatar_client.contract import job_errors
from tests.multi_gpu.jobs import TWO, conditioning, follower_of, go_on, params
from worker.generation.engine import Engine
from worker.multi_gpu import controller
from worker.service import fitness
from worker.service.worker import Worker


@pytest.fixture
def start(monkeypatch):
    """Starts an engine whose processes a test may lose; arguments are a fault and limits."""
    engines = []

    def start(fault: str | None = None, **limits: float) -> Engine:
        for name, value in limits.items():
            monkeypatch.setattr(controller, name, value)
        if fault is not None:
            monkeypatch.setattr(controller, "FOLLOWER", "tests.multi_gpu.failing_rank")
            monkeypatch.setenv("FOLLOWER_FAULT", fault)
        engines.append(Engine.start(TWO))
        return engines[-1]

    yield start
    for engine in engines:
        engine.team.close()


@pytest.mark.slow
def test_a_process_that_is_killed_fails_the_job_at_once_and_for_a_retry(start):
    engine = start()
    lost_at = []

    def kill(step: int, num_steps: int) -> None:
        if step == 3:
            follower_of(engine).kill()
            lost_at.append(time.monotonic())

    job = (conditioning(engine), params(), 7)
    with pytest.raises(job_errors.GpuFaultError) as caught:
        engine.denoise(*job, kill)
    assert time.monotonic() - lost_at[0] < 5.0
    assert caught.value.retryable
    assert caught.value.refresh_worker
    assert engine.team.is_lost
    with pytest.raises(job_errors.GpuFaultError):  # nor is another job begun
        engine.denoise(*job, go_on)


def test_memory_that_is_too_small_on_another_gpu_is_told_as_that(start, caplog):
    engine = start("memory")
    with pytest.raises(job_errors.OutOfMemoryError):
        engine.denoise(conditioning(engine), params(), 7, go_on)
    assert engine.team.is_lost
    assert "GPU 1: OutOfMemoryError: CUDA out of memory" in caplog.text


@pytest.mark.slow
def test_a_failure_of_the_first_process_is_told_as_its_own_and_ends_the_team(start):
    engine = start()
    calls = []

    def fail(*_) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    hook = engine.pipeline.transformer.register_forward_pre_hook(fail)
    with pytest.raises(job_errors.OutOfMemoryError):
        engine.denoise(conditioning(engine), params(), 7, go_on)
    hook.remove()
    assert engine.team.is_lost
    follower = follower_of(engine)
    engine.team.close()
    assert not follower.is_running()


@pytest.mark.slow
def test_a_process_that_is_stopped_is_lost(start):
    engine = start(SILENT_SECONDS=3.0)

    def stop(step: int, num_steps: int) -> None:
        if step == 2:
            follower_of(engine).suspend()

    with pytest.raises(job_errors.GpuFaultError):
        engine.denoise(conditioning(engine), params(), 7, stop)


def test_a_process_that_cannot_load_its_model_keeps_the_worker_from_starting(monkeypatch):
    monkeypatch.setattr(controller, "FOLLOWER", "tests.multi_gpu.failing_rank")
    monkeypatch.setenv("FOLLOWER_FAULT", "load")
    worker = Worker(TWO)
    worker.load()
    [check] = [check for check in fitness.checks(worker) if check.__name__ == "model"]
    with pytest.raises(RuntimeError, match="GPU 1: OSError: no weights here"):
        check()


def test_a_process_that_dies_while_it_loads_keeps_the_worker_from_starting(monkeypatch):
    monkeypatch.setattr(controller, "FOLLOWER", "tests.no_such_module")
    with pytest.raises(RuntimeError, match="GPU 1: its process ended with status 1"):
        Engine.start(TWO)


def test_a_process_that_takes_too_long_to_load_keeps_the_worker_from_starting(monkeypatch):
    monkeypatch.setattr(controller, "LEAVE_SECONDS", 0.0)
    members = controller.Team(TWO, [torch.device("cpu")] * 2)
    with pytest.raises(RuntimeError, match="GPU 1: not ready after 0 s"):
        members.join(None, patience_seconds=0.0)
    members.close()
