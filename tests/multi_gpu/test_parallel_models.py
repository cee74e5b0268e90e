"""Ranks with other models than the demo's: a process is in one process group at a time."""

from pathlib import Path

import pytest
import torch

from avatar_client.contract.request import GenerationParams
from tests.multi_gpu import demo_rank
from tests.multi_gpu.jobs import (
    SIDE,
    TOLERANCE,
    Video,
    assert_as_alone,
    assert_same_picture,
    conditioning,
    last_preview,
    params,
)
from tests.support.golden_transformer import relative_difference
from worker.generation.conditioning import Conditioning
from worker.generation.engine import Engine
from worker.generation.watch import Watch
from worker.model.sparse_attention import SparsityReport
from worker.multi_gpu.controller import RankController
from worker.settings import Settings

pytestmark = pytest.mark.slow


def test_each_rank_loads_the_model_from_the_disk(toy_model: Path) -> None:
    engine = Engine.start(Settings(model_dir=str(toy_model), num_gpus=2))
    try:
        assert_as_alone(engine, conditioning(engine), params(3), 7)
    finally:
        engine.close()


VIDEOS = [  # fewer tiles than ranks; a last round that is not full, in more than one step in time
    Video(num_latents=2, height=8, width=400, num_frames=5, num_tiles=3),
    Video(num_latents=25, height=8, width=400, num_frames=97, num_tiles=6),
]


def test_four_ranks_make_the_latents_and_the_frames_of_one() -> None:
    """Two for each CFG branch, which share the tokens of each pass."""
    threads = torch.get_num_threads()
    settings = Settings(avatar_model="demo")
    ranks = RankController(settings, [torch.device("cpu")] * 4, demo_rank.LOAD)
    try:
        engine = demo_rank.load(settings, torch.device("cpu"))
        jobs = [
            (conditioning(engine), params(), 7),
            (conditioning(engine, seconds=6.0), params(3), 7),  # two windows
            (conditioning(engine), params(3, guidance_scale=1.0), 7),
            (conditioning(engine, width=2 * SIDE, num_voices=2), params(), 7),
        ]
        alone = [engine.denoise(*job) for job in jobs]
        draft = (conditioning(engine, width=8 * SIDE), params(4, preset="draft"), 7)
        draft_alone, report_alone = denoise_sparsely(engine, *draft)
        frames_alone = [video.decoded(engine) for video in VIDEOS]
        preview_alone = last_preview(engine, *jobs[1])  # later a pass needs the other ranks
        engine = engine.join(ranks, timeout_seconds=300.0)
        together = [engine.denoise(*job) for job in jobs]
        draft_together, report_together = denoise_sparsely(engine, *draft)
        preview_together = last_preview(engine, *jobs[1])
        num_gpus = [engine.num_gpus(settings) for _, settings, _ in jobs]
        frames = [video.decoded(engine) for video in VIDEOS]
    finally:
        ranks.close()
        torch.set_num_threads(threads)
    assert num_gpus == [4, 4, 2, 4]
    assert_same_picture(preview_together, preview_alone)
    assert list(map(torch.equal, frames, frames_alone)) == [True] * len(VIDEOS)
    for latents, expected in zip(together, alone, strict=True):
        assert relative_difference(latents, expected) < TOLERANCE
    assert relative_difference(draft_together, draft_alone) < TOLERANCE
    assert report_together.density == pytest.approx(report_alone.density, abs=0.02)
    assert report_together.density < 0.9
    assert report_together.error < 0.1


def denoise_sparsely(
    engine: Engine, told: Conditioning, asked: GenerationParams, seed: int
) -> tuple[torch.Tensor, SparsityReport]:
    """The latents, and what sparse attention left out on all ranks."""
    sparsity = engine.sparse_attention(asked, seed)
    assert sparsity is not None
    latents = engine.denoise(told, asked, seed, Watch(sparsity=sparsity))
    return latents, sparsity.report()
