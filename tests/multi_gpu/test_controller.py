"""What becomes of a job, and of the worker, when one of its ranks is lost."""

import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from avatar_client.contract import job_errors
from tests.multi_gpu import failing_rank
from tests.multi_gpu.jobs import TWO, Video, conditioning, params, rank_process_of
from tests.support.waiting import wait_until
from worker.generation import engine as engine_module
from worker.generation.engine import Engine
from worker.generation.watch import Watch
from worker.multi_gpu import controller, messages
from worker.multi_gpu.controller import Rank, RankController
from worker.service import fitness
from worker.service.worker import Worker

Start = Callable[..., Engine]

LONG = Video(num_latents=97, height=8, width=8, num_frames=385, num_tiles=8)


@pytest.fixture
def put_fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the rank processes of an engine fail as `failing_rank.py` says."""

    def put_fault(fault: str) -> None:
        monkeypatch.setattr(engine_module, "RANK_LOAD", failing_rank.LOAD)
        monkeypatch.setenv("RANK_FAULT", fault)

    return put_fault


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts an engine whose ranks a test may lose; arguments are limits of the controller."""
    engines = []

    def start(**limits: float) -> Engine:
        for name, value in limits.items():
            monkeypatch.setattr(controller, name, value)
        engines.append(Engine.start(TWO))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.mark.slow
def test_a_rank_process_that_is_killed_fails_the_job_at_once_and_for_a_retry(start: Start) -> None:
    engine = start()
    lost_at = []

    def kill(step: int, num_steps: int) -> None:
        if step == 3:
            rank_process_of().kill()
            lost_at.append(time.monotonic())

    job = (conditioning(engine), params(), 7)
    with pytest.raises(job_errors.GpuFaultError) as caught:
        engine.denoise(*job, Watch(on_step=kill))
    assert time.monotonic() - lost_at[0] < 30.0
    assert caught.value.retryable
    assert caught.value.refresh_worker
    assert engine.is_lost
    with pytest.raises(job_errors.GpuFaultError):  # nor is another job begun
        engine.denoise(*job)


def test_a_rank_process_that_is_killed_while_frames_are_decoded_fails_the_job_for_a_retry(
    start: Start,
) -> None:
    engine = start()
    chunks = LONG.chunks(engine)
    assert len(next(chunks)) == 49
    rank_process_of().kill()
    with pytest.raises(job_errors.GpuFaultError) as caught:
        list(chunks)
    assert caught.value.retryable
    assert caught.value.refresh_worker
    assert engine.is_lost
    # a video that has been denoised before needs the other rank no more
    assert sum(map(len, LONG.chunks(engine))) == LONG.num_frames


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_tile_is_told_to_who_waits_for_the_job(
    start: Start, put_fault: Callable[[str], None]
) -> None:
    put_fault("hang in decoding")
    engine = start(GATHER_TIMEOUT_SECONDS=1.0)
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(lambda: list(LONG.chunks(engine)))
        wait_until(lambda: engine.stuck_error is not None)
        assert isinstance(engine.stuck_error, job_errors.GpuFaultError)
        assert not job.done()
        engine.close()  # the process that the thread waits for ends
        with pytest.raises(job_errors.GpuFaultError):
            job.result()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "work"),
    [
        ("memory", lambda engine: engine.denoise(conditioning(engine), params(), 7)),
        ("memory in decoding", lambda engine: list(LONG.chunks(engine))),
    ],
    ids=["a step", "a tile"],
)
def test_memory_that_is_too_small_on_another_gpu_is_told_as_that(
    start: Start,
    put_fault: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
    fault: str,
    work: Callable[[Engine], object],
) -> None:
    put_fault(fault)
    engine = start()
    with pytest.raises(job_errors.OutOfMemoryError):
        work(engine)
    assert engine.is_lost
    assert "GPU 1: OutOfMemoryError: CUDA out of memory" in caplog.text


@pytest.mark.slow
def test_a_failure_of_rank_0_in_a_step_is_told_as_its_own_and_loses_the_others(
    start: Start,
) -> None:
    engine = start()
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    hook = engine.pipeline.transformer.register_forward_pre_hook(fail)
    with pytest.raises(job_errors.OutOfMemoryError):
        engine.denoise(conditioning(engine), params(), 7)
    hook.remove()
    assert engine.is_lost
    rank_process = rank_process_of()
    engine.close()
    assert not rank_process.is_running()


@pytest.mark.slow
def test_a_rank_process_that_is_stopped_is_lost_soon_but_not_one_whose_machine_stood_still(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(STOPPED_TIMEOUT_SECONDS=3.0)
    clock = JumpingClock()
    monkeypatch.setattr(controller, "time", clock)

    def disturb(step: int, num_steps: int) -> None:
        if step == 1:
            clock.ahead_seconds = 1000.0
            time.sleep(3 * messages.HEARTBEAT_SECONDS)  # for the watch to look
        elif step == 2:
            rank_process_of().suspend()

    with pytest.raises(job_errors.GpuFaultError):
        engine.denoise(conditioning(engine), params(), 7, Watch(on_step=disturb))
    assert "GPU 1: its process is stopped" in caplog.text


class JumpingClock:
    """The module `time`, whose clock can be put forward."""

    ahead_seconds = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_seconds


def test_a_rank_process_is_silent_for_longer_if_it_is_not_stopped() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        ours, _ = multiprocessing.Pipe()
        rank = Rank(1, process, ours)
        assert rank.silence() is None  # it is still importing
        rank.silent_seconds = 0.9 * controller.HEARTBEAT_TIMEOUT_SECONDS
        assert rank.silence() is None
        rank.silent_seconds = 1.1 * controller.HEARTBEAT_TIMEOUT_SECONDS
        assert rank.silence() == "gave no sign of life"
        psutil.Process(process.pid).suspend()
        rank.silent_seconds = 1.1 * controller.STOPPED_TIMEOUT_SECONDS
        wait_until(lambda: rank.silence() == "is stopped")
        rank.silent_seconds = 0.9 * controller.STOPPED_TIMEOUT_SECONDS
        assert rank.silence() is None
        process.kill()
    rank.silent_seconds = 1.1 * controller.STOPPED_TIMEOUT_SECONDS
    assert rank.silence() is None  # its pipe tells


def test_a_rank_that_cannot_load_its_model_keeps_the_worker_from_starting(
    put_fault: Callable[[str], None],
) -> None:
    put_fault("load")
    worker = Worker(TWO)
    worker.load()
    [check] = [check for check in fitness.checks(worker) if check.__name__ == "model"]
    with pytest.raises(RuntimeError, match="GPU 1: OSError: no weights here"):
        check()


def test_a_rank_process_that_dies_while_it_imports_is_told_with_its_status() -> None:
    ranks = RankController(TWO, [torch.device("cpu")] * 2, "tests.no_such_module:load")
    try:
        with pytest.raises(RuntimeError, match="GPU 1: its process ended with status 1"):
            ranks.join(None, timeout_seconds=300.0)
    finally:
        ranks.close()


def test_a_rank_that_takes_too_long_to_load_keeps_the_others_from_joining(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller, "EXIT_TIMEOUT_SECONDS", 0.0)
    ranks = RankController(TWO, [torch.device("cpu")] * 2, failing_rank.LOAD)
    with pytest.raises(RuntimeError, match="GPU 1: not ready after 0 s"):
        ranks.join(None, timeout_seconds=0.0)
    ranks.close()
