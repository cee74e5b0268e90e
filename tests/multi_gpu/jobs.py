"""Jobs for several processes: small ones, whose passes take some hundredths of a second."""

import numpy as np
import psutil
from PIL import Image

from avatar_client.contract.request import GenerationParams
from worker.generation.conditioning import Conditioning
from worker.generation.engine import Engine
from worker.settings import Settings

TWO = Settings(avatar_model="demo", num_gpus=2)
SIDE = 32  # px
NUM_STEPS = 12  # the last two without the negative prompt, some of them cached


def params(num_steps: int = NUM_STEPS, guidance_scale: float = 7.5) -> GenerationParams:
    return GenerationParams(num_inference_steps=num_steps, guidance_scale=guidance_scale)


def conditioning(engine: Engine, seconds: float = 0.2, width: int = SIDE) -> Conditioning:
    waveform = np.sin(np.arange(round(seconds * 16_000), dtype=np.float32) / 20) / 2
    return engine.pipeline.encode(
        image=Image.new("RGB", (width, SIDE), (200, 120, 90)),
        audio=waveform,
        prompt="A person speaks.",
        face_box=(0, 0, SIDE, SIDE),
        height=SIDE,
        width=width,
    )


def go_on(step: int, num_steps: int) -> None: ...


def follower_of(engine: Engine) -> psutil.Process:
    [member] = engine.team._members
    return psutil.Process(member.process.pid)
