"""The demo model with heads to share, for a rank and for the worker's own process."""

import time

import torch

from worker.generation.engine import Engine
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.loading import loader
from worker.loading.model_directory import DEMO_DIR
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel
from worker.settings import Settings

LOAD = f"{__name__}:load"


def load(settings: Settings, device: torch.device) -> Engine:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # a CPU has 0, and diffusers divides by it
    started = time.monotonic()
    components, report = loader.load(DEMO_DIR, device, {"default": torch.float32})
    config = dict(components["transformer"].config) | {"num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformer = HunyuanVideoAvatarTransformer3DModel.from_config(config).eval()
    pipeline = HunyuanVideoAvatarPipeline(**components | {"transformer": transformer})
    pipeline.set_progress_bar_config(disable=True)
    return Engine(pipeline, device, time.monotonic() - started, report)
