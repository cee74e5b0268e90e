"""Several ranks make one video. On a CPU they are the processes of a worker with several GPUs."""

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from avatar_client.contract import job_errors
from tests.multi_gpu.jobs import (
    NUM_STEPS,
    SIDE,
    TWO,
    Video,
    assert_as_alone,
    assert_decodes_as_alone,
    assert_same_picture,
    conditioning,
    last_preview,
    params,
)
from worker.generation.denoising_state import DenoisingState
from worker.generation.engine import Engine
from worker.generation.watch import Watch
from worker.model import autoencoder
from worker.multi_gpu.controller import RankController


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many as a rank process has, or the last bits of sums may differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Two ranks; whatever a test does to a job, they go on."""
    engine = Engine.start(TWO)
    yield engine
    assert not engine.is_lost
    engine.close()


@pytest.mark.parametrize(
    ("seconds", "num_voices", "guidance_scale", "num_active_ranks"),
    [(0.2, 1, 7.5, 2), (6.0, 1, 7.5, 2), (0.2, 1, 1.0, 1), (0.2, 2, 7.5, 2)],
    ids=["one window", "two windows", "without guidance", "two voices"],
)
def test_two_ranks_make_the_latents_of_one(
    engine: Engine, seconds: float, num_voices: int, guidance_scale: float, num_active_ranks: int
) -> None:
    told = conditioning(engine, seconds, num_voices * SIDE, num_voices)
    job = (told, params(guidance_scale=guidance_scale), 7)
    assert engine.num_gpus(job[1]) == num_active_ranks
    assert_as_alone(engine, *job)


def test_a_preview_is_of_both_ranks_velocities(engine: Engine) -> None:
    job = (conditioning(engine, seconds=6.0), params(2), 7)
    alone = last_preview(replace(engine, ranks=None), *job)
    assert_same_picture(last_preview(engine, *job), alone)


def test_jobs_of_different_sizes_follow_each_other(engine: Engine) -> None:
    for width, num_steps in [(SIDE, 2), (3 * SIDE, 3), (SIDE, 1)]:
        job = (conditioning(engine, width=width), params(num_steps), 1)
        assert_as_alone(engine, *job)


@pytest.mark.parametrize("last_step", [1, 5, NUM_STEPS])
def test_a_job_that_is_stopped_after_a_step_leaves_the_next_one_whole(
    engine: Engine, last_step: int
) -> None:
    def stop(step: int, num_steps: int) -> None:
        if step == last_step:
            raise job_errors.DeadlineExceededError("over")

    job = (conditioning(engine), params(), 7)
    with pytest.raises(job_errors.DeadlineExceededError):
        engine.denoise(*job, Watch(on_step=stop))
    assert_as_alone(engine, *job)


def test_the_other_rank_computes_half_of_the_passes(engine: Engine) -> None:
    own = []
    hook = engine.pipeline.transformer.register_forward_hook(lambda *_: own.append(1))
    try:
        engine.denoise(conditioning(engine), params(5), 7)
    finally:
        hook.remove()
    assert len(own) == 5


def test_a_rank_without_sparse_attention_sees_all_keys_and_says_so(engine: Engine) -> None:
    engine = replace(engine, has_sparse_attention=True)
    job = (conditioning(engine, width=8 * SIDE), params(4, preset="draft"), 7)
    densities = []
    for each in (replace(engine, ranks=None), engine):
        sparsity = each.sparse_attention(*job[1:])
        assert sparsity is not None
        sparsity.fixed_mass = 0.1
        each.denoise(*job, Watch(sparsity=sparsity))
        densities.append(sparsity.report().density)
    alone, together = densities
    assert alone < 0.9
    assert together == pytest.approx((alone + 1) / 2, abs=0.02)


def test_all_ranks_go_on_from_the_state_of_the_first(engine: Engine) -> None:
    states: list[DenoisingState] = []
    job = (conditioning(engine), params(), 7)
    whole = engine.denoise(*job, Watch(on_state=states.append))
    assert len(states) > 2
    for state in (states[1], states[-1]):
        assert torch.equal(engine.denoise(*job, state=state), whole)


IN_SPACE = Video(num_latents=2, height=8, width=400, num_frames=5, num_tiles=3)
IN_TIME = Video(num_latents=33, height=8, width=8, num_frames=129, num_tiles=3)
CUT = Video(num_latents=33, height=8, width=8, num_frames=60, num_tiles=2)


@pytest.mark.parametrize("video", [IN_SPACE, IN_TIME, CUT], ids=["in space", "in time", "cut"])
def test_two_ranks_decode_the_frames_of_one_to_the_last_bit(engine: Engine, video: Video) -> None:
    own = []
    expected = video.decoded(replace(engine, ranks=None))
    hook = engine.pipeline.vae.post_quant_conv.register_forward_hook(lambda *_: own.append(1))
    shared = video.decoded(engine)
    hook.remove()
    assert len(shared) == video.num_frames
    assert torch.equal(shared, expected)
    assert len(own) == math.ceil(video.num_tiles / 2)


@pytest.mark.parametrize("num_taken", [0, 1, 2])
def test_a_video_whose_frames_are_not_all_taken_leaves_the_next_job_whole(
    engine: Engine, num_taken: int
) -> None:
    with closing(IN_TIME.chunks(engine)) as chunks:
        assert [len(next(chunks)) for _ in range(num_taken)] == [49, 48][:num_taken]
    assert_decodes_as_alone(engine, IN_TIME)
    assert_as_alone(engine, conditioning(engine), params(1), 7)


def test_a_tile_that_rank_0_cannot_decode_fails_its_job_alone(engine: Engine) -> None:
    def fail(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    hook = engine.pipeline.vae.post_quant_conv.register_forward_pre_hook(fail)
    with pytest.raises(job_errors.OutOfMemoryError):
        next(IN_TIME.chunks(engine))
    hook.remove()
    assert_decodes_as_alone(engine, IN_SPACE)


def test_one_tile_and_ranks_of_another_arithmetic_are_no_business_of_the_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoding(*_: object) -> None:
        raise AssertionError("the other ranks were asked")

    monkeypatch.setattr(RankController, "decoding", decoding)
    assert_decodes_as_alone(engine, Video(1, 8, 8, num_frames=1, num_tiles=1))
    with pytest.raises(AssertionError, match="asked"):
        next(IN_SPACE.chunks(engine))
    monkeypatch.setattr(autoencoder, "SCRATCH_BYTES", 2**20)
    assert_decodes_as_alone(engine, IN_SPACE)
