"""CFG parallelism: how the denoising loop of one job is shared by several ranks.

Each rank runs the whole loop on the same latents, but computes one branch of classifier-free
guidance alone. What it has computed goes to the rank of the other branch, and both then take the
same step with the same two velocities: the latents stay equal, bit for bit, without being sent.
The tokens that cached steps read stay where they were computed.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from worker.multi_gpu.process_group import ProcessGroup

T = TypeVar("T")


class BranchParallel(Protocol):
    """One job's CFG branches on their ranks, as the denoising loop sees it."""

    def begin_step(self) -> None:
        """Returns when the step may begin; raises where the loop was ended in another rank."""

    def end_step(self) -> None:
        """Notes that what comes next is the business of this rank alone."""

    def local_branches(self, branches: list[T]) -> list[T]:
        """Those of all CFG branches that this rank computes."""

    def all_gather(self, velocities: list[Tensor]) -> list[Tensor]:
        """The velocities of all CFG branches, in order, from those that this rank has computed."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on all ranks."""

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Those of each rank, which all have as many."""


class NoParallel:
    """A job in one process, which computes all CFG branches."""

    def begin_step(self) -> None: ...

    def end_step(self) -> None: ...

    def local_branches(self, branches: list[T]) -> list[T]:
        return branches

    def all_gather(self, velocities: list[Tensor]) -> list[Tensor]:
        return velocities

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        return [list(numbers)]


class SharedWork:
    """What ranks do together in steps, as one of them does it and another thread watches it.

    Args:
        group: the ranks.
        begin_step: agrees with the other ranks that the step begins.
    """

    def __init__(self, group: ProcessGroup, begin_step: Callable[[], None]) -> None:
        self._group = group
        self._begin_step = begin_step
        # gathers that are not over: when this rank was done with its own part, and the work;
        # never changed in place, because another thread reads it
        self._gathers: tuple[tuple[torch.Event | None, dist.Work], ...] = ()
        self.in_step = True  # until the first step has begun all is shared, too

    def begin_step(self) -> None:
        self.in_step = True
        self._begin_step()

    def end_step(self) -> None:
        self.in_step = False

    def await_gather(self, works: Sequence[dist.Work], computed: torch.Event | None) -> None:
        """Waits for what the others send; on a GPU its stream waits, and this thread goes on.

        `computed` is what `computed_by_now` gave before the works began.
        """
        self._gathers = (*self._pending(), *((computed, work) for work in works))
        for work in works:
            work.wait()

    def awaited_gather(self) -> object | None:
        """The gather that this rank waits for with its own part computed, if it does.

        For a thread that watches: it asks the GPU and waits for nothing.
        """
        for computed, work in self._pending()[:1]:
            if computed is None or computed.query():
                return work
        return None

    def _pending(self) -> tuple[tuple[torch.Event | None, dist.Work], ...]:
        return tuple(each for each in self._gathers if not each[1].is_completed())


def computed_by_now(device: torch.device) -> torch.Event | None:
    """Tells when a GPU is done with all that it has been given; None: a CPU, which is."""
    if device.type == "cpu":
        return None
    event = torch.Event(device)
    event.record()
    return event


class RankParallel(SharedWork):
    """A job on the ranks of a process group, as one of them takes part in it.

    Args:
        group: the ranks.
        num_cfg_branches: of the job.
        begin_step: agrees with the other ranks that the step begins.
    """

    def __init__(
        self, group: ProcessGroup, num_cfg_branches: int, begin_step: Callable[[], None]
    ) -> None:
        super().__init__(group, begin_step)
        self._num_cfg_branches = num_cfg_branches

    def local_branches(self, branches: list[T]) -> list[T]:
        return [branches[self._group.branch_index]]

    def all_gather(self, velocities: list[Tensor]) -> list[Tensor]:
        if self._num_cfg_branches == 1:
            return velocities
        [velocity] = velocities
        computed = computed_by_now(velocity.device)
        gathered, work = self._group.all_gather(velocity)
        self.await_gather([work], computed)
        return gathered

    def broadcast(self, tensor: Tensor) -> Tensor:
        return self._group.broadcast(tensor, self._num_cfg_branches)

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        return self._group.gather_numbers(numbers, self._num_cfg_branches)
