"""Times one CFG branch on one GPU, and on several that share its tokens.

    python -m benchmarks.context_parallel [--num-gpus 2] [--float8]
    python -m benchmarks.context_parallel --device cpu --sizes 64x32 --num-frames 2 --num-layers 2 \
        --num-single-layers 2 --num-attention-heads 2

Two GPUs compute a branch each, four share each branch between two; how well two do that is what is
seen here. The weights are random, from the same seed on each rank. Prints one JSON object a size
and a carrier, NCCL (on a CPU Gloo) or the copy engines: seconds of a pass, alone on the slowest
rank and shared (the least of `--times`), their ratio, how far apart the outputs are, and the
milliseconds that one block's four swaps take without anything else.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.random_model import (
    TEXT_LENGTH,
    TEXT_POSITIONS,
    build_transformer,
    random_inputs,
    relative_difference,
    report,
    synchronize,
)
from worker.model.attention import fastest_backend
from worker.model.context_parallel import ContextParallel
from worker.model.peer_memory import open_peer_memory
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel
from worker.settings import configure_collectives
from worker.shapes import SPATIAL_COMPRESSION, WINDOW_LATENTS

SWAPS = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", default=["704x768", "384x384"], help="height x width")
    parser.add_argument("--num-frames", type=int, default=WINDOW_LATENTS, help="of latents")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--float8", action="store_true", help="the blocks' linear layers in 8 bits")
    parser.add_argument("--backend", help="of attention; else the fastest")
    parser.add_argument("--num-layers", type=int, default=20)
    parser.add_argument("--num-single-layers", type=int, default=40)
    parser.add_argument("--num-attention-heads", type=int, default=24)
    return parser.parse_args()


class Rank:
    """One of the processes, with a whole model."""

    def __init__(self, index: int, arguments: argparse.Namespace, rendezvous: Path) -> None:
        self.index = index
        self.arguments = arguments
        on_gpu = arguments.device == "cuda"
        self.device = torch.device("cuda", index) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)
        configure_collectives()
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.FileStore(str(rendezvous), arguments.num_gpus),  # type: ignore[attr-defined]
            rank=index,
            world_size=arguments.num_gpus,
            device_id=self.device if on_gpu else None,
        )
        assert dist.group.WORLD is not None
        self.carriers = {"collective": ContextParallel(dist.group.WORLD)}
        if on_gpu and (memory := open_peer_memory(dist.group.WORLD, self.device)):
            self.carriers["copy engines"] = ContextParallel(dist.group.WORLD, memory)
        self.model = self._model(torch.bfloat16 if on_gpu else torch.float32)

    def _model(self, dtype: torch.dtype) -> HunyuanVideoAvatarTransformer3DModel:
        names = ("num_layers", "num_single_layers", "num_attention_heads")
        config = {name: getattr(self.arguments, name) for name in names}
        model = build_transformer(self.device, dtype, **config)
        backend = [self.arguments.backend or "native"]
        if self.arguments.backend is None and self.device.type == "cuda" and self.index == 0:
            backend = [fastest_backend(self.device)]
        dist.broadcast_object_list(backend)  # all take the first rank's
        model.set_attention_backend(backend[0])
        return model

    def run(self) -> None:
        """All sizes; the first rank reports."""
        for size in self.arguments.sizes:
            height, width = (int(side) // SPATIAL_COMPRESSION for side in size.split("x"))
            grid = (self.arguments.num_frames, height, width)
            inputs = random_inputs(self.model, 1, grid, TEXT_POSITIONS, TEXT_LENGTH)
            inputs["float8"] = self.arguments.float8

            def forward(inputs: dict[str, Tensor] = inputs) -> Tensor:
                with torch.no_grad():
                    sample, *_ = self.model(**inputs, return_dict=False)
                return sample

            self.model.context_parallel = None
            alone, expected = self._least_seconds(forward)
            alone = self._most(alone)
            for carrier, parallel in self.carriers.items():
                self.model.context_parallel = parallel
                shared, output = self._least_seconds(forward)
                swaps = self._swap_milliseconds(parallel, grid)
                if self.index == 0:
                    report(
                        size=size,
                        float8=self.arguments.float8,
                        carrier=carrier,
                        seconds_alone=round(alone, 4),
                        seconds=round(shared, 4),
                        ratio=round(alone / shared, 3),
                        relative_difference=relative_difference(output, expected),
                        swaps_ms=round(swaps, 3),
                    )

    def _most(self, seconds: float) -> float:
        """The most of any rank: a pass that all share is as quick as the slowest GPU."""
        most = torch.tensor(seconds, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.item()

    def _least_seconds(self, forward: Callable[[], Tensor]) -> tuple[float, Tensor]:
        """Of the passes after a first one, which all ranks begin together; and the output."""
        output, taken = forward(), []
        for _ in range(self.arguments.times):
            dist.barrier()
            synchronize(self.device)
            started = time.perf_counter()
            output = forward()
            synchronize(self.device)
            taken.append(time.perf_counter() - started)
        return min(taken), output

    def _swap_milliseconds(self, parallel: ContextParallel, grid: tuple[int, int, int]) -> float:
        """Of one block: queries, keys and values to the heads, and what is attended back."""
        config = self.model.config
        columns = (grid[1] // config.patch_size) * (grid[2] // config.patch_size)
        shares = parallel.token_shares(columns, 1 + grid[0], TEXT_LENGTH)
        image, text = shares.image[self.index], shares.text[self.index]
        heads, width = config.num_attention_heads, config.attention_head_dim
        x = torch.zeros(
            1, image + text, heads, width, device=self.device, dtype=self.model.dtype
        ).split([image, text], dim=1)

        def swap() -> None:
            swaps = [shares.swap_for_heads(*x) for _ in range(3)]
            attended = [each.wait() for each in swaps][-1]
            shares.swap_back(attended, heads).wait()

        swap()
        dist.barrier()
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(SWAPS):
            swap()
        synchronize(self.device)
        return (time.perf_counter() - started) * 1e3 / SWAPS


def run_rank(index: int, arguments: argparse.Namespace, rendezvous: Path) -> None:
    """The whole of a process."""
    rank = Rank(index, arguments, rendezvous)
    if index == 0:
        name = torch.cuda.get_device_name() if rank.device.type == "cuda" else "cpu"
        report(torch=torch.__version__, gpu=name, num_gpus=arguments.num_gpus)
    rank.run()
    dist.barrier()
    synchronize(rank.device)
    sys.stdout.flush()
    os._exit(0)  # NCCL's own end waits for processes that are gone


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(
                target=run_rank, args=(index, arguments, Path(directory) / "rendezvous")
            )
            for index in range(arguments.num_gpus)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main()
