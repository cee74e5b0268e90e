"""Memory of a GPU that other ranks write into, by the GPUs' copy engines.

These take no processors from what is computed meanwhile; NCCL's kernels do. The memory is torch's
symmetric memory: each rank maps the other ranks' and signals to them, in the order of its stream,
that what it wrote is there. It needs NVLink between the GPUs.

There are a few slots, which all ranks use in turns. A slot is written anew without asking whether
its reader is done. It is if, between two uses of a slot, each rank waits for something that every
other one sent after it had read the slot.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _SymmetricMemory
from torch.distributed._symmetric_memory import rendezvous

logger = logging.getLogger(__name__)

T = TypeVar("T")

NUM_SLOTS = 4
ALIGNMENT = 512  # bytes, of a slot
PROVED_BYTES = 2**20
PROOF_MILLISECONDS = 10_000  # that a signal may take


def open_peer_memory(group: dist.ProcessGroup, device: torch.device) -> "PeerMemory | None":
    """The memory of this rank and the others, proved right; None: NCCL has to carry all.

    All ranks of the group call it, each with its own GPU; all get one, or none does.
    """
    memory = PeerMemory(group, device)
    proof = _Proof(memory)
    stages = (memory.reach, memory.allocate, memory.map, proof.send, proof.check)
    for stage in stages:  # none but `map` waits for another rank
        reason = None
        try:
            stage()
        except Exception as error:  # whatever a driver, a container or torch has against it
            reason = f"GPU {group.rank()}: {error}"
        if reasons := [each for each in _gathered(reason, group) if each is not None]:
            logger.info("NCCL carries what the GPUs exchange in a pass: %s", reasons[0])
            return None
    logger.info("copy engines carry what the GPUs exchange in a pass")
    return memory


class PeerMemory:
    """The slots of all ranks of a group, which have a GPU each, on one machine.

    `open_peer_memory` makes it, and says how.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.others = [rank for rank in range(group.size()) if rank != group.rank()]
        self._devices = _gathered(device.index, group)
        self._stream = torch.cuda.Stream(device)
        self._slot_bytes = self._used_slots = 0
        self._own: Tensor | None = None  # all slots of this rank
        self._handle: Any = None
        self._slots: list[Sequence[Tensor]] = []  # of each rank

    def next_slot(self, num_bytes: int) -> "Slot":
        """The slot whose turn it is, of so many bytes at least: on all ranks the same.

        Raises:
            torch.OutOfMemoryError: there is no memory for slots of that size.
        """
        if num_bytes > self._slot_bytes:
            torch.cuda.synchronize(self.device)
            dist.barrier(self.group)  # nobody writes into the slots any more
            self.allocate(num_bytes)
            self.map()
        self._used_slots += 1
        return Slot(self, self._used_slots % NUM_SLOTS)

    def reach(self) -> None:
        """Finds out whether the GPUs can do it.

        Raises:
            RuntimeError: they cannot.
        """
        from cuda.bindings import driver

        attribute = driver.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
        for rank in self.others:
            error, atomic = driver.cuDeviceGetP2PAttribute(
                attribute, self.device.index, self._devices[rank]
            )
            if int(error) or not atomic:
                raise RuntimeError(f"no NVLink to GPU {rank}")

    def allocate(self, slot_bytes: int = PROVED_BYTES) -> None:
        """Takes memory for slots of that size; then all ranks `map` it.

        Raises:
            torch.OutOfMemoryError: there is none.
        """
        self._slots, self._handle, self._own = [], None, None
        torch.cuda.empty_cache()  # the driver gives it, and not torch's cache
        self._slot_bytes = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
        size = NUM_SLOTS * self._slot_bytes
        try:
            # Not by torch's own `empty` for it, whose pool would keep the memory of smaller slots.
            with torch.inference_mode(False):
                self._own = _SymmetricMemory.empty_strided_p2p(
                    (size,), (1,), torch.uint8, self.device
                )
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise torch.OutOfMemoryError(f"no {size} bytes for other ranks' heads") from error
            raise

    def map(self) -> None:
        """Maps the memory of the other ranks; returns when all ranks have called it."""
        assert self._own is not None
        size = (self._own.numel(),)
        with torch.inference_mode(False):
            self._handle = rendezvous(self._own, self.group)
            self._slots = [
                self._handle.get_buffer(rank, size, torch.uint8).split(self._slot_bytes)
                for rank in range(self.group.size())
            ]

    def bytes_of(self, rank: int, slot: int) -> Tensor:
        """The bytes of a rank's slot."""
        return self._slots[rank][slot]

    def write(self, slot: int, copies: Iterable[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        """Begins to copy sources to targets in others' slots, and then to signal it to them."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for source, target in copies:
                target.copy_(source)
            for other in self.others:
                self._handle.put_signal(other, slot)
        return self._stream.record_event()

    def await_others(self, slot: int, timeout_milliseconds: int) -> None:
        """Has the current stream wait for what the others write into this rank's slot."""
        for other in self.others:
            self._handle.wait_signal(other, slot, timeout_milliseconds)


@dataclass(frozen=True, slots=True)
class Slot:
    """The memory of one exchange, on each rank."""

    memory: PeerMemory
    index: int

    def tensor(
        self, rank: int, shape: Sequence[int], dtype: torch.dtype, offset: int = 0
    ) -> Tensor:
        """One in the slot of a rank, so many values behind its start."""
        values = self.memory.bytes_of(rank, self.index).view(dtype)[offset:]
        return values[: torch.Size(shape).numel()].view(shape)

    def write(self, copies: Iterable[tuple[Tensor, Tensor]]) -> "Arrival":
        """Begins to copy sources, which stay as they are meanwhile, into others' slots."""
        return Arrival(self, self.memory.write(self.index, copies))


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the others write into this rank's slot while it writes into theirs."""

    slot: Slot
    written: torch.cuda.Event

    def wait(self, timeout_milliseconds: int = 0) -> None:
        """Has the current stream wait for both; after the time, if any, the process fails."""
        self.written.wait()
        self.slot.memory.await_others(self.slot.index, timeout_milliseconds)


class _Proof:
    """Each rank writes its number to every other one."""

    def __init__(self, memory: PeerMemory) -> None:
        self._memory = memory
        self._rank = memory.group.rank()
        self._shape = (PROVED_BYTES // memory.group.size(),)

    def send(self) -> None:
        """Writes this rank's, and returns when it is there."""
        memory = self._memory
        self._slot = memory.next_slot(PROVED_BYTES)
        number = torch.full(self._shape, self._rank + 1, dtype=torch.uint8, device=memory.device)
        self._arrival = self._slot.write(
            (number, self._number(other, self._rank)) for other in memory.others
        )
        torch.cuda.synchronize(memory.device)

    def check(self) -> None:
        """Looks at the others', once all are there.

        Raises:
            RuntimeError: another number came.
        """
        self._arrival.wait(PROOF_MILLISECONDS)
        for other in self._memory.others:
            if not bool((self._number(self._rank, other) == other + 1).all()):
                raise RuntimeError(f"GPU {other} wrote something else into its memory")

    def _number(self, rank: int, sender: int) -> Tensor:
        """That of a rank, with another one."""
        return self._slot.tensor(rank, self._shape, torch.uint8, sender * self._shape[0])


def _gathered(own: T, group: dist.ProcessGroup) -> list[T]:
    """What each rank has."""
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, own, group=group)
    return gathered
