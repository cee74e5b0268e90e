"""Several processes make one video. On a CPU they are those of a worker with several GPUs."""

from dataclasses import replace

import pytest
import torch

from avatar_client.contract import job_errors
from tests.multi_gpu.jobs import NUM_STEPS, SIDE, TWO, conditioning, go_on, params
from worker.generation.engine import Engine, _devices
from worker.settings import Settings


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many as another process has, or the last bits of sums may differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine():
    """Two processes; whatever a test does to a job, they go on."""
    engine = Engine.start(TWO)
    yield engine
    assert not engine.team.is_lost
    engine.team.close()


def assert_as_alone(engine: Engine, *arguments) -> None:
    """A batch of two rounds other last bits than two of one, and latents are kept in bfloat16."""
    expected = replace(engine, team=None).denoise(*arguments, go_on)
    difference = (engine.denoise(*arguments, go_on) - expected).norm() / expected.norm()
    assert difference < 1e-3


@pytest.mark.parametrize(
    ("seconds", "guidance_scale", "num_workers"),
    [(0.2, 7.5, 2), (6.0, 7.5, 2), (0.2, 1.0, 1)],
    ids=["one window", "two windows", "without guidance"],
)
def test_two_processes_make_the_latents_of_one(engine, seconds, guidance_scale, num_workers):
    job = (conditioning(engine, seconds), params(guidance_scale=guidance_scale), 7)
    assert engine.num_gpus(job[1]) == num_workers
    assert_as_alone(engine, *job)


def test_jobs_of_different_sizes_follow_each_other(engine):
    for width, num_steps in [(SIDE, 2), (3 * SIDE, 3), (SIDE, 1)]:
        job = (conditioning(engine, width=width), params(num_steps), 1)
        assert_as_alone(engine, *job)


@pytest.mark.parametrize("last_step", [1, 5, NUM_STEPS])
def test_a_job_that_is_stopped_after_a_step_leaves_the_next_one_whole(engine, last_step):
    def stop(step: int, num_steps: int) -> None:
        if step == last_step:
            raise job_errors.DeadlineExceededError("over")

    job = (conditioning(engine), params(), 7)
    with pytest.raises(job_errors.DeadlineExceededError):
        engine.denoise(*job, stop)
    assert_as_alone(engine, *job)


def test_the_other_process_computes_half_of_the_passes(engine):
    own = []
    hook = engine.pipeline.transformer.register_forward_hook(lambda *_: own.append(1))
    try:
        engine.denoise(conditioning(engine), params(5), 7, go_on)
    finally:
        hook.remove()
    assert len(own) == 5


@pytest.mark.parametrize(("num_gpus", "num_processes"), [(0, 1), (1, 1), (2, 2), (3, 2), (9, 8)])
def test_both_sides_of_the_guidance_get_equally_many_processes(num_gpus, num_processes):
    settings = Settings(avatar_model="demo", num_gpus=num_gpus)
    assert len(_devices(settings)) == num_processes
