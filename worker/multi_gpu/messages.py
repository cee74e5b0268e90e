"""What the pipe between the controller and a rank process carries."""

from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch

from avatar_client.contract.job_errors import GpuFaultError, OutOfMemoryError, WorkerError
from worker.settings import Settings

HEARTBEAT_SECONDS = 1.0  # between two of a rank process


@dataclass(frozen=True, slots=True)
class RankStart:
    """To a rank process, first: who it is."""

    settings: Settings
    rank: int
    num_ranks: int
    device: torch.device
    rendezvous: Path


@dataclass(frozen=True, slots=True)
class RankJob:
    """To a rank process: what to denoise together. The tensors follow, from GPU to GPU."""

    job_id: str | None
    conditioning: Any  # a dataclass with tensor specs in the place of its tensors
    options: Any  # how it is computed; the engine's own business
    seed: int
    num_cfg_branches: int


@dataclass(frozen=True, slots=True)
class RankDecoding:
    """To a rank process: what to decode together. The latents follow, from GPU to GPU."""

    job_id: str | None
    latents: Any  # a tensor's spec in the message
    options: Any  # how they are decoded; the engine's own business


@dataclass(frozen=True, slots=True)
class TileArithmetic:
    """From a rank process, before it says that it is loaded: the same means the same tiles."""

    description: str


class Message(Enum):
    """The messages that carry nothing else."""

    JOIN = auto()  # to a rank process: all have loaded, now form the process group
    STEP = auto()  # to a rank process: the next step, or round of tiles, begins
    END = auto()  # to a rank process: the job is over, or was ended
    LOADED = auto()  # from a rank process
    JOINED = auto()  # from a rank process
    HEARTBEAT = auto()  # from a rank process


@dataclass(frozen=True, slots=True)
class RankFailure:
    """From a rank process, last: why it ends. The controller makes them for itself, too."""

    reason: str  # for the log
    out_of_memory: bool = False

    def as_error(self) -> WorkerError:
        """What the client of the job is told."""
        if self.out_of_memory:
            return OutOfMemoryError("the memory of a GPU is too small for this resolution")
        return GpuFaultError("one of the GPUs that work together failed")
