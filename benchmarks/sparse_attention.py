"""Attention alone: each kernel beside the others, and sparse attention at given densities.

    python -m benchmarks.sparse_attention [--sizes 704x768 384x384]
    python -m benchmarks.sparse_attention --toy --device cpu

Queries and keys are made with a known structure: each token has a place in space and time and is
near to its neighbours there, a few keys stand out for all queries, and the rest is flat.
`--sharpness` says how strongly near tokens attend to each other. Printed for each mass: the density
that it finds, the error against all keys, the seconds of each part, and how many times as fast the
whole is as attention to all keys by the fastest kernel, everything counted in.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.generation import measure
from benchmarks.random_model import report, synchronize
from worker.model import flash_attention_4 as fa4
from worker.model import sparse_attention as sparse
from worker.model.attention import CANDIDATES, KERNELS, fastest_backend, try_kernel
from worker.model.kernels import merge_attended
from worker.model.sparse_attention import ChosenBlocks, SparseAttention, TokenBlocks
from worker.shapes import WINDOW_LATENTS, FrameSize

TEXT_TOKENS = 700
STANDING_OUT = 64  # keys that all queries see
FACE_SHARE = 0.06  # of the picture


def structured(
    grid: tuple[int, int, int],  # rows and columns of patches, frames
    heads: int,
    width: int,
    sharpness: float,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, N, h, D) whose attention is local, but for a few keys.

    A token's code has random Fourier features of its place, so that the product of two codes falls
    off with their distance (as a Gaussian of some patches and frames); queries and keys are codes
    times `sharpness`, with noise. Values have a mean in each channel.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    rows, columns, frames = grid
    places = torch.cartesian_prod(
        *(torch.arange(count, device=device).float() for count in (rows, columns, frames))
    )
    places = places / torch.tensor([3.0, 3.0, 6.0], device=device)
    tensors = []
    for _ in range(heads):
        angles = places @ normal(3, width // 2)
        code = torch.cat([angles.cos(), angles.sin()], 1) * (2 / width) ** 0.5
        code = torch.cat([code, normal(TEXT_TOKENS, width) * width**-0.5])
        scale = sharpness * width**0.25
        query, key = (scale * code + 0.5 * normal(*code.shape) for _ in range(2))
        loud = torch.randint(len(key), (STANDING_OUT,), generator=generator, device=device)
        key[loud] += 0.5 * query.mean(0) + 0.5
        value = normal(*code.shape) + normal(1, width) + 4 * code
        tensors.append(torch.stack([query, key, value]))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = torch.stack(tensors, 2).to(dtype)
    return query[None].contiguous(), key[None].contiguous(), value[None].contiguous()


def timed(device: torch.device, call: Callable[[], Any], times: int = 5) -> float:
    """Mean seconds of a call, after one that is not counted."""
    call()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / times


def parts_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, blocks: ChosenBlocks
) -> dict[str, float]:
    """Seconds of the three kernels that attend on a GPU; nothing on a CPU."""
    device = query.device
    if device.type != "cuda":
        return {}
    seen = partial(fa4.attend_blocks, query, key, value, blocks.counts, blocks.indices)
    mask = blocks.chosen.view(torch.uint8)
    others = partial(fa4.attend_unmasked, query, blocks.keys, blocks.values, mask)
    (out, sums), (other, other_sums) = seen(), others()
    merged = partial(merge_attended, out, other, sums, other_sums, 0.0)
    return {
        "attend to chosen blocks": timed(device, seen),
        "attend to the means of others": timed(device, others),
        "merge": timed(device, merged),
    }


def measure_size(
    size: FrameSize, frames: int, heads: int, width: int, sharpness: float, device: torch.device
) -> None:
    """Prints all figures of one size."""
    grid = (size.height // 16, size.width // 16, 1 + frames)
    query, key, value = structured(grid, heads, width, sharpness, device)
    num_face = int(FACE_SHARE * grid[0] * grid[1])
    gate = torch.zeros(1, grid[0] * grid[1], grid[2], 1, device=device)
    gate[:, len(gate[0]) // 2 : len(gate[0]) // 2 + num_face, 1:] = 1
    tokens = TokenBlocks(gate, TEXT_TOKENS)
    name = fastest_backend(device) if device.type == "cuda" else "native"
    dense = KERNELS[name]
    all_keys = timed(device, lambda: dense(query, key, value))
    exact = dense(query, key, value)
    flops = 4 * query.shape[1] ** 2 * heads * width
    report(
        size=size,
        tokens=query.shape[1],
        fastest=name,
        seconds=round(all_keys, 5),
        tflops=round(flops / all_keys / 1e12),
        sees_all=round(tokens.dense.float().mean().item(), 3),
    )
    rows = tokens.draw(sparse.CALIBRATING_QUERIES, torch.Generator(device).manual_seed(1))
    calibrate = timed(device, lambda: sparse.error_curve(query, key, value, tokens, rows), 2)
    report(size=size, calibration_seconds=round(calibrate, 4))
    for mass in (0.1, 0.15, *sparse.MASSES):
        blocks = ChosenBlocks.of(query, key, value, tokens, mass)
        layer = SparseAttention(1.0, 0, device, fixed_mass=mass).layer(0, 0, tokens)
        found = layer.attend(query, key, value, dense)
        off = ((found - exact).float().norm() / exact.float().norm()).item()
        part = {
            "choose": timed(device, partial(ChosenBlocks.of, query, key, value, tokens, mass)),
            "attend": timed(device, partial(sparse.attend_sparsely, query, key, value, blocks)),
            **parts_on_gpu(query, key, value, blocks),
            "measure": timed(device, lambda: sparse.few_queries(query[:, rows], key, value)),
            "whole": timed(device, partial(layer.attend, query, key, value, dense)),
        }
        report(
            size=size,
            mass=mass,
            density=round(blocks.density.item(), 3),
            error=round(off, 4),
            error_measured=round(layer.whole.report().error, 4),
            ms={name: round(1e3 * seconds, 2) for name, seconds in part.items()},
            times_as_fast=round(all_keys / part["whole"], 2),
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--sizes", nargs="+", default=["704x768", "384x384"])
    parser.add_argument("--sharpness", type=float, default=4.0)
    parser.add_argument("--toy", action="store_true", help="what a CPU can compute")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    device = arguments.device
    if device.type == "cuda":
        report(gpu=torch.cuda.get_device_name(), torch=torch.__version__)
        for name in CANDIDATES:
            (seconds, _, trial) = measure(device, partial(try_kernel, KERNELS[name], device))
            report(kernel=name, **trial._asdict(), seconds_of_trial=round(seconds, 3))
        started = time.perf_counter()
        report(sparse_error=sparse.sparse_error(device), s=round(time.perf_counter() - started, 2))
    heads, width, frames = (3, 64, 4) if arguments.toy else (24, 128, WINDOW_LATENTS)
    for each in ["128x256"] if arguments.toy else arguments.sizes:
        size = FrameSize(*map(int, each.split("x")))
        measure_size(size, frames, heads, width, arguments.sharpness, device)


if __name__ == "__main__":
    main()
