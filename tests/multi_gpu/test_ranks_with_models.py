"""Teams with other models than the demo's, which take longer to start."""

from dataclasses import replace

import pytest
import torch

from tests.multi_gpu import demo_rank
from tests.multi_gpu.jobs import conditioning, go_on, params
from tests.support.golden_transformer import relative_difference
from worker.generation.engine import Engine
from worker.multi_gpu import controller
from worker.settings import Settings

pytestmark = pytest.mark.slow

TOLERANCE = 1e-3  # the heads are summed in another order, and the latents rounded to bfloat16


def test_each_process_loads_the_model_from_the_disk(toy_model):
    engine = Engine.start(Settings(model_dir=str(toy_model), num_gpus=2))
    try:
        job = (conditioning(engine), params(3), 7)
        latents = engine.denoise(*job, go_on)
        expected = replace(engine, team=None).denoise(*job, go_on)
    finally:
        engine.team.close()
    assert relative_difference(latents, expected) < TOLERANCE


def test_four_processes_make_the_latents_of_one(monkeypatch):
    """Two for each side of the guidance, which share the tokens of each pass."""
    monkeypatch.setattr(controller, "FOLLOWER", "tests.multi_gpu.demo_rank")
    monkeypatch.setattr(torch.accelerator, "device_count", torch.accelerator.device_count)
    threads = torch.get_num_threads()
    members = controller.Team(Settings(avatar_model="demo"), [torch.device("cpu")] * 4)
    engine = demo_rank.load(members, torch.device("cpu"))
    jobs = [
        (conditioning(engine), params(), 7),
        (conditioning(engine, seconds=6.0), params(3), 7),  # two windows
        (conditioning(engine), params(3, guidance_scale=1.0), 7),
    ]
    alone = [engine.denoise(*job, go_on) for job in jobs]
    try:
        engine = engine.join(members, patience_seconds=120.0)
        together = [engine.denoise(*job, go_on) for job in jobs]
        num_gpus = [engine.num_gpus(settings) for _, settings, _ in jobs]
    finally:
        members.close()
        torch.set_num_threads(threads)
    assert num_gpus == [4, 4, 2]
    for latents, expected in zip(together, alone, strict=True):
        assert relative_difference(latents, expected) < TOLERANCE
