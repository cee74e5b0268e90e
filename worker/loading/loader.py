"""A model directory into components whose weights are on their device.

The one place that knows how bytes get there. Networks are made without storage. The weights of each
of their blocks lie side by side in one storage, on the device or on the host, where a GPU can fetch
them block by block. Threads read the files from front to back, each into a small buffer (pinned for
a GPU), and copy from there on streams of their own. Nothing holds a whole file, and a tensor that
changes its dtype does so where it stays.

What the page cache holds is read from the cache, anything else past it: that is faster, takes a
tenth of the processor time, and leaves the memory to the jobs.

The components come in the order in which a job needs them. Each is prepared while those before it
are on their way.
"""

import ctypes
import itertools
import logging
import math
import mmap
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

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

from worker.loading import disk, model_directory
from worker.loading.offload import NetworkSize
from worker.model.encoders import Float8LlavaModel, canonical_name
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

logger = logging.getLogger(__name__)

Network = type[PreTrainedModel] | type[ModelMixin]
Place = Literal["device", "host"]

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
ALIGNMENT = 256  # of a tensor in its storage, in bytes: what CUDA's own allocations promise
DISK_SECONDS = 0.3  # for how long the disk's speed is measured
PROBE_BLOCK_BYTES = 2**23  # and in what pieces: a slow disk has to end those that it has begun
FAULTS_SHOWN = 10

_IN_A_BLOCK = re.compile(r"(.*?\.\d+)\.")  # the key of a tensor that belongs to a block

_LIBC = ctypes.CDLL(None, use_errno=True)
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    num_threads: int = 16
    # With the page to align it, it fills a power of two, which is what it costs pinned. Smaller
    # ones are read faster, and then wait for one another: Python runs one thread at a time.
    block_bytes: int = 2**25 - PAGE_BYTES
    past_cache: bool = True  # what the page cache does not hold


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
    seconds: float  # without those in which the disk is measured and the tokenizers are read
    disk_bytes_per_second: float | None  # measured just before; None: too little to measure it

    @property
    def bytes_per_second(self) -> float:
        """How fast the weights came."""
        return self.num_bytes / self.seconds

    @property
    def disk_ratio(self) -> float | None:
        """The same as a share of the disk's own speed; over 1 where the page cache helped."""
        disk_speed = self.disk_bytes_per_second
        return None if disk_speed is None else self.bytes_per_second / disk_speed

    def __str__(self) -> str:
        speed = f"{self.bytes_per_second / 1e9:.2f} GB/s"
        if self.disk_bytes_per_second is not None:
            disk_speed = self.disk_bytes_per_second / 1e9
            speed += f", {self.disk_ratio:.2f} of the disk's {disk_speed:.2f} GB/s"
        ready = ", ".join(f"{part.name} {part.ready_seconds:.1f} s" for part in self.components)
        return (
            f"{self.num_bytes / 1e9:.2f} GB in {self.seconds:.1f} s, {speed}, "
            f"{self.cached_bytes / self.num_bytes:.0%} from the page cache; ready: {ready}"
        )


def load(
    model_dir: Path,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
    placement: Mapping[str, Place] | None = None,
    reading: Reading | None = None,
    load_others: Callable[[], Mapping[str, Any]] = dict,
) -> tuple[dict[str, Any], LoadReport]:
    """The pipeline's components by name, their weights bit for bit as by `from_pretrained`.

    All parameters and buffers of a block (see `blocks`) lie in one storage of the block's own, each
    at a multiple of 256 bytes; what a network has besides its blocks lies in one more. On the host
    the storages are pinned if the device is a GPU and the system allows it.

    Args:
        device: where the weights go. The CPU is right for components that take turns on the GPU;
            their memory is not pinned.
        dtypes: what floating-point weights are cast to, by component, and "default".
        placement: which components stay on the host, by component, and "default". None: all go to
            the device.
        load_others: gives components that neither transformers nor diffusers loads. It is called
            while the weights are being read.

    Raises:
        OSError: a file is missing, or ends before its last tensor does.
        ValueError: a tensor that is unknown, missing or of another shape or kind, by file and key.
    """
    reading = reading or Reading()
    placement = placement or {"default": "device"}
    with _disk_probe(model_dir, reading) as disk_speed:
        # Python stands still for 0.26 s while the tokenizer is read; that must stop no reading.
        others = {name: each.from_pretrained(model_dir / name) for name, each in OTHERS.items()}
        disk_bytes_per_second = disk_speed()
    started = time.monotonic()
    with _Transfer(device, reading) as transfer:
        networks: dict[str, Any] = {}
        for name, network_class in NETWORKS.items():
            dtype = dtypes.get(name, dtypes["default"])
            place = placement.get(name, placement["default"])
            networks[name] = _without_storage(network_class, model_dir / name, dtype)
            transfer.fill(networks[name], model_dir / name, dtype, place)
        others |= load_others()
        blocks = transfer.finish()
    components = tuple(
        ComponentLoad(
            name,
            num_bytes=sum(block.num_bytes for block in own),
            ready_seconds=max(block.moved_at for block in own) - started,
        )
        for name, own in zip(networks, blocks, strict=True)
    )
    return networks | others, LoadReport(
        components=components,
        num_bytes=sum(component.num_bytes for component in components),
        cached_bytes=sum(block.num_bytes for own in blocks for block in own if block.was_cached),
        seconds=time.monotonic() - started,
        disk_bytes_per_second=disk_bytes_per_second,
    )


def blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The network's blocks by name: the entries of its lists of modules that are in no other list.

    The transformer's are `transformer_blocks.0` and so on.
    """
    found: dict[str, nn.Module] = {}
    for name, child in network.named_children():
        if isinstance(network, nn.ModuleList):
            found[name] = child
        else:
            found |= {f"{name}.{inner}": block for inner, block in blocks(child).items()}
    return found


def network_sizes(model_dir: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, NetworkSize]:
    """What each network will take in memory.

    Raises:
        OSError, ValueError: a file of weights cannot be read.
    """
    sizes = {}
    for name in NETWORKS:
        num_bytes: dict[str | None, int] = {}
        for path in _weight_files(model_dir / name):
            for tensor in _stored_tensors(path):
                block = _IN_A_BLOCK.match(tensor.key)
                key = block and block[1]
                dtype = tensor.dtype_as(dtypes.get(name, dtypes["default"]))
                own = -(-tensor.num_values * dtype.itemsize // ALIGNMENT) * ALIGNMENT
                num_bytes[key] = num_bytes.get(key, 0) + own
        other = num_bytes.pop(None, 0)
        sizes[name] = NetworkSize(tuple(num_bytes.values()), other)
    return sizes


def _disk_probe(
    model_dir: Path, reading: Reading
) -> AbstractContextManager[Callable[[], float | None]]:
    """Measures the disk in the model's largest file; None where there is too little to read."""
    paths = (path for name in NETWORKS for path in _weight_files(model_dir / name))
    path = max(paths, key=lambda path: path.stat().st_size)
    if path.stat().st_size < reading.num_threads * PROBE_BLOCK_BYTES:
        return nullcontext(lambda: None)
    return disk.probe(path, reading.num_threads, PROBE_BLOCK_BYTES, DISK_SECONDS)


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

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize

    def dtype_as(self, dtype: torch.dtype) -> torch.dtype:
        """What it is kept as where numbers are kept as `dtype`; the bits of 8-bit numbers stay."""
        return dtype if self.dtype.is_floating_point else self.dtype


def _stored_tensors(path: Path) -> list[_Stored]:
    """What the file holds, from front to back.

    Raises:
        OSError, ValueError: it cannot be read, or its header is damaged; names the file.
    """
    header, first = model_directory.read_header(path)
    tensors = []
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {key} is of an unknown dtype, {entry['dtype']}")
        start, end = (first + offset for offset in entry["data_offsets"])
        tensors.append(_Stored(key, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, end))
    tensors.sort(key=lambda tensor: tensor.start)
    for tensor, before in zip(tensors, [first, *(each.end for each in tensors)], strict=False):
        if tensor.start != before or tensor.end - before != tensor.num_bytes:
            raise ValueError(f"{path}: {tensor.key} is not where it should be, or of another size")
    if path.stat().st_size > tensors[-1].end:
        raise ValueError(f"{path} goes on after its last tensor")
    return tensors


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
        self._on_gpu = device.type == "cuda"
        self._reading = reading
        self._threads = ThreadPoolExecutor(
            reading.num_threads, thread_name_prefix="load", initializer=self._begin_thread
        )
        self._of_this_thread = threading.local()
        # One of its own: what a refused call leaves behind in a thread would fail the next there.
        self._pinning = ThreadPoolExecutor(1, thread_name_prefix="load-pin")
        self._pins: list[Future[int]] = []
        self._files = ExitStack()
        self._moves: list[list[Future[_Moved]]] = []  # of each network

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._pinning.shutdown(cancel_futures=True)
        self._files.close()

    def fill(self, network: nn.Module, directory: Path, dtype: torch.dtype, place: Place) -> None:
        """Gives the network tensors in their place, and sends what belongs into them.

        Raises:
            OSError, ValueError: as `load`.
        """
        files = {path: _stored_tensors(path) for path in _weight_files(directory)}
        names = _match(network, directory, files)
        wanted = {
            names[each.key]: (each.dtype_as(dtype), each.shape)
            for stored in files.values()
            for each in stored
        }
        computed = {  # the buffers that are in no file
            name: buffer
            for name, buffer in network.named_buffers(remove_duplicate=False)
            if name not in wanted
        }
        wanted |= {name: (each.dtype, tuple(each.shape)) for name, each in computed.items()}
        homes = _homes(network, wanted, lambda num_bytes: self._storage(num_bytes, place))
        tensors = {name: homes[name].tensor(*wanted[name]) for name in wanted}
        for name, buffer in computed.items():
            module, _, own_name = name.rpartition(".")
            setattr(network.get_submodule(module), own_name, tensors.pop(name).copy_(buffer))
        network.load_state_dict(tensors, assign=True)

        if self._on_gpu:  # the memory may just have been given up by other work
            torch.cuda.current_stream(self._device).synchronize()
        moves = []
        for path, stored in files.items():
            file = self._files.enter_context(_File(path))
            incoming = _incoming(stored, names, homes, tensors)
            for start in range(0, stored[-1].end, self._reading.block_bytes):
                end = min(start + self._reading.block_bytes, stored[-1].end)
                inside = [one for one in incoming if one.start < end and one.end > start]
                moves.append(self._threads.submit(self._move, file, start, end, inside))
        self._moves.append(moves)

    def finish(self) -> list[list[_Moved]]:
        """The blocks of each network, once all are where they belong.

        Raises:
            OSError: a file ends before its last tensor does.
        """
        moved = [[move.result() for move in moves] for moves in self._moves]
        if refusals := {pin.result() for pin in self._pins} - {0}:
            logger.warning("weights on the host are not pinned: CUDA error %s", refusals)
        return moved

    def _storage(self, num_bytes: int, place: Place) -> Tensor:
        if place == "device" and self._on_gpu:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        memory = _HostMemory(num_bytes)
        if self._on_gpu:
            self._pins.append(self._pinning.submit(memory.pin))
        return memory.tensor()

    def _move(self, file: "_File", start: int, end: int, incoming: Sequence["_Incoming"]) -> _Moved:
        """Reads a block and sends each tensor its part of it. Runs in a thread."""
        was_cached = file.is_cached(start, end)
        past_cache = self._reading.past_cache and not was_cached
        buffer = self._buffer()
        file.read(buffer.view, start, end - start, past_cache=past_cache)
        block = buffer.memory[: end - start]
        for one in incoming:
            one.take(block, start)
        return _Moved(end - start, was_cached, time.monotonic())

    def _begin_thread(self) -> None:
        self._of_this_thread.buffer = None
        if self._on_gpu:
            torch.cuda.set_stream(torch.cuda.Stream(self._device))

    def _buffer(self) -> "_Buffer":
        """This thread's buffer."""
        if self._of_this_thread.buffer is None:
            buffer = _Buffer(self._reading.block_bytes, pinned=self._on_gpu)
            self._of_this_thread.buffer = buffer
        return self._of_this_thread.buffer


@dataclass(frozen=True)
class _Home:
    """Where a tensor lies: in which storage, and from which of its bytes on."""

    storage: Tensor  # (bytes,) uint8
    start: int

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The tensor that lies here."""
        return self.bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def bytes(self, num_bytes: int) -> Tensor:
        """That many bytes from here on."""
        return self.storage[self.start : self.start + num_bytes]


def _homes(
    network: nn.Module,
    wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    allocate: Callable[[int], Tensor],
) -> dict[str, _Home]:
    """A place for each tensor that is wanted, in their order, in the storage of its block."""
    block_of = {
        f"{block}.{name}": block
        for block, module in blocks(network).items()
        for name, _ in itertools.chain(
            module.named_parameters(remove_duplicate=False),
            module.named_buffers(remove_duplicate=False),
        )
    }
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}  # of each storage so far
    for name, (dtype, shape) in wanted.items():
        block = block_of.get(name, "")
        starts[name] = -(-ends.get(block, 0) // ALIGNMENT) * ALIGNMENT
        ends[block] = starts[name] + math.prod(shape) * dtype.itemsize
    storages = {block: allocate(num_bytes) for block, num_bytes in ends.items()}
    return {name: _Home(storages[block_of.get(name, "")], start) for name, start in starts.items()}


class _Incoming:
    """Bytes that come in pieces, in any order and from any thread."""

    def __init__(self, start: int, end: int, target: Tensor) -> None:
        self.start, self.end = start, end  # in the file
        self._target = target  # (end - start,) uint8

    def take(self, block: Tensor, block_start: int) -> None:
        """Copies what is its own of a block of bytes that begins at `block_start` in the file."""
        start = max(self.start, block_start)
        end = min(self.end, block_start + len(block))
        piece = block[start - block_start : end - block_start]
        self._land(start - self.start, piece)

    def _land(self, start: int, piece: Tensor) -> None:
        self._target[start : start + len(piece)].copy_(piece)


class _IncomingToCast(_Incoming):
    """A tensor that is cast once all of its bytes are there."""

    def __init__(self, stored: _Stored, tensor: Tensor) -> None:
        self.start, self.end = stored.start, stored.end
        self._stored_dtype = stored.dtype
        self._tensor = tensor
        self._landed: Tensor | None = None  # as stored, from the first piece to the last
        self._missing_bytes = stored.end - stored.start
        self._lock = threading.Lock()

    def _land(self, start: int, piece: Tensor) -> None:
        with self._lock:
            if self._landed is None:
                self._landed = torch.empty_like(self._tensor, dtype=self._stored_dtype)
            landed = self._landed
        target = landed.view(-1).view(torch.uint8)
        target[start : start + len(piece)].copy_(piece)
        with self._lock:
            self._missing_bytes -= len(piece)
            if self._missing_bytes == 0:
                self._tensor.copy_(landed)
                if landed.is_cuda:  # its memory goes back to the thread that asked for it
                    torch.cuda.current_stream(landed.device).synchronize()
                self._landed = None


def _incoming(
    stored: Sequence[_Stored],
    names: Mapping[str, str],
    homes: Mapping[str, _Home],
    tensors: Mapping[str, Tensor],
) -> list[_Incoming]:
    """What the file brings, from front to back; neighbours that stay neighbours come as one."""
    incoming: list[_Incoming] = []
    runs: list[tuple[int, int, _Home]] = []  # start and end in the file
    for each in stored:
        tensor, home = tensors[names[each.key]], homes[names[each.key]]
        if tensor.dtype != each.dtype:
            incoming.append(_IncomingToCast(each, tensor))
            continue
        start, end, first = runs[-1] if runs else (0, 0, home)
        follows = home.storage is first.storage and home.start - first.start == end - start
        if end == each.start and follows:
            runs[-1] = (start, each.end, first)
        else:
            runs.append((each.start, each.end, home))
    incoming += [_Incoming(start, end, home.bytes(end - start)) for start, end, home in runs]
    return incoming


class _HostMemory(mmap.mmap):
    """Memory that begins at a page of its own, and can be pinned as it is."""

    # Not from torch: its pinned memory is rounded up to a power of two.

    _pinned_address: int | None = None

    def __new__(cls, num_bytes: int) -> Self:
        return super().__new__(cls, -1, num_bytes, flags=mmap.MAP_PRIVATE)

    def tensor(self) -> Tensor:  # (num_bytes,) uint8
        """The memory, which lives as long as the tensor's storage does."""
        return torch.frombuffer(self, dtype=torch.uint8)

    def pin(self) -> int:
        """Lets the GPU copy from here by itself. Returns CUDA's error, 0 for none."""
        address = self.tensor().data_ptr()
        error = int(torch.cuda.cudart().cudaHostRegister(address, len(self), _PORTABLE))
        if error == 0:
            self._pinned_address = address
        return error

    def __del__(self) -> None:
        if self._pinned_address is not None and not sys.is_finalizing():
            torch.cuda.cudart().cudaHostUnregister(self._pinned_address)


class _Buffer:
    """Memory for a piece of a file; it begins at a page."""

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        memory = torch.empty(num_bytes + PAGE_BYTES, dtype=torch.uint8, pin_memory=pinned)
        start = -memory.data_ptr() % PAGE_BYTES
        self.memory = memory[start : start + num_bytes]  # (num_bytes,)
        self.view = self.memory.numpy().data


class _File:
    """A file to be read in blocks, through the page cache or past it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._through_cache = os.open(path, os.O_RDONLY)
        try:
            self._past_cache = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # not every file system can
            self._past_cache = os.open(path, os.O_RDONLY)
        self._mapping = mmap.mmap(self._through_cache, 0, prot=mmap.PROT_READ)
        self._address = np.frombuffer(self._mapping, np.uint8).ctypes.data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._mapping.close()
        os.close(self._through_cache)
        os.close(self._past_cache)

    def is_cached(self, start: int, end: int) -> bool:
        """Whether the page cache holds most of these bytes, which begin at a page.

        Yes where the kernel does not tell: it tells root, the file's owner, and whoever may write
        it. Yes also past the end of the file, where reading fails.
        """
        end = min(end, len(self._mapping))
        if end <= start:
            return True
        pages = np.empty(-(-(end - start) // PAGE_BYTES), np.uint8)
        failed = _LIBC.mincore(
            ctypes.c_void_p(self._address + start),
            ctypes.c_size_t(end - start),
            ctypes.c_void_p(pages.ctypes.data),
        )
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed", str(self._path))
        return bool((pages & 1).mean() > 0.5)

    def read(self, buffer: memoryview, start: int, num_bytes: int, *, past_cache: bool) -> None:
        """Puts `num_bytes` from `start` on into the buffer, or up to the end of their last page.

        Raises:
            OSError: the file ends before.
        """
        descriptor = self._past_cache if past_cache else self._through_cache
        room = buffer[: -(-num_bytes // PAGE_BYTES) * PAGE_BYTES]
        filled = 0
        while filled < num_bytes:
            count = os.preadv(descriptor, [room[filled:]], start + filled)
            if count == 0:
                raise OSError(f"{self._path} ends at byte {start + filled}, inside a tensor")
            filled += count
