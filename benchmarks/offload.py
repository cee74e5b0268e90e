"""The worker's offload beside diffusers' group offloading: seconds and memory of a denoising step.

    python -m benchmarks.offload [--size toy|medium|full] [--steps 4]

Runs the transformer with random weights, on a GPU if there is one: with all weights resident; by
`worker.loading.offload`, with no block resident and with half of them; and by
`enable_group_offload`, which cannot keep some blocks, a block a group. Each way starts from the
same weights in pinned memory, and must give the same velocities, bit for bit. A step is one forward
pass of both CFG branches; the first one is not counted. "Cached" is a step that reads the step
cache, and runs the last block alone. Prints one line of JSON for each frame size and way, with the
peak of GPU memory, in GiB.

On a CPU, where there is nothing to copy ahead and no memory to measure, it shows that the results
are equal, and what the hooks cost.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_model import build_transformer, random_inputs, report, synchronize
from worker.loading.host_memory import HostMemory
from worker.loading.layout import allocate_slots, blocks
from worker.loading.offload import GIB, OffloadedModel
from worker.model.attention import fastest_backend
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel as Transformer


@dataclass(frozen=True)
class Size:
    """A transformer, and what it is given."""

    config: dict[str, int]
    grids: tuple[tuple[int, int, int], ...]  # latent frames, height and width
    text_positions: int
    text_length: int


SIZES = {
    "toy": Size(
        {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2}, ((2, 8, 8),), 64, 40
    ),
    "medium": Size(
        {"num_layers": 6, "num_single_layers": 8, "num_attention_heads": 8},
        ((5, 16, 16),),
        831,
        400,
    ),
    # 256 x 256, where copying takes longer than computing, and 704 x 768
    "full": Size({}, ((33, 32, 32), (33, 88, 96)), 831, 400),
}


@dataclass(frozen=True)
class Way:
    """A way to have the weights on the device when they are used."""

    in_use: Callable[[], AbstractContextManager[None]]  # around several steps
    end: Callable[[], None] = lambda: None


def move_to_host(model: Transformer) -> None:
    """Moves the weights to the host as the loader lays them out there, pinned for a GPU."""
    on_gpu = model.device.type == "cuda"

    def allocate(num_bytes: int) -> Tensor:
        memory = HostMemory(num_bytes)
        if on_gpu and (error := memory.pin()):
            raise RuntimeError(f"the weights cannot be pinned: CUDA error {error}")
        return memory.tensor()

    weights = model.state_dict()
    specs = {name: (each.dtype, tuple(each.shape)) for name, each in weights.items()}
    slots = allocate_slots(model, specs, allocate)
    on_host = {name: slots[name].tensor(*specs[name]).copy_(each) for name, each in weights.items()}
    model.load_state_dict(on_host, assign=True)


def resident(model: Transformer, device: torch.device) -> Way:
    """All weights on the device."""
    model.to(device)
    return Way(nullcontext, lambda: move_to_host(model))


def ours(model: Transformer, device: torch.device, num_resident: int) -> Way:
    """The worker's offload."""
    offloaded = OffloadedModel(model, list(blocks(model).values()), device, num_resident)
    return Way(offloaded.in_use, offloaded.restore)


def group_offloading(model: Transformer, device: torch.device) -> Way:
    """That of diffusers, as fast as its settings make it."""
    on_gpu = device.type == "cuda"
    model.enable_group_offload(
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        non_blocking=on_gpu,
        use_stream=on_gpu,
        record_stream=on_gpu,
    )
    return Way(nullcontext)


def measure(
    model: Transformer, device: torch.device, inputs: dict[str, Any], way: Way, num_steps: int
) -> tuple[dict[str, float | None], list[Tensor]]:
    """Median seconds of a step of each kind and the peak of memory, and the velocities."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    def run(**more: Any) -> tuple[float, Any]:
        synchronize(device)
        started = time.perf_counter()
        output = model(**inputs, **more)
        synchronize(device)
        return time.perf_counter() - started, output

    with way.in_use():
        _, output = run(return_cached_tokens=True)
        steps = [run() for _ in range(num_steps)]
        cached_tokens = output.cached_tokens
        run(cached_tokens=cached_tokens)
        cached = [run(cached_tokens=cached_tokens) for _ in range(num_steps)]
        velocities = [steps[-1][1].sample.cpu(), cached[-1][1].sample.cpu()]
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    return {
        "step_seconds": round(statistics.median(seconds for seconds, _ in steps), 4),
        "cached_step_seconds": round(statistics.median(seconds for seconds, _ in cached), 4),
        "peak_gib": peak and round(peak, 2),
    }, velocities


def ways(model: Transformer, device: torch.device) -> Iterator[tuple[str, Way]]:
    """Each way in turn; group offloading last, since its hooks stay."""
    yield "resident", resident(model, device)
    num_blocks = len(blocks(model))
    for num_resident in (0, num_blocks // 2):
        yield f"ours, {num_resident} resident", ours(model, device, num_resident)
    yield "group offloading", group_offloading(model, device)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="full" if on_gpu else "toy")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    report(
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        torch=torch.__version__,
        size=arguments.size,
    )
    model = build_transformer(device, dtype, **size.config)
    if on_gpu:
        model.set_attention_backend(fastest_backend(device))
    inputs = [
        random_inputs(model, 2, grid, size.text_positions, size.text_length) for grid in size.grids
    ]
    expected: dict[int, list[Tensor]] = {}
    unequal = []
    for name, way in ways(model, device):
        for index, (grid, each) in enumerate(zip(size.grids, inputs, strict=True)):
            figures, velocities = measure(model, device, each, way, arguments.steps)
            equal = all(map(torch.equal, velocities, expected.setdefault(index, velocities)))
            report(latents=grid, way=name, **figures, equal=equal)
            unequal += [] if equal else [f"{name} at {grid}"]
        way.end()
        gc.collect()
    if unequal:
        parser.exit(1, f"other velocities than with all weights resident: {', '.join(unequal)}\n")


if __name__ == "__main__":
    main()
