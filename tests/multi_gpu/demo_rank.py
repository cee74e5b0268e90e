"""A model like the demo's, whose attention is local, for a rank and for the worker's process."""

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
    started = time.monotonic()
    components, report = loader.load(DEMO_DIR, device, {"default": torch.float32})
    config = dict(components["transformer"].config) | {"num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformer = HunyuanVideoAvatarTransformer3DModel.from_config(config).eval()
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        # tokens look at those like them, and near them, so that sparse attention can leave some out
        block.attn.to_k.load_state_dict(block.attn.to_q.state_dict())
        for norm in (block.attn.norm_q, block.attn.norm_k):
            torch.nn.init.constant_(norm.weight, 2.0)
    pipeline = HunyuanVideoAvatarPipeline(**components | {"transformer": transformer})
    pipeline.set_progress_bar_config(disable=True)
    return Engine(pipeline, device, time.monotonic() - started, report, has_sparse_attention=True)
