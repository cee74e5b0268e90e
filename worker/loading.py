"""A model directory into a pipeline whose weights are on their device.

The one place that knows how bytes get there. Networks are made without storage, and each of their
tensors is allocated once, on the device. Threads read the files from front to back, block by block,
into a small ring of buffers (pinned for a GPU), and each block is copied from there on a stream of
its own. Nothing holds a whole file, and a tensor that changes its dtype does so on the device.

A block that the page cache holds is read from the cache, any other one past it: that is faster,
takes a tenth of the processor time, and leaves the memory to the jobs.

The components come in the order in which a job needs them. Each is prepared while those before it
are on their way.
"""

import ctypes
import math
import mmap
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, ModelMixin
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    LlavaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.initialization import no_init_weights

from worker import weights
from worker.face import TorchScriptFaceDetector
from worker.model.encoders import Float8LlavaModel, canonical_name
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel
from worker.pipeline import HunyuanVideoAvatarPipeline

Network = type[PreTrainedModel] | type[ModelMixin]

NETWORKS: dict[str, Network] = {  # in the order in which a job needs them
    "audio_encoder": WhisperModel,
    "text_encoder": LlavaModel,
    "text_encoder_2": CLIPTextModel,
    "vae": AutoencoderKLHunyuanVideo,
    "transformer": HunyuanVideoAvatarTransformer3DModel,
}
OTHERS: dict[str, Any] = {
    "feature_extractor": WhisperFeatureExtractor,
    "tokenizer": PreTrainedTokenizerFast,
    "tokenizer_2": CLIPTokenizer,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
PAGE_BYTES = 4096  # reads past the page cache begin and end at pages, on the disk and in memory
DISK_SECONDS = 0.3  # for how long the disk's speed is measured
FAULTS_SHOWN = 10

_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    num_threads: int = 8
    # The ring, and the page to align it, then fill a power of two, which is what they cost pinned.
    block_bytes: int = 2**24 - PAGE_BYTES
    past_cache: bool = True  # what the page cache does not hold

    @property
    def num_buffers(self) -> int:
        """One to read into and one to copy from, for each thread."""
        return 2 * self.num_threads


@dataclass(frozen=True)
class ComponentLoad:
    """One component's way to the device."""

    name: str
    num_bytes: int  # on the disk
    ready_seconds: float  # from the start of the load until its last byte was read


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and how fast."""

    components: tuple[ComponentLoad, ...]
    num_bytes: int  # on the disk
    cached_bytes: int  # of these, in the page cache
    seconds: float
    disk_bytes_per_second: float | None  # measured just before; None: too little to measure it

    @property
    def bytes_per_second(self) -> float:
        """How fast the weights came."""
        return self.num_bytes / self.seconds

    @property
    def disk_ratio(self) -> float | None:
        """The same as a share of the disk's own speed; over 1 where the page cache helped."""
        disk = self.disk_bytes_per_second
        return None if disk is None else self.bytes_per_second / disk

    def __str__(self) -> str:
        speed = f"{self.bytes_per_second / 1e9:.2f} GB/s"
        if self.disk_bytes_per_second is not None:
            disk = self.disk_bytes_per_second / 1e9
            speed += f", {self.disk_ratio:.2f} of the disk's {disk:.2f} GB/s"
        ready = ", ".join(f"{part.name} {part.ready_seconds:.1f} s" for part in self.components)
        return (
            f"{self.num_bytes / 1e9:.2f} GB in {self.seconds:.1f} s, {speed}, "
            f"{self.cached_bytes / self.num_bytes:.0%} from the page cache; ready: {ready}"
        )


def load(
    model_dir: Path,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
    reading: Reading | None = None,
) -> tuple[HunyuanVideoAvatarPipeline, LoadReport]:
    """The pipeline with its weights on the device, bit for bit as by `from_pretrained`.

    Args:
        device: where the weights go. The CPU is right for components that take turns on the GPU;
            their memory is not pinned.
        dtypes: what floating-point weights are cast to, by component, and "default".

    Raises:
        OSError: a file is missing, or ends before its last tensor does.
        ValueError: a tensor that is unknown, missing or of another shape or kind, by file and key.
    """
    reading = reading or Reading()
    disk = disk_speed(model_dir, reading)
    started = time.monotonic()
    with _Transfer(device, reading) as transfer:
        networks: dict[str, Any] = {}
        for name, network_class in NETWORKS.items():
            dtype = dtypes.get(name, dtypes["default"])
            networks[name] = _without_storage(network_class, model_dir / name, dtype)
            transfer.fill(networks[name], model_dir / name, dtype)
        others = {name: each.from_pretrained(model_dir / name) for name, each in OTHERS.items()}
        if (model_dir / "face_detector").is_dir():
            detector = TorchScriptFaceDetector.from_pretrained(model_dir / "face_detector")
            others["face_detector"] = detector.to(device)
        blocks = transfer.finish()
    pipeline = HunyuanVideoAvatarPipeline(**networks, **others)
    components = tuple(
        ComponentLoad(
            name,
            num_bytes=sum(block.num_bytes for block in own),
            ready_seconds=max(block.moved_at for block in own) - started,
        )
        for name, own in zip(networks, blocks, strict=True)
    )
    return pipeline, LoadReport(
        components=components,
        num_bytes=sum(component.num_bytes for component in components),
        cached_bytes=sum(block.num_bytes for own in blocks for block in own if block.was_cached),
        seconds=time.monotonic() - started,
        disk_bytes_per_second=disk,
    )


def weight_bytes(model_dir: Path, dtypes: Mapping[str, torch.dtype]) -> int:
    """What the weights will take in memory.

    Raises:
        OSError, ValueError: a file of weights cannot be read.
    """
    return sum(
        tensor.num_values * tensor.dtype_as(dtypes.get(name, dtypes["default"])).itemsize
        for name in NETWORKS
        for path in _weight_files(model_dir / name)
        for tensor in _stored_tensors(path)
    )


def disk_speed(model_dir: Path, reading: Reading, seconds: float = DISK_SECONDS) -> float | None:
    """Bytes a second of reads past the page cache, from the end of the model's largest file on.

    None: there is too little to read.
    """
    paths = (path for name in NETWORKS for path in _weight_files(model_dir / name))
    path = max(paths, key=lambda path: path.stat().st_size)
    num_blocks = path.stat().st_size // reading.block_bytes
    if num_blocks < reading.num_threads:
        return None
    blocks = iter(reversed(range(num_blocks)))
    lock = threading.Lock()
    deadline = time.monotonic() + seconds

    def read(buffer: _Buffer) -> int:
        """Bytes that this thread has read in the time."""
        num_bytes = 0
        while time.monotonic() < deadline:
            with lock:
                block = next(blocks, None)
            if block is None:
                break
            start = block * reading.block_bytes
            file.read(buffer.view, start, reading.block_bytes, past_cache=True)
            num_bytes += reading.block_bytes
        return num_bytes

    with _File(path) as file, ThreadPoolExecutor(reading.num_threads) as threads:
        buffers = _ring(reading, reading.num_threads, None)
        started = time.monotonic()
        num_bytes = sum(threads.map(read, buffers))
        return num_bytes / (time.monotonic() - started)


def _without_storage(network_class: Network, directory: Path, dtype: torch.dtype) -> nn.Module:
    """The network as its config describes it; its parameters are on the meta device."""
    if issubclass(network_class, PreTrainedModel):
        config = network_class.config_class.from_pretrained(directory)
        if config.architectures == [Float8LlavaModel.__name__]:
            network_class = Float8LlavaModel
        # Its buffers are in no file: they are made here, for real.
        with init_empty_weights(), no_init_weights():
            return network_class._from_config(config, dtype=dtype).eval()
    with torch.device("meta"):  # it has no buffers
        return network_class.from_config(network_class.load_config(directory)).eval()


def _weight_files(directory: Path) -> list[Path]:
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{directory} holds no weights")
    return paths


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in a file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in the file
    end: int

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    def dtype_as(self, dtype: torch.dtype) -> torch.dtype:
        """What it is kept as where numbers are kept as `dtype`; the bits of 8-bit numbers stay."""
        return dtype if self.dtype.is_floating_point else self.dtype


def _stored_tensors(path: Path) -> list[_Stored]:
    """What the file holds, from front to back."""
    header, first = weights.read_header(path)
    tensors = []
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {key} is of an unknown dtype, {entry['dtype']}")
        start, end = (first + offset for offset in entry["data_offsets"])
        tensors.append(_Stored(key, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, end))
    return sorted(tensors, key=lambda tensor: tensor.start)


def _match(
    network: nn.Module, directory: Path, files: Mapping[Path, Sequence[_Stored]]
) -> dict[str, str]:
    """The network's names by the keys of the files.

    Raises:
        ValueError: a tensor that is unknown, missing or of another shape or kind.
    """
    tensors = network.state_dict()
    missing = {canonical_name(name): name for name in tensors}
    names, faults = {}, []
    for path, stored in files.items():
        for found in stored:
            name = missing.pop(canonical_name(found.key), None)
            if name is None:
                faults.append(f"{path}: {found.key} is unknown, or there twice")
                continue
            names[found.key] = name
            shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
            if found.shape != shape:
                faults.append(f"{path}: {found.key} is of shape {found.shape}, not {shape}")
            elif found.dtype.is_floating_point != dtype.is_floating_point:
                faults.append(f"{path}: {found.key} is of {found.dtype}, not {dtype}")
    faults += [f"{directory}: {name} is missing" for name in missing.values()]
    if faults:
        more = f"; and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        raise ValueError("; ".join(faults[:FAULTS_SHOWN]) + more)
    return names


@dataclass(frozen=True)
class _Moved:
    """A block of a file that has been read."""

    num_bytes: int
    was_cached: bool
    moved_at: float  # time.monotonic()


class _Transfer:
    """Fills networks with what their files hold, several blocks at a time.

    Leaving the context ends the threads and closes the files, whatever has happened.
    """

    def __init__(self, device: torch.device, reading: Reading) -> None:
        self._device = device
        self._reading = reading
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: SimpleQueue[_Buffer] = SimpleQueue()
        for buffer in _ring(reading, reading.num_buffers, self._stream):
            self._buffers.put(buffer)
        self._threads = ThreadPoolExecutor(reading.num_threads, thread_name_prefix="load")
        self._files = ExitStack()
        self._moves: list[list[Future[_Moved]]] = []  # of each network

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._files.close()

    def fill(self, network: nn.Module, directory: Path, dtype: torch.dtype) -> None:
        """Gives the network tensors on the device, and sends what belongs into them.

        Raises:
            OSError, ValueError: as `load`.
        """
        files = {path: _stored_tensors(path) for path in _weight_files(directory)}
        names = _match(network, directory, files)
        tensors: dict[str, Tensor] = {}
        moves = []
        for path, stored in files.items():
            incoming = []
            for each in stored:
                tensor = torch.empty(each.shape, dtype=each.dtype_as(dtype), device=self._device)
                tensors[names[each.key]] = tensor
                incoming.append(_Incoming(each, tensor))
            if self._stream is not None:  # the memory may just have been given up by other work
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
            file = self._files.enter_context(_File(path))
            for start in range(0, stored[-1].end, self._reading.block_bytes):
                end = min(start + self._reading.block_bytes, stored[-1].end)
                inside = [one for one in incoming if one.start < end and one.end > start]
                moves.append(self._threads.submit(self._move, file, start, end, inside))
        self._moves.append(moves)
        network.load_state_dict(tensors, assign=True)
        network.to(self._device)  # its buffers

    def finish(self) -> list[list[_Moved]]:
        """The blocks of each network, once all are where they belong.

        Raises:
            OSError: a file ends before its last tensor does.
        """
        moved = [[move.result() for move in moves] for moves in self._moves]
        if self._stream is not None:
            self._stream.synchronize()
        return moved

    def _move(self, file: "_File", start: int, end: int, incoming: list["_Incoming"]) -> _Moved:
        """Reads a block and sends each tensor its part of it. Runs in a thread."""
        was_cached = file.is_cached(start, end)
        past_cache = self._reading.past_cache and not was_cached
        buffer = self._buffers.get()
        try:
            buffer.wait()
            file.read(buffer.view, start, end - start, past_cache=past_cache)
            with buffer.copying():
                for tensor in incoming:
                    tensor.take(buffer.memory[: end - start], start)
        finally:
            self._buffers.put(buffer)
        return _Moved(end - start, was_cached, time.monotonic())


class _Incoming:
    """A tensor whose bytes come in pieces, in any order and from any thread."""

    def __init__(self, stored: _Stored, tensor: Tensor) -> None:
        self.start, self.end = stored.start, stored.end  # in the file
        self._stored_dtype = stored.dtype
        self._tensor = tensor
        self._landing: Tensor | None = None  # where the pieces go, from the first to the last
        self._missing_bytes = stored.end - stored.start
        self._lock = threading.Lock()

    def take(self, block: Tensor, block_start: int) -> None:
        """Copies what is its own of a block of bytes that begins at `block_start` in the file."""
        start = max(self.start, block_start)
        end = min(self.end, block_start + len(block))
        with self._lock:
            if self._landing is None:
                self._landing = self._prepare_landing()
            landing = self._landing
        piece = block[start - block_start : end - block_start]
        target = landing.view(-1).view(torch.uint8)[start - self.start : end - self.start]
        target.copy_(piece, non_blocking=True)
        with self._lock:
            self._missing_bytes -= end - start
            if self._missing_bytes == 0:  # every piece is on the stream, before what comes now
                self._landing = None
                if landing is not self._tensor:
                    self._tensor.copy_(landing)

    def _prepare_landing(self) -> Tensor:
        """The tensor itself, or one of the stored dtype, which is cast in the end."""
        if self._stored_dtype == self._tensor.dtype:
            return self._tensor
        return torch.empty_like(self._tensor, dtype=self._stored_dtype)


class _Buffer:
    """Memory for one block, and the copies from it."""

    def __init__(self, memory: Tensor, stream: torch.cuda.Stream | None) -> None:
        self.memory = memory
        self.view = memory.numpy().data
        self._stream = stream
        self._copied = torch.cuda.Event(blocking=True) if stream is not None else None

    def wait(self) -> None:
        """Returns when every copy from it has ended."""
        if self._copied is not None:
            self._copied.synchronize()

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Copies made inside run on the stream; without one they end before they return."""
        with torch.cuda.stream(self._stream):  # which does nothing for None
            yield
            if self._copied is not None:
                self._copied.record()


def _ring(reading: Reading, count: int, stream: torch.cuda.Stream | None) -> list[_Buffer]:
    """Buffers that begin at pages; pinned if there is a stream to copy on."""
    num_bytes = count * reading.block_bytes
    memory = torch.empty(num_bytes + PAGE_BYTES, dtype=torch.uint8, pin_memory=stream is not None)
    start = -memory.data_ptr() % PAGE_BYTES
    blocks = memory[start : start + num_bytes].split(reading.block_bytes)
    return [_Buffer(block, stream) for block in blocks]


class _File:
    """A file to be read in blocks, through the page cache or past it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pages = _cached_pages(path)
        self._through_cache = os.open(path, os.O_RDONLY)
        try:
            self._past_cache = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # not every file system can
            self._past_cache = os.open(path, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._through_cache)
        os.close(self._past_cache)

    def is_cached(self, start: int, end: int) -> bool:
        """Whether most of these bytes were in the page cache when the file was opened."""
        pages = self._pages[start // PAGE_BYTES : -(-end // PAGE_BYTES)]
        return bool(pages.mean() > 0.5)

    def read(self, buffer: memoryview, start: int, num_bytes: int, *, past_cache: bool) -> None:
        """Puts at least `num_bytes` from `start` on into the buffer, which may be longer.

        Raises:
            OSError: the file ends before.
        """
        descriptor = self._past_cache if past_cache else self._through_cache
        filled = 0
        while filled < num_bytes:
            count = os.preadv(descriptor, [buffer[filled:]], start + filled)
            if count == 0:
                raise OSError(f"{self._path} ends at byte {start + filled}, inside a tensor")
            filled += count


def _cached_pages(path: Path) -> np.ndarray:  # (pages,), True in the page cache
    """Which pages of the file the page cache holds; all of them where the kernel does not tell.

    It tells root, the file's owner, and whoever may write it.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        memory = np.frombuffer(mapping, np.uint8)
        pages = np.empty(-(-memory.nbytes // PAGE_BYTES), np.uint8)
        failed = _LIBC.mincore(
            ctypes.c_void_p(memory.ctypes.data),
            ctypes.c_size_t(memory.nbytes),
            ctypes.c_void_p(pages.ctypes.data),
        )
        del memory  # or the mapping cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed", str(path))
    return (pages & 1).astype(bool)
