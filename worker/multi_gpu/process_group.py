"""The ranks of one worker as torch.distributed sees them: who they are, and what tensors pass.

The branches of classifier-free guidance (CFG) are computed by different ranks: rank 0 .. n/2 - 1
compute the first branch, the rest the second. With more than two ranks, those of a branch share
each pass by context parallelism (`worker.model.context_parallel`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from worker.model.context_parallel import ContextParallel
from worker.model.peer_memory import open_peer_memory
from worker.settings import peer_access_is_allowed

T = TypeVar("T")

NUM_CFG_BRANCHES = 2
RANK_COUNTS = (1, 2, 4, 8)  # usable: both CFG branches get equally many ranks, and 24 heads divide
RENDEZVOUS_TIMEOUT = timedelta(minutes=2)
# What a collective may take. NCCL counts from the call, which comes long before its GPU gets there.
TIMEOUTS = {"nccl": timedelta(hours=12), "gloo": timedelta(minutes=5)}
POLL_SECONDS = 0.001  # between two looks whether a work is over


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is like that comes separately."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_cpu: bool


class ProcessGroup:
    """All ranks of a worker, as one of them reaches the others.

    Args:
        rank: of this process.
        num_ranks: in all; more than one of `RANK_COUNTS`.
        rendezvous: a file that none has used yet, for all of them to meet at.
        device: this process's own: a GPU (with its index), or the CPU.

    Raises:
        RuntimeError: the others were not reached.
    """

    def __init__(self, rank: int, num_ranks: int, rendezvous: Path, device: torch.device) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self.ranks_per_branch = num_ranks // NUM_CFG_BRANCHES
        self.branch_index = rank // self.ranks_per_branch  # of the CFG branch that it computes
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.FileStore(str(rendezvous), num_ranks)  # type: ignore[attr-defined]
        store.set_timeout(RENDEZVOUS_TIMEOUT)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=num_ranks,
            timeout=TIMEOUTS[backend],
            device_id=device if backend == "nccl" else None,
        )
        self._mesh: DeviceMesh | None = None  # None: one rank a branch
        if self.ranks_per_branch > 1:
            self._mesh = init_device_mesh(
                device.type,
                (NUM_CFG_BRANCHES, self.ranks_per_branch),
                mesh_dim_names=("cfg", "ulysses"),
            )

    def close(self) -> None:
        """Leaves the group. NCCL's is left with the process, which should end by `os._exit`.

        Else it waits for the other ranks, which may be gone.
        """
        if self.device.type != "cuda":
            dist.destroy_process_group()

    def enable_context_parallel(self, transformer: Any) -> None:
        """Divides each pass among the ranks of a CFG branch, if there are several."""
        if self._mesh is None:
            return
        group, memory = self._mesh["ulysses"].get_group(), None
        if self.device.type == "cuda" and peer_access_is_allowed():
            memory = open_peer_memory(group, self.device)
        transformer.context_parallel = ContextParallel(group, memory)

    def active_ranks(self, num_cfg_branches: int) -> range:
        """The ranks that compute so many CFG branches; the others have nothing to do."""
        return range(num_cfg_branches * self.ranks_per_branch)

    def check(self, gives_up: Callable[[], bool]) -> None:
        """Adds up a number of each rank, so that a broken way between GPUs is found early.

        Args:
            gives_up: whether to wait no longer.

        Raises:
            RuntimeError: the sum is wrong, or did not come.
        """
        total = torch.full((2**20,), float(self.rank + 1), device=self.device)
        work = dist.all_reduce(total, async_op=True)
        while not work.is_completed():
            if gives_up():
                raise RuntimeError("the GPUs do not reach each other; NCCL_P2P_DISABLE=1 may help")
            time.sleep(POLL_SECONDS)
        work.wait()
        expected = sum(range(1, self.num_ranks + 1))
        if not bool((total == expected).all()):
            raise RuntimeError("the GPUs sent each other wrong numbers")

    def send_tensors(self, values: Any, num_cfg_branches: int) -> None:
        """Sends the tensors of a dataclass from rank 0 to the other active ranks."""
        for tensor in _fields_of(values, Tensor).values():
            self.broadcast(tensor.to(self.device), num_cfg_branches)

    def receive_tensors(self, specs: T, num_cfg_branches: int) -> T:
        """The dataclass of `tensor_specs` with the tensors that rank 0 sends."""
        received = {}
        for name, spec in _fields_of(specs, TensorSpec).items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
            tensor = self.broadcast(tensor, num_cfg_branches)
            received[name] = tensor.cpu() if spec.on_cpu else tensor
        return replace(specs, **received)  # type: ignore[type-var]

    def broadcast(self, tensor: Tensor, num_cfg_branches: int) -> Tensor:
        """Rank 0's tensor, on all active ranks."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0, group=self._active_group(num_cfg_branches))
        return tensor

    def gather_numbers(self, numbers: Sequence[float], num_cfg_branches: int) -> list[list[float]]:
        """Those of all active ranks, in order; each has as many."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        gathered = [torch.empty_like(own) for _ in self.active_ranks(num_cfg_branches)]
        dist.all_gather(gathered, own, group=self._active_group(num_cfg_branches))
        return torch.stack(gathered).tolist()

    def all_gather(self, velocity: Tensor) -> tuple[list[Tensor], dist.Work]:
        """The velocities of all CFG branches in order, once the work is waited for."""
        group = None if self._mesh is None else self._mesh["cfg"].get_group()
        velocities = [torch.empty_like(velocity) for _ in range(NUM_CFG_BRANCHES)]
        work = dist.all_gather(velocities, velocity.contiguous(), group=group, async_op=True)
        return velocities, work

    def receive_from_each(self, tensors: Sequence[Tensor]) -> list[dist.Work]:
        """Fills the tensors with what rank 1 and the next ones send, once the works are over."""
        return dist.batch_isend_irecv(
            [dist.P2POp(dist.irecv, tensor, rank) for rank, tensor in enumerate(tensors, 1)]
        )

    def send_to_first(self, tensor: Tensor) -> dist.Work:
        """Sends a contiguous tensor, which must stay as it is until the work is over, to rank 0."""
        [work] = dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, 0)])
        return work

    def await_on_host(self, work: dist.Work) -> None:
        """Returns when the work is over; its own `wait` only has a GPU's stream wait."""
        if self.device.type == "cuda":
            while not work.is_completed():
                time.sleep(POLL_SECONDS)
        work.wait()

    def _active_group(self, num_cfg_branches: int) -> dist.ProcessGroup | None:
        """The active ranks; None is all."""
        if num_cfg_branches == NUM_CFG_BRANCHES:
            return None
        assert self._mesh is not None  # the first branch has several ranks
        return self._mesh["ulysses"].get_group()


def tensor_specs(values: T) -> T:
    """The dataclass with a `TensorSpec` in the place of each tensor."""
    specs = {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device.type == "cpu")
        for name, tensor in _fields_of(values, Tensor).items()
    }
    return replace(values, **specs)  # type: ignore[type-var]


def _fields_of(values: Any, kind: type[T]) -> dict[str, T]:
    """The fields of a dataclass that hold such a thing."""
    named = {each.name: getattr(values, each.name) for each in fields(values)}
    return {name: value for name, value in named.items() if isinstance(value, kind)}
