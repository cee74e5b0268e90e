"""A rank of a process group on the CPU, and what a test has it do.

Tensors stay in the ranks: what comes over a pipe is plain numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.model import swaps
from worker.model.context_parallel import ContextParallel
from worker.multi_gpu.process_group import ProcessGroup
from worker.settings import configure_collectives


def run(rank: int, num_ranks: int, rendezvous: Path, pipe: Connection) -> None:
    """Calls with the group what comes over the pipe; sends what that returns or raises."""
    torch.set_num_threads(1)
    configure_collectives()
    group = ProcessGroup(rank, num_ranks, rendezvous, torch.device("cpu"))
    function: Callable[..., Any]
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return  # without the others' leave: some are gone already
        try:
            pipe.send(function(group, *arguments))
        except RuntimeError as error:
            pipe.send(error)


def place(group: ProcessGroup) -> tuple[int, int]:
    """The rank, and the CFG branch that it computes."""
    return group.rank, group.branch_index


def broadcast(group: ProcessGroup, num_cfg_branches: int) -> list[float]:
    """What a tensor of this rank's number is after the broadcast; it is not contiguous."""
    own = torch.full((4,), float(group.rank))[::2]
    return group.broadcast(own, num_cfg_branches).tolist()


def all_gather(group: ProcessGroup) -> list[list[float]]:
    """The velocities of all branches where each rank computes its own number."""
    velocities, work = group.all_gather(torch.full((2,), float(group.rank)))
    work.wait()
    return [velocity.tolist() for velocity in velocities]


def gather_numbers(group: ProcessGroup, num_cfg_branches: int) -> list[list[float]]:
    """The numbers of all active ranks where each gives its own and a third."""
    return group.gather_numbers([group.rank, 1 / 3], num_cfg_branches)


def swap_for_heads(group: ProcessGroup, num_columns: int, num_text: int, heads: int) -> bool:
    """Whether a pass that all ranks share swaps its tokens for heads and back, to the last bit."""
    assert dist.group.WORLD is not None
    parallel = ContextParallel(dist.group.WORLD)
    return swaps.arrive(parallel, num_columns, num_text, heads, group.device)


def check(group: ProcessGroup, added: int, gives_up: bool = False) -> None:
    """Checks the group where this rank adds that number to the sum."""
    rank = group.rank
    group.rank = added - 1
    try:
        group.check(lambda: gives_up)
    finally:
        group.rank = rank


@dataclass(frozen=True)
class Values:
    """Something like a job's conditioning."""

    embeds: Any
    mask: Any
    scale: float
    names: tuple[str, ...]


def values() -> Values:
    return Values(
        embeds=torch.arange(6.0).view(2, 3).T.to(torch.bfloat16),  # not contiguous
        mask=torch.tensor([[True, False]]),
        scale=2.5,
        names=("a", "b"),
    )


def send(group: ProcessGroup, num_cfg_branches: int) -> None:
    group.send_tensors(values(), num_cfg_branches)


def receive(group: ProcessGroup, specs: Values, num_cfg_branches: int) -> bool:
    """Whether what comes is what was sent, to the last bit and the type."""
    received, sent = group.receive_tensors(specs, num_cfg_branches), values()
    for ours, theirs in ((received.embeds, sent.embeds), (received.mask, sent.mask)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    return (received.scale, received.names) == (sent.scale, sent.names)
