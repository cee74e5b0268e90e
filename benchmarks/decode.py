"""Times the decoder with random weights: diffusers' own tiled decode, and ours with less memory.

    python -m benchmarks.decode
    python -m benchmarks.decode --mp4 --profile
    python -m benchmarks.decode --device cpu --dtype float32 --channels 4 4 8 8 --layers 1 \
        --groups 4 --sizes 64x96 --num-frames 21

Prints one JSON object a measurement and then a table. `peak_gib` is what PyTorch's tensors took at
once, the autoencoder's weights included, `reserved_gib` what its allocator held for them; neither
counts the CUDA context. `difference` is that of the frames of one tile, relative to diffusers' in
float32. Each way decodes the first tiles once before it is timed. `--mp4` also writes the first
size as a video, once with each chunk decoded after the last one is encoded and once ahead of it;
its frames are noise, which takes x264 longer than a face. `--profile` lists the kernels of a tile.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from benchmarks.random_model import build_autoencoder
from worker.generation.engine import to_uint8
from worker.generation.prefetch import prefetch
from worker.media.inputs import AudioSegment
from worker.media.video import write_video
from worker.model import autoencoder, kernels

FPS = 25
TILE_LATENTS = 17  # the longest tile in time
COLUMNS = ("size", "way", "seconds", "peak_gib", "reserved_gib", "difference")


@dataclass(frozen=True)
class Way:
    """One way to decode."""

    name: str
    decode: Callable[[AutoencoderKLHunyuanVideo, Tensor], Iterator[Tensor]]
    memory_format: torch.memory_format = autoencoder.MEMORY_FORMAT
    by_kernels: bool = True  # else by torch's operators

    def __call__(self, vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Iterator[Tensor]:
        """The frames in chunks."""
        usual = autoencoder.MEMORY_FORMAT, kernels.kernels_for_chunk
        autoencoder.MEMORY_FORMAT = self.memory_format
        if not self.by_kernels:
            kernels.kernels_for_chunk = lambda chunk: None
        try:
            yield from self.decode(vae, latents)
        finally:
            autoencoder.MEMORY_FORMAT, kernels.kernels_for_chunk = usual


def theirs(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Iterator[Tensor]:
    """All frames at once, from the same tiles."""
    sample = vae.decode(latents).sample
    yield (sample[0].transpose(0, 1).float() / 2 + 0.5).clamp(0, 1)


def ours(scratch_bytes: int) -> Callable[[AutoencoderKLHunyuanVideo, Tensor], Iterator[Tensor]]:
    return lambda vae, latents: autoencoder.decode_frames(vae, latents, scratch_bytes)


WAYS = [
    Way("diffusers", theirs),
    Way("ours", ours(autoencoder.SCRATCH_BYTES)),
    Way("ours, by torch", ours(autoencoder.SCRATCH_BYTES), by_kernels=False),
    Way("ours, channels first", ours(autoencoder.SCRATCH_BYTES), torch.contiguous_format),
    Way("ours, least scratch", ours(0)),
]
MORE_WAYS = [  # in one tile only
    Way("ours, scratch 64 MiB", ours(2**26)),
    Way("ours, scratch 256 MiB", ours(2**28)),
    Way("ours, scratch 4 GiB", ours(2**32)),
]


def random_latents(vae: AutoencoderKLHunyuanVideo, num_frames: int, size: str) -> Tensor:
    height, width = (int(pixels) // vae.spatial_compression_ratio for pixels in size.split("x"))
    num_latents = (num_frames - 1) // vae.temporal_compression_ratio + 1
    shape = (1, vae.config.latent_channels, num_latents, height, width)
    generator = torch.Generator(vae.device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=vae.device).to(vae.dtype)


def measure(way: Way, vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> dict[str, Any]:
    """Seconds and memory of a decode; None where the memory did not suffice."""
    on_gpu = vae.device.type == "cuda"
    try:
        use_up(way(vae, latents[:, :, :TILE_LATENTS]))
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        use_up(way(vae, latents))
        if on_gpu:
            torch.cuda.synchronize()
        seconds = round(time.perf_counter() - started, 3)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"seconds": None}
    if not on_gpu:
        return {"seconds": seconds}
    return {
        "seconds": seconds,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }


def use_up(chunks: Iterator[Tensor]) -> None:
    for _ in map(bool, map(len, chunks)):  # a loop's variable would keep a chunk
        pass


def differences(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> dict[str, float | None]:
    """How far each way's frames of a tile are from diffusers' in float32, by the way's name."""
    dtype = vae.dtype
    tensor_cores = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        expected = torch.cat(list(theirs(vae.float(), latents.float())))
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {}
    finally:
        vae.to(dtype)
        torch.backends.cudnn.allow_tf32 = tensor_cores
    found: dict[str, float | None] = {}
    for way in WAYS + MORE_WAYS:
        try:
            frames = torch.cat(list(way(vae, latents)))
        except torch.cuda.OutOfMemoryError:
            found[way.name] = None
            continue
        found[way.name] = float(f"{((frames - expected).norm() / expected.norm()).item():.2e}")
    return found


def measure_video(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Iterator[dict[str, Any]]:
    """Seconds of the frames as an mp4: decoded and encoded in turn, and decoded ahead."""
    height, width = (side * vae.spatial_compression_ratio for side in latents.shape[3:])
    num_frames = vae.temporal_compression_ratio * (latents.shape[2] - 1) + 1
    recording = AudioSegment.silent(round(1000 * num_frames / FPS), 16_000)
    for name in ("mp4 in turn", "mp4 ahead"):
        chunks = map(to_uint8, autoencoder.decode_frames(vae, latents))
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            write_video(
                Path(directory) / "video.mp4",
                prefetch(chunks) if name == "mp4 ahead" else chunks,
                fps=FPS,
                height=height,
                width=width,
                recording=recording,
                metadata={},
            )
        yield {"way": name, "seconds": round(time.perf_counter() - started, 3)}


def profile(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> str:
    """The operations of a tile, those that take longest first."""
    with torch.profiler.profile() as profiler:
        use_up(autoencoder.decode_frames(vae, latents))
        if vae.device.type == "cuda":
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if vae.device.type == "cuda" else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=90))


def write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(rows: list[dict[str, Any]]) -> str:
    cells = [COLUMNS, *(tuple(_cell(row.get(name, "")) for name in COLUMNS) for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _cell(value: Any) -> str:
    return "too large" if value is None else str(value)


def parse_arguments(command_line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float16)
    parser.add_argument("--sizes", nargs="+", default=["704x768", "256x256"], help="HxW pixels")
    parser.add_argument("--num-frames", type=int, default=129)
    parser.add_argument("--channels", nargs=4, type=int, default=[128, 256, 512, 512])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--mp4", action="store_true")
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args(command_line)


@torch.no_grad()
def main(command_line: list[str] | None = None) -> None:
    arguments = parse_arguments(command_line)
    gpu = torch.cuda.get_device_name() if arguments.device.type == "cuda" else None
    cudnn = torch.backends.cudnn.version() if gpu else None
    write(json.dumps({"torch": torch.__version__, "cudnn": cudnn, "gpu": gpu}))
    vae = build_autoencoder(
        arguments.device,
        arguments.dtype,
        block_out_channels=tuple(arguments.channels),
        layers_per_block=arguments.layers,
        norm_num_groups=arguments.groups,
    )
    side = vae.tile_sample_min_height // vae.spatial_compression_ratio
    first = random_latents(vae, arguments.num_frames, arguments.sizes[0])
    tile = first[:, :, :TILE_LATENTS, :side, :side].contiguous()
    difference = differences(vae, tile)

    rows: list[dict[str, Any]] = []

    def report(**row: Any) -> None:
        rows.append(row)
        write(json.dumps(row))

    for size in arguments.sizes:
        latents = random_latents(vae, arguments.num_frames, size)
        for way in WAYS:
            measured = measure(way, vae, latents)
            report(size=size, way=way.name, **measured, difference=difference.get(way.name))
    for way in MORE_WAYS:
        measured = measure(way, vae, tile)
        report(size="one tile", way=way.name, **measured, difference=difference.get(way.name))
    if arguments.mp4:
        for measured in measure_video(vae, first):
            report(size=arguments.sizes[0], **measured)
    if arguments.profile:
        write(profile(vae, tile))
    write(table(rows))


if __name__ == "__main__":
    main()
