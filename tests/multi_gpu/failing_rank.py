"""The model of a rank process, with a fault that RANK_FAULT names."""

import os
import time

import torch

from worker.generation.engine import Engine
from worker.settings import Settings

LOAD = f"{__name__}:load"
PASSES = 3  # that go well before the fault


def load(settings: Settings, device: torch.device) -> Engine:
    fault = os.environ["RANK_FAULT"]
    if fault == "load":
        raise OSError("no weights here")
    engine = Engine.load(settings, device)
    passes = []

    def fail(*_: object) -> None:
        passes.append(1)
        if len(passes) > PASSES and fault.startswith("memory"):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if len(passes) > PASSES and fault.startswith("hang"):
            time.sleep(1000)

    network = engine.pipeline.transformer
    if fault.endswith("in decoding"):  # each tile begins with this
        network = engine.pipeline.vae.post_quant_conv
    network.register_forward_pre_hook(fail)
    return engine
