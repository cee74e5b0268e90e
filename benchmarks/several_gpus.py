"""Times denoising steps and decoding at full size on one GPU, and on several that share them.

    python -m benchmarks.several_gpus [--num-gpus 4] [--drafts 704x768]
    python -m benchmarks.several_gpus --device cpu --sizes 64x32 --backend native --num-layers 2 \
        --num-single-layers 2 --num-attention-heads 2

The rank processes are the worker's own, and so is the loop; the weights are random, from the same
seed on each rank. Prints one JSON object a run: seconds with both CFG branches, alone and together,
of a computed step (median) and of all steps, their ratio, and how far apart the latents are. A
draft has all its 50 steps; two steps see all keys, the other computed ones the given density, which
is printed as it was found alone and, in the mean of all ranks, together.
Then one a size: seconds of 129 frames decoded alone and together, their ratio, and whether the
frames are the same to the last byte; on a CPU they are the demo model's.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from avatar_client.contract.request import GenerationParams
from benchmarks.random_model import (
    TEXT_LENGTH,
    TEXT_POSITIONS,
    build_autoencoder,
    build_transformer,
    relative_difference,
    report,
    synchronize,
)
from worker.generation.conditioning import Conditioning
from worker.generation.denoiser import DENSE_STEPS, Denoiser, Step
from worker.generation.engine import Engine
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.generation.watch import Watch
from worker.loading import loader
from worker.loading.model_directory import DEMO_DIR
from worker.model.attention import fastest_backend
from worker.model.linear import float8_works
from worker.model.sparse_attention import sparse_attention_works
from worker.multi_gpu.controller import RankController
from worker.settings import Settings
from worker.shapes import SPATIAL_COMPRESSION, WINDOW_FRAMES, WINDOW_LATENTS

FACE_SHARE = 0.25  # of the picture's height and width, inside the face mask
LOAD = "benchmarks.several_gpus:load"  # for the rank processes
LOAD_TIMEOUT_SECONDS = 120.0


def load(settings: Settings, device: torch.device) -> Engine:
    """An engine that can only denoise and decode; its transformer is as `model.json` says."""
    started = time.monotonic()
    model = json.loads((Path(settings.model_dir) / "model.json").read_text())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = build_transformer(device, dtype, **model["transformer"])
    backend = model["backend"] or (fastest_backend(device) if device.type == "cuda" else "native")
    transformer.set_attention_backend(backend)
    components, report_of_load = loader.load(DEMO_DIR, device, {"default": torch.float32})
    if device.type == "cuda":
        components["vae"] = build_autoencoder(device, torch.float16)
    pipeline = HunyuanVideoAvatarPipeline(**components | {"transformer": transformer})
    pipeline.set_progress_bar_config(disable=True)

    class DenoiserOfDensity(DraftDenoiser):
        density = model["density"]

    pipeline.denoiser_class = DenoiserOfDensity
    on_gpu = device.type == "cuda"
    return Engine(
        pipeline,
        device,
        time.monotonic() - started,
        report_of_load,
        has_float8=on_gpu and float8_works(device),
        has_sparse_attention=not on_gpu or sparse_attention_works(device),
    )


@dataclass(frozen=True, kw_only=True)
class DraftDenoiser(Denoiser):
    """Its attention leaves blocks out as `draft` does, but always so many, whatever that costs.

    The attention of random weights is flat: within a tolerance nothing could be left out.
    """

    density: ClassVar[float]

    def velocities(self, window: torch.Tensor, start: int, step: Step) -> list[torch.Tensor]:
        sparsity = self.sparsity if step.index >= DENSE_STEPS else None
        if sparsity is not None:
            sparsity.fixed_mass = 0.95 * self.density  # of flat attention the share is that, nearly
        return Denoiser.velocities(replace(self, sparsity=sparsity), window, start, step)


def random_conditioning(engine: Engine, height: int, width: int) -> Conditioning:
    """What steers a video of one window; the mask stays on the CPU."""
    config = engine.pipeline.transformer.config
    generator = torch.Generator(engine.device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=engine.device)

    face_mask = torch.zeros(
        1, 1, 1, height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION, device=engine.device
    )
    rows, columns = (round(FACE_SHARE * side) for side in face_mask.shape[-2:])
    face_mask[..., rows : 2 * rows, columns : 2 * columns] = 1
    latent = (1, config.in_channels, 1, height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION)
    return Conditioning(
        prompt_embeds=normal(2, TEXT_POSITIONS, config.text_embed_dim),
        prompt_mask=(torch.arange(TEXT_POSITIONS) < TEXT_LENGTH).long().expand(2, -1),
        pooled_prompt_embeds=normal(2, config.pooled_projection_dim),
        audio_embeds=normal(1, WINDOW_FRAMES, *config.audio_window_shape),
        face_mask=face_mask,
        reference_mean=normal(*latent),
        reference_std=torch.ones(latent, device=engine.device),
        motion_pose=25.0,
        motion_expression=30.0,
        height=height,
        width=width,
        num_frames=WINDOW_FRAMES,
        fps=25.0,
        face_boxes=(),
        warnings=(),
    )


def time_steps(
    engine: Engine, conditioning: Conditioning, params: GenerationParams
) -> tuple[list[float], torch.Tensor, float | None]:
    """The seconds of each step, the latents, and the density of attention that leaves blocks out.

    The density is the mean of the steps that do, and of all ranks.
    """
    sparsity = engine.sparse_attention(params, 0)
    times = [time.perf_counter()]

    def on_step(step: int, num_steps: int) -> None:
        synchronize(engine.device)
        times.append(time.perf_counter())

    watch = Watch(on_step=on_step, sparsity=sparsity)
    latents = engine.denoise(conditioning, params, 0, watch)
    density = None if sparsity is None else round(sparsity.report().density, 3)
    return [after - before for before, after in pairwise(times)], latents, density


def time_decoding(engine: Engine, conditioning: Conditioning) -> tuple[float, np.ndarray]:
    """The seconds of all frames of random latents, decoded a second time, and the frames."""
    vae, mean = engine.pipeline.vae, conditioning.reference_mean
    shape = (1, mean.shape[1], WINDOW_LATENTS, *mean.shape[3:])
    generator = torch.Generator(engine.device).manual_seed(2)
    latents = torch.randn(shape, generator=generator, device=engine.device)
    latents *= vae.config.scaling_factor
    for chunk in engine.decode_frames(conditioning, latents):
        del chunk
    started = time.perf_counter()
    chunks = list(engine.decode_frames(conditioning, latents))
    return time.perf_counter() - started, np.concatenate(chunks)


def compared(
    alone: tuple[float, np.ndarray], together: tuple[float, np.ndarray]
) -> dict[str, float | bool]:
    """What `time_decoding` gave, for a report."""
    (seconds_alone, expected), (seconds, frames) = alone, together
    return {
        "decode_seconds_alone": round(seconds_alone, 3),
        "decode_seconds": round(seconds, 3),
        "decode_ratio": round(seconds_alone / seconds, 3),
        "same_frames": np.array_equal(frames, expected),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", default=["384x384", "704x768"], help="height x width")
    parser.add_argument("--num-steps", type=int, default=3, help="up to 3 all are computed steps")
    parser.add_argument("--drafts", nargs="*", default=[], help="sizes of whole drafts")
    parser.add_argument("--density", type=float, default=0.25, help="of a draft's attention")
    parser.add_argument("--backend", help="of attention; else the fastest")
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
            "density": arguments.density,
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
        runs = [
            (size, GenerationParams(num_inference_steps=arguments.num_steps))
            for size in arguments.sizes
        ]
        runs += [(size, GenerationParams(preset="draft")) for size in arguments.drafts]
        jobs = [
            (random_conditioning(engine, *map(int, size.split("x"))), params)
            for size, params in runs
        ]
        first = (jobs[0][0], GenerationParams(num_inference_steps=1))
        time_steps(engine, *first)  # a worker's start pays for what comes once
        alone = [time_steps(engine, *job) for job in jobs]
        videos = {size: job[0] for (size, _), job in zip(runs, jobs, strict=True)}
        decoded_alone = {size: time_decoding(engine, told) for size, told in videos.items()}
        ranks.join(engine.pipeline.transformer, LOAD_TIMEOUT_SECONDS)
        engine = replace(engine, ranks=ranks)
        time_steps(engine, *first)
    for (size, params), job, by_one in zip(runs, jobs, alone, strict=True):
        seconds_alone, expected, density_alone = by_one
        seconds, latents, density = time_steps(engine, *job)
        report(
            size=size,
            preset=params.preset,
            steps=params.num_inference_steps,
            seconds_per_step_alone=round(statistics.median(seconds_alone), 4),
            seconds_per_step=round(statistics.median(seconds), 4),
            seconds_alone=round(sum(seconds_alone), 2),
            seconds=round(sum(seconds), 2),
            ratio=round(sum(seconds_alone) / sum(seconds), 3),
            density_alone=density_alone,
            density=density,
            relative_difference=relative_difference(latents, expected),
            peak_gib=engine.peak_memory_gib,
        )
    for size, told in videos.items():
        report(size=size, **compared(decoded_alone[size], time_decoding(engine, told)))
    report(seconds_in_all=round(time.monotonic() - started, 1))
    ranks.close()
    sys.stdout.flush()
    os._exit(0)  # NCCL's own end waits for processes that are gone


if __name__ == "__main__":
    main()
