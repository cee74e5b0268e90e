"""The process of a further GPU, with a fault that FOLLOWER_FAULT names."""

import os
import time

import torch

from worker.generation.engine import Engine
from worker.multi_gpu import rank_process

PASSES = 3  # that go well before the fault


def main(descriptor):
    rank_process.main(descriptor, load)


def load(settings, device):
    fault = os.environ["FOLLOWER_FAULT"]
    if fault == "load":
        raise OSError("no weights here")
    engine = Engine.load(settings, device)
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) > PASSES and fault == "memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if len(passes) > PASSES and fault == "hang":
            time.sleep(1000)

    engine.pipeline.transformer.register_forward_pre_hook(fail)
    return engine
