"""From files into the tensors of networks, by several threads.

Each thread reads a block of a file piece by piece into two buffers of its own (pinned for a GPU),
and fills one while the other is copied on a CUDA stream of the thread's own. Nothing holds a whole
file, and a tensor that changes its dtype is cast where it stays.

What the page cache holds is read from the cache, anything else past it: that is faster, takes a
tenth of the processor time, and leaves the memory to the jobs.
"""

import itertools
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from worker.loading.files import BlockReader
from worker.loading.host_memory import CopyBuffer, HostMemory
from worker.loading.index import StoredTensor, stored_tensors, weight_files
from worker.loading.layout import (
    DTYPES,
    Spec,
    TensorSlot,
    allocate_slots,
    dtype_in_memory,
    match_names,
)

logger = logging.getLogger(__name__)

Place = Literal["device", "host"]


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    num_threads: int = 12
    block_bytes: int = 2**25  # what a thread is given at a time; whole pages
    # Of each of a thread's two buffers; whole pages. Smaller ones are read faster, and then wait
    # for one another: Python runs one thread at a time.
    buffer_bytes: int = 2**23
    past_cache: bool = True  # what the page cache does not hold


@dataclass(frozen=True)
class TransferredBlock:
    """A block of a file that has been read, and whose copies have been started."""

    num_bytes: int
    was_cached: bool
    finished_at: float  # time.monotonic()


class Transfer:
    """Fills networks with what their files hold, several blocks at a time.

    `fill` starts the transfer of a network, `finish` waits until all files have been read; their
    tensors hold them when the context has been left. That ends the threads, the copies and the
    files, whatever has happened.
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
        memory = self._host_memory(2 * reading.num_threads * reading.buffer_bytes)
        self._buffers = list(memory.split(reading.buffer_bytes))  # two for each thread
        self._thread_numbers = itertools.count()
        self._files = ExitStack()
        self._transfers: list[list[Future[TransferredBlock]]] = []  # of each network

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._pinning.shutdown(cancel_futures=True)
        self._files.close()
        if self._on_gpu:  # it copies from the buffers until here
            torch.cuda.synchronize(self._device)
        self._buffers.clear()

    def fill(self, network: nn.Module, directory: Path, dtype: torch.dtype, place: Place) -> None:
        """Gives the network tensors in their place, and starts to read into them.

        Args:
            network: its parameters are on the meta device.
            dtype: of its floating-point weights in memory.

        Raises:
            OSError: a file cannot be read.
            ValueError: a tensor that is unknown, missing or of another shape or kind, by file and
                key.
        """
        files = {path: stored_tensors(path) for path in weight_files(directory)}
        names = match_names(network, directory, files)
        specs: dict[str, Spec] = {
            names[each.key]: (dtype_in_memory(each, dtype), each.shape)
            for stored in files.values()
            for each in stored
        }
        computed = {  # the buffers that are in no file
            name: buffer
            for name, buffer in network.named_buffers(remove_duplicate=False)
            if name not in specs
        }
        specs |= {name: (each.dtype, tuple(each.shape)) for name, each in computed.items()}
        slots = allocate_slots(network, specs, lambda num_bytes: self._storage(num_bytes, place))
        tensors = {name: slots[name].tensor(*specs[name]) for name in specs}
        if self._on_gpu:  # the memory may just have been given up by other work
            torch.cuda.current_stream(self._device).synchronize()
        transfers = []
        for path, stored in files.items():
            file = self._files.enter_context(BlockReader(path))
            copies = _pending_copies(stored, names, slots, tensors)
            for start in range(0, stored[-1].end, self._reading.block_bytes):
                end = min(start + self._reading.block_bytes, stored[-1].end)
                inside = [copy for copy in copies if copy.start < end and copy.end > start]
                transfers.append(self._threads.submit(self._transfer, file, start, end, inside))
        self._transfers.append(transfers)

        for name, buffer in computed.items():
            module, _, own_name = name.rpartition(".")
            setattr(network.get_submodule(module), own_name, tensors.pop(name).copy_(buffer))
        network.load_state_dict(tensors, assign=True)

    def finish(self) -> list[list[TransferredBlock]]:
        """The blocks of each network's files, once all of them have been read.

        Raises:
            OSError: a file ends before its last tensor does.
        """
        transferred = [[block.result() for block in blocks] for blocks in self._transfers]
        if refusals := {pin.result() for pin in self._pins} - {0}:
            logger.warning("memory of the host is not pinned: CUDA error %s", refusals)
        return transferred

    def _storage(self, num_bytes: int, place: Place) -> Tensor:
        if place == "device" and self._on_gpu:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._host_memory(num_bytes)

    def _host_memory(self, num_bytes: int) -> Tensor:
        memory = HostMemory(num_bytes)
        if self._on_gpu:
            self._pins.append(self._pinning.submit(self._pin, memory))
        return memory.tensor()

    def _pin(self, memory: HostMemory) -> int:
        with torch.cuda.device(self._device):  # else it would take memory of the first GPU, too
            return memory.pin()

    def _transfer(
        self, file: BlockReader, start: int, end: int, copies: Sequence["PendingCopy | PendingCast"]
    ) -> TransferredBlock:
        """Reads a block and copies each tensor's part of it. Runs in a thread."""
        was_cached = file.is_cached(start, end)
        past_cache = self._reading.past_cache and not was_cached
        for piece_start in range(start, end, self._reading.buffer_bytes):
            piece_end = min(piece_start + self._reading.buffer_bytes, end)
            buffer = next(self._of_this_thread.buffers)
            buffer.wait()
            file.read(buffer.view, piece_start, piece_end - piece_start, past_cache=past_cache)
            for copy in copies:
                own_start, own_end = max(copy.start, piece_start), min(copy.end, piece_end)
                if own_start < own_end:
                    copy.write(own_start, own_end, buffer, own_start - piece_start)
            buffer.end_copies()
        return TransferredBlock(end - start, was_cached, time.monotonic())

    def _begin_thread(self) -> None:
        if self._on_gpu:
            torch.cuda.set_stream(torch.cuda.Stream(self._device))
            self._pins[0].result()  # the buffers
        first = 2 * next(self._thread_numbers)
        buffers = [
            CopyBuffer(own, for_gpu=self._on_gpu) for own in self._buffers[first : first + 2]
        ]
        self._of_this_thread.buffers = itertools.cycle(buffers)


class PendingCopy:
    """A copy of bytes of a file that come in pieces, in any order and from any thread."""

    def __init__(self, start: int, end: int, target: Tensor) -> None:
        self.start, self.end = start, end  # in the file
        self._target = target  # (end - start,) uint8

    def write(self, start: int, end: int, buffer: CopyBuffer, offset: int) -> None:
        """Copies the file's bytes from `start` to `end`, which the buffer has from `offset` on."""
        buffer.start_copy(offset, end - start, self._target, start - self.start)


class PendingCast:
    """A tensor that is cast once all of its bytes are there."""

    def __init__(self, stored: StoredTensor, tensor: Tensor) -> None:
        self.start, self.end = stored.start, stored.end
        self._stored_dtype = DTYPES[stored.dtype]
        self._tensor = tensor
        self._staging: Tensor | None = None  # as stored, from the first piece to the last
        self._missing_bytes = stored.end - stored.start
        self._lock = threading.Lock()

    def write(self, start: int, end: int, buffer: CopyBuffer, offset: int) -> None:
        """Copies the same; the last bytes cast the tensor."""
        with self._lock:
            if self._staging is None:
                self._staging = torch.empty_like(self._tensor, dtype=self._stored_dtype)
            staging = self._staging
        target = staging.view(-1).view(torch.uint8)[start - self.start : end - self.start]
        target.copy_(buffer.memory[offset : offset + end - start])
        with self._lock:
            self._missing_bytes -= end - start
            if self._missing_bytes == 0:
                self._tensor.copy_(staging)
                if staging.is_cuda:  # its memory goes back to the thread that asked for it
                    torch.cuda.current_stream(staging.device).synchronize()
                self._staging = None


def _pending_copies(
    stored: Sequence[StoredTensor],
    names: Mapping[str, str],
    slots: Mapping[str, TensorSlot],
    tensors: Mapping[str, Tensor],
) -> list[PendingCopy | PendingCast]:
    """The copies of a file, from front to back; neighbours that stay neighbours are one."""
    copies: list[PendingCopy | PendingCast] = []
    runs: list[tuple[int, int, TensorSlot]] = []  # start and end in the file
    for each in stored:
        tensor, slot = tensors[names[each.key]], slots[names[each.key]]
        if tensor.dtype != DTYPES[each.dtype]:
            copies.append(PendingCast(each, tensor))
            continue
        start, end, first = runs[-1] if runs else (0, 0, slot)
        follows = slot.storage is first.storage and slot.start - first.start == end - start
        if end == each.start and follows:
            runs[-1] = (start, each.end, first)
        else:
            runs.append((each.start, each.end, slot))
    copies += [PendingCopy(start, end, slot.bytes(end - start)) for start, end, slot in runs]
    return copies
