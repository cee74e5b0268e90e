"""How several processes share one denoising, and how tensors pass between them.

Each process runs the whole sampling loop on the same latents, but computes one side of the
guidance alone. What it has computed goes to the process of the other side, and both then take the
same step with the same two velocities: the latents stay equal, bit for bit, without being sent.
The tokens that cached steps reuse stay where they were computed.

With more than two processes each side is shared by several, through diffusers' context parallelism:
each holds a part of the tokens, and they swap attention heads.

A process's place follows from its rank: rank 0 .. n/2 - 1 compute the first side, the rest the
second.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")

NUM_SIDES = 2  # of the guidance
USABLE = (1, 2, 4, 8)  # numbers of processes: both sides get equally many, and 24 heads divide
MEET_TIMEOUT = timedelta(minutes=2)
# What a collective may take. NCCL counts from the call, which comes long before its GPU gets there.
TIMEOUTS = {"nccl": timedelta(hours=12), "gloo": timedelta(minutes=5)}
CHECK_SECONDS = 0.001  # between two looks whether the first collective is over


class Sharing:
    """The loop's view of the other processes; this one has none, and computes everything."""

    def begin_step(self) -> None:
        """Returns when the step may begin; raises where another process has ended the loop."""

    def end_step(self) -> None:
        """Notes that what comes next is the business of this process alone."""

    def own(self, sides: list[T]) -> list[T]:
        """Those sides of the guidance that this process computes."""
        return sides

    def exchange(self, velocities: list[Tensor]) -> list[Tensor]:
        """The velocities of all sides, in order, from those that this process has computed."""
        return velocities

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, on all of them."""
        return tensor


@dataclass(frozen=True, slots=True)
class Outline:
    """What a tensor is like that comes separately."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_cpu: bool


class Group:
    """All processes of a team, as one of them reaches the others.

    Args:
        rank: of this process.
        num_processes: of the team.
        rendezvous: a file that none has used yet, for all of them to meet at.
        device: this process's own: a GPU (with its index), or the CPU.

    Raises:
        RuntimeError: the others were not reached.
    """

    def __init__(
        self, rank: int, num_processes: int, rendezvous: Path, device: torch.device
    ) -> None:
        self.rank = rank
        self.num_processes = num_processes
        self.device = device
        self.num_shares = num_processes // NUM_SIDES  # processes of each side
        self.side = rank // self.num_shares
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.FileStore(str(rendezvous), num_processes)  # type: ignore[attr-defined]
        store.set_timeout(MEET_TIMEOUT)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=num_processes,
            timeout=TIMEOUTS[backend],
            device_id=device if backend == "nccl" else None,
        )
        self._mesh: DeviceMesh | None = None
        if self.num_shares > 1:
            self._mesh = init_device_mesh(
                device.type,
                (NUM_SIDES, 1, self.num_shares),
                mesh_dim_names=("side", "ring", "ulysses"),
            )

    def close(self) -> None:
        """Leaves the group. NCCL's is left with the process, which should end by `os._exit`.

        Else it waits for the other processes, which may be gone.
        """
        if self.device.type != "cuda":
            dist.destroy_process_group()

    def share_tokens(self, transformer: Any) -> None:
        """Divides each pass among the processes of a side, if there are several."""
        if self._mesh is None:
            return
        transformer.enable_parallelism(
            config=ContextParallelConfig(
                ulysses_degree=self.num_shares,
                ulysses_anything=True,  # texts have odd lengths; frames are multiples of 16 tokens
                mesh=self._mesh["ring", "ulysses"],
            )
        )

    def ranks(self, num_sides: int) -> range:
        """The processes that compute so many sides; the others have nothing to do."""
        return range(num_sides * self.num_shares)

    def check(self, is_over: Callable[[], bool]) -> None:
        """Adds up a number of each process, so that a broken way between GPUs is found early.

        Args:
            is_over: whether to give up waiting.

        Raises:
            RuntimeError: the sum is wrong, or did not come.
        """
        total = torch.full((2**20,), float(self.rank + 1), device=self.device)
        work = dist.all_reduce(total, async_op=True)
        while not work.is_completed():
            if is_over():
                raise RuntimeError("the GPUs do not reach each other; NCCL_P2P_DISABLE=1 may help")
            time.sleep(CHECK_SECONDS)
        work.wait()
        expected = sum(range(1, self.num_processes + 1))
        if not bool((total == expected).all()):
            raise RuntimeError("the GPUs sent each other wrong numbers")

    def send(self, values: Any, num_sides: int) -> None:
        """Sends the tensors of a dataclass from the first process to the others of the sides."""
        for tensor in tensors(values).values():
            self.broadcast(tensor.to(self.device), num_sides)

    def receive(self, outlined: T, num_sides: int) -> T:
        """The dataclass with the tensors that the first process sends."""
        found = {}
        for name, outline in tensors(outlined, Outline).items():
            tensor = torch.empty(outline.shape, dtype=outline.dtype, device=self.device)
            tensor = self.broadcast(tensor, num_sides)
            found[name] = tensor.cpu() if outline.on_cpu else tensor
        return replace(outlined, **found)  # type: ignore[type-var]

    def broadcast(self, tensor: Tensor, num_sides: int) -> Tensor:
        """The first process's tensor, on all processes of the sides."""
        tensor = tensor.contiguous()
        group = None
        if num_sides < NUM_SIDES:  # the first side's; of a side of one process there are no others
            assert self._mesh is not None
            group = self._mesh["ulysses"].get_group()
        dist.broadcast(tensor, src=0, group=group)
        return tensor

    def exchange(self, velocity: Tensor) -> tuple[list[Tensor], dist.Work]:
        """The velocities of both sides, once the work is waited for."""
        group = None if self._mesh is None else self._mesh["side"].get_group()
        both = [torch.empty_like(velocity) for _ in range(NUM_SIDES)]
        return both, dist.all_gather(both, velocity.contiguous(), group=group, async_op=True)


def tensors(values: Any, kind: type[Any] = Tensor) -> dict[str, Any]:
    """The fields of a dataclass that hold tensors, or another kind of thing."""
    named = {each.name: getattr(values, each.name) for each in fields(values)}
    return {name: value for name, value in named.items() if isinstance(value, kind)}


def outline(values: T) -> T:
    """The dataclass with outlines in the place of its tensors."""
    outlines = {
        name: Outline(tuple(tensor.shape), tensor.dtype, tensor.device.type == "cpu")
        for name, tensor in tensors(values).items()
    }
    return replace(values, **outlines)  # type: ignore[type-var]


class GroupSharing(Sharing):
    """One job's sharing among the processes of a group.

    Args:
        group: the processes.
        num_sides: how many sides of the guidance the job has.
        begin_step: agrees with the other processes that the step begins.
    """

    def __init__(self, group: Group, num_sides: int, begin_step: Callable[[], None]) -> None:
        self._group = group
        self._num_sides = num_sides
        self._begin_step = begin_step
        # velocities that are to come: when this process was done with its own, and the exchange;
        # never changed in place, because another thread reads it
        self._exchanges: tuple[tuple[torch.Event | None, dist.Work], ...] = ()
        self.in_step = True  # until the first step has begun all is shared, too

    def begin_step(self) -> None:
        self.in_step = True
        self._begin_step()

    def end_step(self) -> None:
        self.in_step = False

    def own(self, sides: list[T]) -> list[T]:
        return [sides[self._group.side]]

    def exchange(self, velocities: list[Tensor]) -> list[Tensor]:
        if self._num_sides == 1:
            return velocities
        [velocity] = velocities
        computed = None
        if velocity.device.type != "cpu":
            computed = torch.Event(velocity.device)
            computed.record()
        both, work = self._group.exchange(velocity)
        self._exchanges = (*self._pending(), (computed, work))
        work.wait()  # on a GPU its stream waits, and this thread goes on
        return both

    def same(self, tensor: Tensor) -> Tensor:
        return self._group.broadcast(tensor, self._num_sides)

    def awaited(self) -> object | None:
        """The exchange that this process waits for with its own velocity computed, if it does.

        For a thread that watches: it asks the GPU and waits for nothing.
        """
        for computed, work in self._pending()[:1]:
            if computed is None or computed.query():
                return work
        return None

    def _pending(self) -> tuple[tuple[torch.Event | None, dist.Work], ...]:
        return tuple(each for each in self._exchanges if not each[1].is_completed())
