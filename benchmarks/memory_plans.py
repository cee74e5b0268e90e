"""What each memory plan costs: a step, the peak of memory, and what it can make.

    python -m benchmarks.memory_plans --directory /tmp/model [--plans 141:704x768 24:704x768 ...]

Takes the model directory that `python -m benchmarks.loading` writes. The process is kept to the
size of each plan; each plan encodes, takes a computed and a cached step, and decodes 129 frames.
"Reserved" is what the process took of the GPU for tensors, the gaps between them included.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.random_model import report
from worker.generation.cfg import cfg_branches
from worker.generation.conditioning import Conditioning
from worker.generation.denoiser import Denoiser, Step
from worker.generation.options import DenoiseOptions
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.generation.pipeline_loading import load_pipeline
from worker.generation.sampling import prepare_latents, unrepeatable_generator
from worker.generation.voices import Voice
from worker.loading import loader
from worker.loading.offload import (
    DECODER_SCRATCH_BYTES,
    GIB,
    USABLE_SHARE,
    make_plan,
    offload_models,
)
from worker.loading.transfer import Place
from worker.model.attention import fastest_backend
from worker.multi_gpu.parallel import NoParallel
from worker.shapes import SAMPLE_RATE_HZ, FrameSize

PLANS = ["141:704x768", "24:704x768", "16:704x768", "12:512x512", "8:512x512", "6:384x384"]
PLANS += ["4:256x256"]
SECONDS_OF_SPEECH = 5.16


def seconds_of(call: Any) -> tuple[float, Any]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return round(time.perf_counter() - started, 3), result


def late_step(index: int, *, cached: bool) -> Step:
    timestep = torch.tensor([500.0], device="cuda")
    return Step(
        index=index,
        timestep=timestep,
        sigma=0.5,
        sigma_change=0.0,
        guidance_weight=1.0,
        reads_cache=cached,
        writes_cache=not cached,
    )


@torch.no_grad()
def measure(pipeline: HunyuanVideoAvatarPipeline, size: FrameSize) -> dict[str, float]:
    """Seconds of each stage."""
    waveform = np.zeros(round(SECONDS_OF_SPEECH * SAMPLE_RATE_HZ), np.float32)
    box = (size.width / 4, size.height / 4, size.width / 2, size.height / 2)
    portrait = Image.effect_noise((size.width, size.height), 60).convert("RGB")
    found: dict[str, float] = {}
    conditioning: Conditioning
    found["encode"], conditioning = seconds_of(
        lambda: pipeline.encode(
            portrait,
            [Voice(waveform, box)],
            "A person.",
            height=size.height,
            width=size.width,
        )
    )
    latents, reference = prepare_latents(
        conditioning, pipeline.vae.config.scaling_factor, unrepeatable_generator()
    )
    branches = cfg_branches(conditioning, uses_cfg=True)
    denoiser = Denoiser(
        transformer=pipeline.transformer,
        conditioning=conditioning,
        reference_latents=reference,
        branches=branches,
        options=DenoiseOptions(),
        parallel=NoParallel(),
    )

    def step(index: int, *, cached: bool) -> Any:
        return denoiser.velocities(latents, 0, late_step(index, cached=cached))

    with pipeline.in_use("transformer"):
        if size.tokens < 600:  # else it comes to less than the step's own noise
            step(20, cached=False)  # what stays has come now
        found["step"], velocities = seconds_of(lambda: step(20, cached=False))
        found["cached step"], _ = seconds_of(lambda: step(21, cached=True))
    if not all(torch.isfinite(velocity).all() for velocity in velocities):
        raise ArithmeticError("the velocity is not finite")
    for branch in branches:
        branch.step_cache.clear()
    found["decode"], _ = seconds_of(
        lambda: [len(f) for f in pipeline.decode_frames(latents, 129, DECODER_SCRATCH_BYTES)]
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--plans", nargs="+", default=PLANS, help="GiB:HxW")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    dtypes = loader.component_dtypes(device, arguments.directory)
    sizes = loader.network_sizes(arguments.directory, dtypes)
    total = torch.cuda.get_device_properties(device).total_memory
    placement: dict[str, Place] = {"default": "host", "audio_encoder": "device"}
    started = time.perf_counter()
    pipeline, _ = load_pipeline(arguments.directory, device, dtypes, placement)
    report(gpu=torch.cuda.get_device_name(), load_to_host=time.perf_counter() - started)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.set_attention_backend(fastest_backend(device))
    for case in arguments.plans:
        gib, _, frame = case.partition(":")
        height, width = map(int, frame.split("x"))
        torch.cuda.empty_cache()
        limit = min(int(gib) * GIB, total)
        torch.cuda.set_per_process_memory_fraction(limit / total)
        torch.cuda.reset_peak_memory_stats()
        pipeline.prompt_cache.clear()
        line: dict[str, Any] = {"gib": int(gib), "size": frame}
        try:
            plan = make_plan(int(limit * USABLE_SHARE), sizes)
            line["plan"] = str(plan)
            pipeline.offloaded = offload_models(pipeline.components, device, plan)
            line |= measure(pipeline, FrameSize(height, width))
        except (RuntimeError, ValueError, ArithmeticError) as error:
            line["failed"] = f"{type(error).__name__}: {error}"[:400]
        line["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        line["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        report(**line)
        for model in pipeline.offloaded.values():
            model.restore()
        pipeline.offloaded = {}


if __name__ == "__main__":
    main()
