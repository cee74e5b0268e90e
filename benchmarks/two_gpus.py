"""Times denoising steps of the full-size transformer on one GPU, and on several that share them.

    python -m benchmarks.two_gpus
    python -m benchmarks.two_gpus --device cpu --sizes 64x32 --backend native --num-layers 2 \
        --num-single-layers 2 --num-attention-heads 2

The rank processes are the worker's own, and so is the loop; the weights are random, from the same
seed on each rank. Prints one JSON object a size: the median seconds of a computed step with both
CFG branches, alone and together, their ratio, and how far apart the latents are.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from avatar_client.contract.request import GenerationParams
from benchmarks.random_model import (
    build_transformer,
    relative_difference,
    report,
    synchronize,
)
from worker.generation.conditioning import Conditioning
from worker.generation.engine import Engine
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.loading import loader
from worker.loading.model_directory import DEMO_DIR
from worker.multi_gpu.controller import RankController
from worker.settings import Settings
from worker.shapes import SPATIAL_COMPRESSION, WINDOW_FRAMES

TEXT_POSITIONS, TEXT_LENGTH = 831, 400
LOAD = "benchmarks.two_gpus:load"  # for the rank processes
LOAD_TIMEOUT_SECONDS = 120.0


def load(settings: Settings, device: torch.device) -> Engine:
    """An engine that can only denoise; its transformer is as `model.json` says."""
    started = time.monotonic()
    model = json.loads((Path(settings.model_dir) / "model.json").read_text())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = build_transformer(device, dtype, **model["transformer"])
    transformer.set_attention_backend(model["backend"])
    components, report_of_load = loader.load(DEMO_DIR, device, {"default": torch.float32})
    pipeline = HunyuanVideoAvatarPipeline(**components | {"transformer": transformer})
    pipeline.set_progress_bar_config(disable=True)
    return Engine(pipeline, device, time.monotonic() - started, report_of_load)


def random_conditioning(engine: Engine, height: int, width: int) -> Conditioning:
    """What steers a video of one window; the mask stays on the CPU."""
    config = engine.pipeline.transformer.config
    generator = torch.Generator(engine.device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=engine.device)

    latent = (1, config.in_channels, 1, height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION)
    return Conditioning(
        prompt_embeds=normal(2, TEXT_POSITIONS, config.text_embed_dim),
        prompt_mask=(torch.arange(TEXT_POSITIONS) < TEXT_LENGTH).long().expand(2, -1),
        pooled_prompt_embeds=normal(2, config.pooled_projection_dim),
        audio_embeds=normal(1, WINDOW_FRAMES, *config.audio_window_shape),
        face_mask=torch.ones(1, 1, 1, *latent[-2:], device=engine.device),
        reference_mean=normal(*latent),
        reference_std=torch.ones(latent, device=engine.device),
        motion_pose=25.0,
        motion_expression=30.0,
        height=height,
        width=width,
        num_frames=WINDOW_FRAMES,
        fps=25.0,
        face_box=None,
        warnings=(),
    )


def time_steps(
    engine: Engine, conditioning: Conditioning, num_steps: int
) -> tuple[float, torch.Tensor]:
    """The median seconds of a step, and the latents."""
    times = [time.perf_counter()]

    def on_step(step: int, num_steps: int) -> None:
        synchronize(engine.device)
        times.append(time.perf_counter())

    params = GenerationParams(num_inference_steps=num_steps)
    latents = engine.denoise(conditioning, params, 0, on_step)
    steps = [after - before for before, after in pairwise(times)]
    return statistics.median(steps), latents


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", default=["384x384", "704x768"], help="height x width")
    parser.add_argument("--num-steps", type=int, default=3, help="up to 3 all are computed steps")
    parser.add_argument("--backend", default="_native_cudnn")
    parser.add_argument("--num-layers", type=int, default=20)
    parser.add_argument("--num-single-layers", type=int, default=40)
    parser.add_argument("--num-attention-heads", type=int, default=24)
    return parser.parse_args()


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    started = time.monotonic()
    on_gpu = arguments.device == "cuda"
    devices = [
        torch.device("cuda", index) if on_gpu else torch.device("cpu")
        for index in range(arguments.num_gpus)
    ]
    with tempfile.TemporaryDirectory() as directory:
        model = {
            "backend": arguments.backend,
            "transformer": {
                "num_layers": arguments.num_layers,
                "num_single_layers": arguments.num_single_layers,
                "num_attention_heads": arguments.num_attention_heads,
            },
        }
        (Path(directory) / "model.json").write_text(json.dumps(model))
        settings = Settings(model_dir=directory)
        ranks = RankController(settings, devices, LOAD)
        engine = load(settings, devices[0])
        report(torch=torch.__version__, gpu=engine.gpu_name, num_gpus=arguments.num_gpus)
        sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes]
        jobs = [random_conditioning(engine, *size) for size in sizes]
        alone = [time_steps(engine, job, arguments.num_steps) for job in jobs]
        ranks.join(engine.pipeline.transformer, LOAD_TIMEOUT_SECONDS)
        engine = replace(engine, ranks=ranks)
    for size, job, (seconds_alone, expected) in zip(arguments.sizes, jobs, alone, strict=True):
        seconds, latents = time_steps(engine, job, arguments.num_steps)
        report(
            size=size,
            seconds_per_step_alone=round(seconds_alone, 4),
            seconds_per_step=round(seconds, 4),
            ratio=round(seconds_alone / seconds, 3),
            relative_difference=relative_difference(latents, expected),
            peak_gib=engine.peak_memory_gib,
        )
    report(seconds_in_all=round(time.monotonic() - started, 1))
    ranks.close()
    sys.stdout.flush()
    os._exit(0)  # NCCL's own end waits for processes that are gone


if __name__ == "__main__":
    main()
