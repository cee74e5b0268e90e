"""Two GPUs write into each other's memory, or neither does."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from tests.model import swaps
from worker.model.context_parallel import ContextParallel
from worker.model.peer_memory import PeerMemory, open_peer_memory
from worker.settings import configure_collectives

NUM_RANKS = 2
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < NUM_RANKS, reason="needs two GPUs")


@pytest.mark.gpu
@TWO_GPUS
def test_two_gpus_swap_tokens_by_their_copy_engines(tmp_path: Path) -> None:
    spawn(run_rank, args=(tmp_path / "rendezvous",), nprocs=NUM_RANKS)


def run_rank(rank: int, rendezvous: Path) -> None:
    """One of two processes, each with a GPU."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    configure_collectives()
    store = dist.FileStore(str(rendezvous), NUM_RANKS)  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=rank, world_size=NUM_RANKS, device_id=device)
    mesh = init_device_mesh("cuda", (1, NUM_RANKS), mesh_dim_names=("cfg", "ulysses"))
    group = mesh["ulysses"].get_group()  # as in a worker, not the group of all ranks

    for stage in ("reach", "allocate", "next_slot", "await_others"):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(PeerMemory, stage, refuse)
            assert open_peer_memory(group, device) is None, stage

    memory = open_peer_memory(group, device)
    assert memory is not None
    parallel = ContextParallel(group, memory)
    with torch.inference_mode():
        for columns, text, heads in ((8, 4, 8), (9, 5, 6), (5, 3, 1), (3000, 60, 24), (70, 9, 24)):
            for seed in range(20):  # in turns of the slots, one right behind the other
                assert swaps.arrive(parallel, columns, text, heads, device, seed)
    with torch.no_grad():
        assert swaps.arrive(parallel, 4000, 61, 24, device)  # slots that inference mode has made
    torch.cuda.synchronize()
    dist.barrier()
    os._exit(0)  # NCCL's own end waits for processes that are gone


def refuse(*_arguments: object) -> None:
    """What fails on one rank alone."""
    raise RuntimeError("not here")
