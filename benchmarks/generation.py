"""How long a video takes: each kind of step, each stage and each preset beside the published way.

    python -m benchmarks.generation [--sizes 704x768 384x384] [--json out.json]
    python -m benchmarks.generation --toy --device cpu

Random weights of the published size. Each time is of one call if that is long, else the median of
three; a whole job is put together from them by the schedule of its preset. The attention of random
weights is flat, so no key could be left out: sparse steps choose blocks of `--density` whatever
that costs. Beside it stand the published arithmetic (`benchmarks/reference.py`) in the same run,
and the roofline: the operations of a step at the rates that this GPU shows for a matrix product and
for attention alone. Text encoding, the same for all and below a second, is left out.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo

from avatar_client.contract.presets import PRESETS, REFERENCE_SCHEDULE
from benchmarks import reference
from benchmarks.random_model import (
    build_transformer,
    random_inputs,
    relative_difference,
    report,
    synchronize,
)
from worker.generation.cfg import PROMPT_GUIDED_STEPS
from worker.generation.denoiser import DENSE_STEPS
from worker.model import autoencoder
from worker.model.attention import attend, fastest_backend
from worker.model.sparse_attention import SparseAttention
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel
from worker.shapes import WINDOW_FRAMES, WINDOW_LATENTS, FrameSize, window_tokens

STEPS = 50
FACE_SHARE = 0.25  # of the picture's height and width, inside the face mask
LONG_SECONDS = 4.0  # a call of more is measured once
TEXT_POSITIONS, TEXT_LENGTH = 831, 700
GIB = 2**30
TOY = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2}


def measure(device: torch.device, call: Callable[[], Any]) -> tuple[float, float | None, Any]:
    """Seconds of the call, the peak of memory in GiB, and what the call gave."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: list[float] = []
    while len(seconds) < 4:
        synchronize(device)
        started = time.perf_counter()
        result = call()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        if seconds[0] > LONG_SECONDS:
            break
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    return statistics.median(seconds[1:] or seconds), peak, result


def step_kinds(
    model: HunyuanVideoAvatarTransformer3DModel, size: FrameSize, num_latents: int
) -> dict[str, dict[str, Any]]:
    """What the forward of each kind of step is given: both CFG branches."""
    grid = (num_latents, *size.latent)
    both = random_inputs(model, 2, grid, TEXT_POSITIONS, TEXT_LENGTH)
    rows, columns = (round(FACE_SHARE * side) for side in grid[1:])
    both["face_mask"].zero_()[..., rows : 2 * rows, columns : 2 * columns] = 1
    for name in set(both) - {"audio_embeds"}:
        both[name] = both[name][:1].expand_as(both[name])
    early = both | {"encoder_attention_mask": both["encoder_attention_mask"].clone()}
    early["encoder_attention_mask"][0, TEXT_LENGTH - 40 :] = 0  # the other prompt is shorter
    late = {name: value[:1] for name, value in both.items()} | {
        "audio_embeds": both["audio_embeds"]
    }
    return {"both": both, "early": early, "late": late}


def measure_steps(
    model: HunyuanVideoAvatarTransformer3DModel, size: FrameSize, num_latents: int, density: float
) -> dict[str, Any]:
    """Seconds and peak memory of each kind of step, and how far the results are apart."""
    device, kinds = model.device, step_kinds(model, size, num_latents)
    found: dict[str, Any] = {"seconds": {}, "peak_gib": {}}

    def record(name: str, call: Callable[[], Any]) -> Any:
        seconds, peak, result = measure(device, call)
        found["seconds"][name] = round(seconds, 4)
        found["peak_gib"][name] = peak and round(peak, 2)
        report(size=size, of=name, seconds=round(seconds, 3), peak_gib=found["peak_gib"][name])
        return result

    def forward(inputs: dict[str, Any]) -> Any:
        return model(**inputs)

    model.set_attention_backend(backend_of(device))
    late = {}
    for name, float8 in (("quality", False), ("8 bits", True)):
        call = kinds["early"] | {"float8": float8}
        record(f"{name}, early step", partial(forward, call))
        call = kinds["late"] | {"float8": float8, "return_cached_tokens": True}
        output = record(f"{name}, late step", partial(forward, call))
        late[name] = output.sample
        call = kinds["late"] | {"float8": float8, "cached_tokens": output.cached_tokens}
        del output
        record(f"{name}, cached step", partial(forward, call))
        del call
    found |= measure_sparse(kinds, density, record, forward, late)
    if device.type == "cuda":
        model.set_attention_backend(reference.FLASH_ATTENTION)
    both = kinds["both"]
    published, cached_tokens = record(
        "published, computed step", lambda: reference.forward(model, both)
    )
    record("published, cached step", lambda: reference.forward(model, both, cached_tokens))
    found["difference_from_published"] = relative_difference(late["quality"], published)
    found["difference_of_sparse"] = relative_difference(late["sparse"], late["8 bits"])
    found["difference_of_8_bits"] = relative_difference(late["8 bits"], late["quality"])
    return found


def measure_sparse(
    kinds: dict[str, dict[str, Any]],
    density: float,
    record: Callable[[str, Callable[[], Any]], Any],
    forward: Callable[[dict[str, Any]], Any],
    late: dict[str, Any],
) -> dict[str, Any]:
    """The steps of `draft` whose attention leaves blocks out, and how many it left out."""
    device = kinds["late"]["hidden_states"].device
    found = {}
    for kind in ("early", "late"):
        mass = density
        for _ in range(2):  # of flat attention the blocks' share is their mass, nearly
            sparsity = SparseAttention(math.inf, 0, device, fixed_mass=mass)
            forward(kinds[kind] | {"float8": True, "sparsity": sparsity})
            mass *= density / sparsity.report().density
        sparsity = SparseAttention(math.inf, 0, device, fixed_mass=mass)
        call = kinds[kind] | {"float8": True, "return_cached_tokens": True, "sparsity": sparsity}
        late["sparse"] = record(f"sparse, {kind} step", partial(forward, call)).sample
        found[f"density, {kind} step"] = sparsity.report().density
    return found


def measure_autoencoder(
    vae: AutoencoderKLHunyuanVideo, size: FrameSize, num_latents: int
) -> dict[str, float]:
    """Seconds of encoding the portrait and decoding a window, both ways."""
    device = vae.device
    portrait = torch.rand(1, 3, 1, *size, device=device).to(vae.dtype)
    latents = torch.randn(1, 16, num_latents, *size.latent, device=device).to(vae.dtype)

    def ours() -> None:
        for frames in autoencoder.decode_frames(vae, latents):
            (frames * 255).to(torch.uint8)

    calls: dict[str, Callable[[], Any]] = {
        "encode": lambda: vae.encode(portrait),
        "decode": ours,
        "published encode": lambda: reference.encode(vae, portrait),
        "published decode": lambda: reference.decode(vae, latents),
    }
    return {name: round(measure(device, call)[0], 3) for name, call in calls.items()}


def roofline(
    model: HunyuanVideoAvatarTransformer3DModel, size: FrameSize, num_latents: int
) -> dict[str, float]:
    """Seconds of a computed step's products and attention alone, each as fast as it runs here."""
    config, device = model.config, model.device
    dim = config.num_attention_heads * config.attention_head_dim
    tokens = window_tokens(size) * (1 + num_latents) // (1 + WINDOW_LATENTS) + TEXT_LENGTH
    dtype = model.dtype
    x = torch.randn(tokens, dim, device=device).to(dtype)
    weight = (torch.randn(4 * dim, dim, device=device) / dim**0.5).to(dtype)
    product, *_ = measure(device, lambda: torch.nn.functional.linear(x, weight))
    shape = (1, tokens, config.num_attention_heads, config.attention_head_dim)
    query, key, value = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    block: Any = model.transformer_blocks[0]
    attention, *_ = measure(device, lambda: attend(query, key, value, block.attn.processor))
    blocks = config.num_layers + config.num_single_layers
    # 24 D^2 operations a token and block, of which the measured product has 8 D^2
    seconds = 2 * blocks * (3 * product + attention)
    return {
        "step": round(seconds, 3),
        "attention_tflops": round(4 * dim * tokens**2 / attention / 1e12),
        "product_tflops": round(8 * dim**2 * tokens / product / 1e12),
    }


def backend_of(device: torch.device) -> str:
    return fastest_backend(device) if device.type == "cuda" else "native"


def jobs(steps: dict[str, float], stages: dict[str, float]) -> dict[str, dict[str, float]]:
    """Seconds of a whole job of one window, by preset and by the published way."""
    found = {}
    for name, preset in PRESETS.items():
        computed = preset.step_cache_schedule.computed_steps(STEPS)
        early = sum(index < PROMPT_GUIDED_STEPS for index in computed)
        arithmetic = "8 bits" if preset.float8 else "quality"
        sparse = arithmetic if preset.attention_tolerance is None else "sparse"
        dense = min(early, DENSE_STEPS)
        denoise = dense * steps[f"{arithmetic}, early step"]
        denoise += (early - dense) * steps[f"{sparse}, early step"]
        denoise += (len(computed) - early) * steps[f"{sparse}, late step"]
        denoise += (STEPS - len(computed)) * steps[f"{arithmetic}, cached step"]
        found[name] = {"denoise": denoise, "whole": denoise + stages["encode"] + stages["decode"]}
    num_computed = len(REFERENCE_SCHEDULE.computed_steps(STEPS))
    denoise = num_computed * steps["published, computed step"]
    denoise += (STEPS - num_computed) * steps["published, cached step"]
    whole = denoise + stages["published encode"] + stages["published decode"]
    found["published"] = {"denoise": denoise, "whole": whole}
    for job in found.values():
        job["times_published"] = whole / job["whole"]
    return {name: {k: round(v, 2) for k, v in job.items()} for name, job in found.items()}


def print_table(results: list[dict[str, Any]]) -> None:
    write = sys.stdout.write
    for result in results:
        height, width = result["size"]
        bound = result["roofline"]["step"]
        write(
            f"\n{height} x {width}, {result['frames']} frames; "
            f"roofline of a computed step {bound} s\n"
        )
        for name, seconds in result["steps"]["seconds"].items():
            peak = result["steps"]["peak_gib"][name] or 0
            share = f"{seconds / bound:6.2f}" if "cached" not in name else ""
            write(f"  {name:28}{seconds:9.3f} s{peak:8.2f} GiB{share}\n")
        for name, seconds in result["autoencoder"].items():
            write(f"  {name:28}{seconds:9.3f} s\n")
        for name, job in result["jobs"].items():
            write(
                f"  job, {name:23}{job['whole']:9.2f} s{job['times_published']:8.2f} x published\n"
            )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--sizes", nargs="+", default=["704x768", "384x384"])
    parser.add_argument(
        "--toy", action="store_true", help="a model and a video that a CPU can make"
    )
    parser.add_argument("--density", type=float, default=0.25, help="of sparse attention's blocks")
    parser.add_argument("--json", type=Path, help="where the figures go as one file")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    device, toy = arguments.device, arguments.toy
    sizes = [FrameSize(*map(int, size.split("x"))) for size in arguments.sizes]
    num_latents = 2 if toy else WINDOW_LATENTS
    dtype = torch.bfloat16
    model = build_transformer(device, dtype, **(TOY if toy else {}))
    channels = (8, 8, 8, 8) if toy else (128, 256, 512, 512)
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=channels, norm_num_groups=min(32, channels[0])
    ).to(device, torch.float32 if toy else torch.float16)
    autoencoder.set_tiles(vae)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    machine = {"gpu": gpu, "torch": torch.__version__, "parameters": model.num_parameters()}
    report(**machine)
    measure_steps(model, FrameSize(64, 64), 2, 0.9)  # the libraries get ready
    results = []
    for size in sizes:
        model.set_attention_backend(backend_of(device))
        bound = roofline(model, size, num_latents)
        report(size=size, roofline=bound)
        steps = measure_steps(model, size, num_latents, arguments.density)
        stages = measure_autoencoder(vae, size, num_latents)
        result = {
            "size": size,
            "frames": 5 if toy else WINDOW_FRAMES,
            "roofline": bound,
            "steps": steps,
            "autoencoder": stages,
            "jobs": jobs(steps["seconds"], stages),
        }
        report(**result)
        results.append(result)
    print_table(results)
    if arguments.json:
        arguments.json.write_text(json.dumps({**machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
