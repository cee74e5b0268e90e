"""How fast the loader is: beside the disk, beside the bus, and beside what libraries offer.

    python -m benchmarks.loading --directory /tmp/model [--size full] [--limit-seconds 500]

It writes a model directory of the real size with random weights, unless it is there, and loads it
in each of several ways, each in a process of its own, the most important first: what does not fit
into the time is left out. "Cold" is without the files in the page cache, "warm" with all of them in
it. Every measurement is one line of JSON as soon as it is made; a table and the worker's shares of
the disk's and the bus's speed end it. Run it as root: only root can empty the page cache of
everything.
"""

import argparse
import gc
import importlib.util
import inspect
import itertools
import json
import math
import mmap
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, ModelMixin
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.loading import host_memory, loader
from worker.loading.files import BlockReader
from worker.loading.model_directory import DEMO_DIR
from worker.loading.transfer import Place, Reading
from worker.model.encoders import canonical_name
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

GB = 1e9
GIB = 2**30
MIB = 2**20
SHARD_BYTES = 2 * GIB
WRITERS = 8
RESERVE_SECONDS = 15.0  # a step is skipped if less than this is left
DISK_SECONDS = 2.0  # at most, for each setting in which the disk is read
WANTED = {"by_worker warm": 0.5, "by_worker cold": 0.85}  # shares of the bus and of the disk
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
DTYPES = {"transformer": torch.bfloat16, "default": torch.float16}  # as the worker has them
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Size:
    """What makes the networks large; the rest is as published."""

    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    text_layers: int
    text_width: int
    vocabulary: int
    vae_channels: tuple[int, ...]


SIZES = {
    "full": Size(20, 40, 24, 30, 4096, 128_320, (128, 256, 512, 512)),
    "half": Size(10, 20, 24, 15, 4096, 128_320, (128, 256, 512, 512)),  # 21 GB
    "medium": Size(6, 8, 8, 6, 2048, 32_000, (128, 256, 512, 512)),  # 2 GB
    "tiny": Size(2, 2, 2, 2, 256, 4000, (32, 32, 64, 64)),
}


# The model directory


def networks(size: Size) -> dict[str, tuple[ModelMixin | PreTrainedModel, torch.dtype]]:
    """Every network without storage, and what its weights are stored in."""
    llava = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.text_width,
            intermediate_size=size.text_width * 7 // 2,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.text_width // 128,
            num_key_value_heads=max(1, size.text_width // 512),
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=size.text_width // 4,
            intermediate_size=size.text_width,
            num_hidden_layers=24 if size.text_layers > 6 else 2,
            num_attention_heads=max(1, size.text_width // 256),
            image_size=336,
            patch_size=14,
        ),
    )
    clip = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    whisper = WhisperConfig(
        d_model=384,
        encoder_layers=4,
        encoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_layers=0,
        decoder_attention_heads=6,
        decoder_ffn_dim=1536,
    )
    with torch.device("meta"):
        return {
            "audio_encoder": (WhisperModel(whisper), torch.float16),
            "text_encoder": (LlavaModel(llava), torch.float16),
            "text_encoder_2": (CLIPTextModel(clip), torch.float16),
            "vae": (
                AutoencoderKLHunyuanVideo(block_out_channels=size.vae_channels),
                torch.float32,
            ),
            "transformer": (
                HunyuanVideoAvatarTransformer3DModel(
                    num_layers=size.num_layers,
                    num_single_layers=size.num_single_layers,
                    num_attention_heads=size.num_attention_heads,
                    text_embed_dim=size.text_width,
                ),
                torch.bfloat16,
            ),
        }


def write_model(directory: Path, size: Size) -> None:
    """Writes the directory that the worker loads, with random weights."""
    patterns = {
        # small enough for products to stay finite: benchmarks/memory_plans.py runs this model
        dtype: (values / 50).to(dtype).view(torch.uint8).cpu().numpy()
        for dtype in NAMES
        for values in [torch.randn(64 * MIB, device=DEVICE)]
    }
    with ThreadPoolExecutor(WRITERS) as threads:
        for name, (network, dtype) in networks(size).items():
            (directory / name).mkdir(parents=True)
            if isinstance(network, ModelMixin):
                network.save_config(directory / name)
                stem = "diffusion_pytorch_model"
            else:
                network.config.save_pretrained(directory / name)
                stem = "model"
            write_shards(directory / name, stem, network, dtype, patterns[dtype], threads)
    write_tokenizer(directory / "tokenizer", size.vocabulary)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    clip_tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    clip_tokenizer.save_pretrained(directory / "tokenizer_2")
    WhisperFeatureExtractor(feature_size=80).save_pretrained(directory / "feature_extractor")
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(directory / "scheduler")
    shutil.copy(DEMO_DIR / "model_index.json", directory)


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """Writes a tokenizer whose files are as large as the published one's: reading takes time."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = itertools.product(letters, letters)
    triples = ((a + b, c) for a, b, c in itertools.product(letters, repeat=3))
    merges = list(itertools.islice(itertools.chain(pairs, triples), vocabulary - len(letters)))
    words = [*letters, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"added_tokens_decoder": {}}))  # as the published one has


def write_shards(
    directory: Path,
    stem: str,
    network: nn.Module,
    dtype: torch.dtype,
    pattern: np.ndarray,
    threads: ThreadPoolExecutor,
) -> None:
    """Writes the network's tensors as the converter lays them out, filled with the pattern."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, tensor in network.state_dict().items():
        num_bytes = tensor.numel() * dtype.itemsize
        if num_bytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tuple(tensor.shape)
        room -= num_bytes
    weight_map: dict[str, str] = {}
    writes = []
    for number, shapes in enumerate(shards, start=1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = directory / f"{stem}{suffix}.safetensors"
        weight_map |= dict.fromkeys(shapes, path.name)
        ends = list(
            itertools.accumulate(math.prod(shape) * dtype.itemsize for shape in shapes.values())
        )
        entries: dict[str, Any] = {
            name: {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
            for (name, shape), start, end in zip(shapes.items(), [0, *ends], ends, strict=False)
        }
        header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
        header += b" " * (-len(header) % 8)
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        writes.append(threads.submit(fill, path, ends[-1], pattern))
    for write in writes:
        write.result()
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def fill(path: Path, num_bytes: int, pattern: np.ndarray) -> None:
    """Appends that many bytes of the pattern, over and over, until the disk has them."""
    with path.open("ab") as file:
        for done in range(0, num_bytes, pattern.nbytes):
            file.write(pattern[: num_bytes - done].data)
        file.flush()
        os.fsync(file.fileno())


def weight_files(directory: Path) -> list[Path]:
    """The files in the order in which the loader reads them."""
    return [path for name in loader.NETWORKS for path in sorted(directory.glob(f"{name}/*.safe*s"))]


# The page cache


def empty_page_cache(directory: Path) -> None:
    """Takes the files out of the page cache; they must be on the disk."""
    for path in weight_files(directory):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1")


def fill_page_cache(directory: Path) -> None:
    """Brings all files into the page cache."""

    def read(path: Path) -> None:
        buffer = bytearray(16 * MIB)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(read, weight_files(directory)))


def cached_share(directory: Path) -> float:
    """How many of the files' blocks the page cache holds for the most part."""
    cached = []
    for path in weight_files(directory):
        size = path.stat().st_size
        with BlockReader(path) as file:
            step = 16 * MIB
            cached += [file.is_cached(start, start + step) for start in range(0, size, step)]
    return float(np.mean(cached))


# The steps: each yields what it measures


def by_worker(directory: Path) -> Iterator[dict[str, Any]]:
    """The worker's loader, and a look at some of the tensors."""
    components, measured = load_as_worker(directory, Reading())
    yield measured  # now, since the comparison takes memory
    yield {"tensors_compared": compare(directory, components)}


def by_worker_through_the_cache(directory: Path) -> Iterator[dict[str, Any]]:
    """The same, with every file read through the page cache."""
    yield load_as_worker(directory, Reading(past_cache=False))[1]


def by_worker_in_other_settings(directory: Path) -> Iterator[dict[str, Any]]:
    """The same with other threads and buffers, one after the other."""
    for num_threads, mib in ((12, 8), (8, 8), (16, 8), (12, 4), (12, 16), (12, 32)):
        reading = Reading(num_threads, buffer_bytes=mib * MIB)
        measured = load_as_worker(directory, reading)[1]
        yield measured | {"threads": num_threads, "read_mib": mib}
        gc.collect()
        torch.cuda.empty_cache()


def by_worker_with_torch_s_copies(directory: Path) -> Iterator[dict[str, Any]]:
    """The same with copies for each of which the interpreter is given up."""
    with mock.patch.object(host_memory, "cuda_copy", return_value=None):
        yield load_as_worker(directory, Reading())[1]


def by_worker_to_the_host(directory: Path) -> Iterator[dict[str, Any]]:
    """The same with the two large networks on the host, from where a GPU can fetch their blocks."""
    placement: dict[str, Place] = {
        "text_encoder": "host",
        "transformer": "host",
        "default": "device",
    }
    components, measured = load_as_worker(directory, Reading(), placement)
    large = [components["text_encoder"], components["transformer"]]
    pinned = {tensor.is_pinned() for network in large for tensor in network.state_dict().values()}
    yield measured | {"pinned": sorted(pinned)}


def load_as_worker(
    directory: Path, reading: Reading, placement: Mapping[str, Place] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The components, and how they came."""
    gc.disable()  # as the worker does at its start
    begun = time.perf_counter()
    components, report = loader.load(directory, DEVICE, DTYPES, placement, reading)
    seconds = time.perf_counter() - begun
    gc.enable()
    return components, {
        "bytes": report.num_bytes,
        "seconds": report.seconds,
        "seconds_with_preparation": round(seconds, 3),
        "probed_disk_gbps": round((report.disk_bytes_per_second or 0) / GB, 2),
        "cached_share": round(report.cached_bytes / report.num_bytes, 3),
        "ready_seconds": {part.name: round(part.ready_seconds, 2) for part in report.components},
    }


def compare(directory: Path, components: Mapping[str, Any]) -> int:
    """How many tensors, some of every file, are those of the files; all of them must be."""
    compared = 0
    for path in weight_files(directory):
        network = components[path.parent.name]
        names = {canonical_name(name): name for name in network.state_dict()}
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            for key in keys[:: math.ceil(len(keys) / 4)]:
                found = network.state_dict()[names[canonical_name(key)]]
                stored = file.get_tensor(key)
                dtype = DTYPES.get(path.parent.name, DTYPES["default"])
                expected = (
                    stored.to(dtype).to(found.dtype) if stored.is_floating_point() else stored
                )
                if not torch.equal(found.cpu(), expected):
                    raise ValueError(f"{path}: {key} was not loaded as it is stored")
                compared += 1
    return compared


def by_from_pretrained(directory: Path) -> Iterator[dict[str, Any]]:
    """diffusers and transformers."""

    def load() -> Any:
        return HunyuanVideoAvatarPipeline.from_pretrained(directory, dtype=DTYPES).to(DEVICE)

    yield timed(directory, load)


def by_load_file(directory: Path) -> Iterator[dict[str, Any]]:
    """safetensors, file by file to the device; no modules."""
    paths = weight_files(directory)
    yield timed(directory, lambda: [load_file(path, device=str(DEVICE)) for path in paths])


def by_load_file_pread(directory: Path) -> Iterator[dict[str, Any]]:
    """The same without mapping the files, where safetensors can."""
    if "backend" not in inspect.signature(load_file).parameters:
        return
    paths, options = weight_files(directory), {"backend": "pread"}
    yield timed(directory, lambda: [load_file(p, device=str(DEVICE), **options) for p in paths])


def by_runai_streamer(directory: Path) -> Iterator[dict[str, Any]]:
    """runai-model-streamer, tensor by tensor to the device; no modules."""
    if importlib.util.find_spec("runai_model_streamer") is None:
        return
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Any:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in weight_files(directory)])
            return [tensor.to(DEVICE, copy=True) for _, tensor in streamer.get_tensors()]

    yield timed(directory, load)


def by_fastsafetensors(directory: Path) -> Iterator[dict[str, Any]]:
    """fastsafetensors without GPUDirect Storage, which containers rarely have; no modules."""
    if importlib.util.find_spec("fastsafetensors") is None:
        return
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    device = "cuda:0" if DEVICE.type == "cuda" else "cpu"
    paths = itertools.groupby(weight_files(directory), key=lambda path: path.parent)
    components = [[str(path) for path in own] for _, own in paths]

    def load() -> Any:
        kept = []
        for component in components:  # a loader wants the names of its tensors to be unique
            loader = SafeTensorsFileLoader(SingleGroup(), device, nogds=True)
            loader.add_filenames({0: component})
            buffers = loader.copy_files_to_device()
            kept.append((buffers, [buffers.get_tensor(key) for key in loader.get_keys()]))
        return kept

    yield timed(directory, load)


def timed(directory: Path, load: Callable[[], Any]) -> dict[str, Any]:
    """How long the call takes, until the device has everything."""
    begun = time.perf_counter()
    kept = load()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    del kept
    num_bytes = sum(path.stat().st_size for path in weight_files(directory))
    return {"bytes": num_bytes, "seconds": seconds}


def bus(directory: Path) -> Iterator[dict[str, Any]]:
    """Copies from pinned memory to the device, back to back."""
    if DEVICE.type == "cpu":
        return
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device=DEVICE)
    for _ in range(2):  # the first time warms up
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(16):
            device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
    yield {"bytes": 16 * GIB, "seconds": seconds}


def disk(directory: Path) -> Iterator[dict[str, Any]]:
    """Reads past the page cache with nothing else to do, each setting in files of its own."""
    paths = weight_files(directory)
    settings = [(8, 16), (16, 16), (8, 64), (32, 16)]
    for index, (num_threads, mib) in enumerate(settings):
        own = [path for path in paths[index :: len(settings)] if path.stat().st_size > 64 * MIB]
        num_bytes, seconds = read_past_cache(own or paths, num_threads, mib * MIB)
        yield {
            "bytes": num_bytes,
            "seconds": seconds,
            "threads": num_threads,
            "read_mib": mib,
        }


def read_past_cache(paths: list[Path], num_threads: int, block_bytes: int) -> tuple[int, float]:
    """Bytes and seconds of reading the files once, or what of them fits in four seconds."""
    blocks = [(p, start) for p in paths for start in range(0, p.stat().st_size, block_bytes)]
    waiting, lock = iter(blocks), threading.Lock()
    begun = time.perf_counter()

    def read(_: int) -> int:
        buffer = mmap.mmap(-1, block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE)
        num_bytes = 0
        while time.perf_counter() - begun < DISK_SECONDS:
            with lock:
                path, start = next(waiting, (None, 0))
            if path is None:
                break
            num_bytes += os.preadv(descriptors[path], [buffer], start)
        return num_bytes

    descriptors = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths}
    with ThreadPoolExecutor(num_threads) as threads:
        num_bytes = sum(threads.map(read, range(num_threads)))
    seconds = time.perf_counter() - begun
    for descriptor in descriptors.values():
        os.close(descriptor)
    return num_bytes, seconds


@dataclass(frozen=True)
class Step:
    """What to run, what the page cache holds then, and what its rate is compared with."""

    run: Callable[[Path], Iterator[dict[str, Any]]]
    cache: str | None = None

    @property
    def name(self) -> str:
        return " ".join(filter(None, [self.run.__name__, self.cache]))

    @property
    def reference(self) -> str | None:
        return {"cold": "disk", "warm": "bus", None: None}[self.cache]


STEPS = [  # the most important first: the time may end
    Step(bus),
    Step(by_worker, "warm"),
    Step(disk),
    Step(by_worker, "cold"),
    Step(by_from_pretrained, "cold"),
    Step(by_from_pretrained, "warm"),
    Step(by_worker_in_other_settings, "warm"),
    Step(by_worker_with_torch_s_copies, "warm"),
    Step(by_worker_to_the_host, "warm"),
    Step(by_load_file, "warm"),
    Step(by_runai_streamer, "warm"),
    Step(by_fastsafetensors, "warm"),
    Step(by_load_file_pread, "warm"),
    Step(by_worker_through_the_cache, "cold"),
    Step(by_runai_streamer, "cold"),
    Step(by_fastsafetensors, "cold"),
    Step(by_load_file, "cold"),
    Step(by_load_file_pread, "cold"),
]


# The process of a step


def run_step(step: Step, directory: Path) -> None:
    """Prints what the step measures, with the memory that it took."""
    if DEVICE.type == "cuda":
        torch.ones(1, device=DEVICE)  # starts CUDA
    before = memory_bytes("VmRSS")
    anonymous_before = memory_bytes("RssAnon")
    peak_anonymous = anonymous_before
    over = threading.Event()

    def watch() -> None:
        nonlocal peak_anonymous
        while not over.wait(0.02):
            peak_anonymous = max(peak_anonymous, memory_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for measured in step.run(directory):
            memory = {
                "peak_rss_gib": memory_bytes("VmHWM") / GIB,
                "more_rss_gib": (memory_bytes("VmHWM") - before) / GIB,
                "more_anonymous_gib": (peak_anonymous - anonymous_before) / GIB,
            }
            emit(measured | {name: round(value, 2) for name, value in memory.items()})
    finally:
        over.set()
        watcher.join()


def memory_bytes(field: str) -> int:
    """A figure of this process from /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if field in line)


# The whole


def measure(directory: Path, limit_seconds: float, only: list[str]) -> list[dict[str, Any]]:
    """Every line that was printed."""
    begun = time.perf_counter()
    best = {"disk": 0.0, "bus": 0.0}  # bytes a second
    lines = []
    for step in STEPS:
        if only and step.name not in only:
            continue
        left = limit_seconds - (time.perf_counter() - begun)
        if left < RESERVE_SECONDS:
            emit({"step": step.name, "skipped": "no time is left"})
            continue
        prepare_page_cache(step, directory)
        share = cached_share(directory)
        # What loads nothing needs no process of its own, whose imports take seconds.
        alone = step.cache is not None
        for measured in in_own_process(step, directory, left) if alone else step.run(directory):
            line: dict[str, Any] = {"step": step.name, "cached_before": round(share, 3)} | measured
            if "seconds" in line:
                rate = line["bytes"] / line["seconds"]
                line |= {"seconds": round(line["seconds"], 3), "gbps": round(rate / GB, 2)}
                if step.run.__name__ in best:
                    best[step.run.__name__] = max(best[step.run.__name__], rate)
                if step.reference and best[step.reference]:
                    line["ratio"] = round(rate / best[step.reference], 3)
                    line["of"] = step.reference
            line["at_seconds"] = round(time.perf_counter() - begun, 1)
            lines.append(line)
            emit(line)
    return lines


def prepare_page_cache(step: Step, directory: Path) -> None:
    if step.cache == "warm" and cached_share(directory) < 0.999:
        fill_page_cache(directory)
    elif step.cache == "cold":
        empty_page_cache(directory)


def in_own_process(step: Step, directory: Path, limit_seconds: float) -> Iterator[dict[str, Any]]:
    """What the step prints, or why it printed nothing."""
    command = [sys.executable, "-m", "benchmarks.loading", "--directory", str(directory)]
    process = subprocess.Popen(  # noqa: S603  # ourselves
        [*command, "--step", str(STEPS.index(step))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    timer = threading.Timer(limit_seconds, process.kill)
    timer.start()
    output, errors = process.communicate()
    timer.cancel()
    yield from (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    if process.returncode:
        yield {"failed": process.returncode, "error": errors[-600:]}


def print_table(lines: list[dict[str, Any]]) -> None:
    """The measurements for a reader."""
    write = sys.stdout.write
    write(f"\n{'step':48}{'GB':>7}{'s':>8}{'GB/s':>8}{'ratio':>7} {'of':5}")
    write(f"{'peak RSS':>9}{'+RSS':>7}{'+anon':>7}  GiB\n")
    for line in lines:
        if "seconds" not in line:
            continue
        settings = f" {line['threads']} x {line['read_mib']} MiB" if "threads" in line else ""
        write(f"{line['step'] + settings:48}{line['bytes'] / GB:7.2f}{line['seconds']:8.2f}")
        write(f"{line['gbps']:8.2f}{line.get('ratio', ''):>7} {line.get('of', ''):5}")
        for field, width in (("peak_rss_gib", 9), ("more_rss_gib", 7), ("more_anonymous_gib", 7)):
            write(f"{line.get(field, ''):>{width}}")
        write("\n")
    for step, wanted in WANTED.items():
        for line in lines:
            if line["step"] == step and "ratio" in line:
                write(f"{step}: {line['ratio']:.3f} of the {line['of']}, {wanted} is wanted\n")


def emit(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Writes the model, measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="for the model directory")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument(
        "--limit-seconds", type=float, default=500.0, help="for all of it, imports too"
    )
    parser.add_argument("--only", nargs="*", default=[], help="steps by name; all by default")
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    if arguments.step is not None:
        run_step(STEPS[arguments.step], directory)
        return

    begun = time.perf_counter()
    if not (directory / "model_index.json").is_file():
        write_model(directory, SIZES[arguments.size])
    seconds = time.perf_counter() - begun
    num_bytes = sum(path.stat().st_size for path in weight_files(directory))
    machine = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "root": os.geteuid() == 0,
        "free_disk_gb": round(shutil.disk_usage(directory).free / GB, 1),
        "wrote_gb": round(num_bytes / GB, 2),
        "write_seconds": round(seconds, 1),
    }
    emit(machine)
    past_seconds = time.time() - psutil.Process().create_time()
    print_table(measure(directory, arguments.limit_seconds - past_seconds, arguments.only))


if __name__ == "__main__":
    main()
