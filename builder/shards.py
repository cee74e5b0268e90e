"""Safetensors shards, written one at a time and each either whole or absent."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Size, Tensor

from worker.atomic_file import READABLE, atomic_write, write_text

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 2 * 1024**3  # and as much memory is needed


@dataclass(frozen=True)
class PlannedTensors:
    """Tensors whose shapes are known and whose values are made when their shard is written."""

    specs: Mapping[str, tuple[Size, torch.dtype]]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def num_bytes(self) -> int:
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.specs.values())


def write_shards(
    directory: Path,
    stem: str,
    planned: Sequence[PlannedTensors],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `STEM.safetensors`, or numbered shards and their index, into the directory.

    A shard that an earlier run has written is kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = split(planned, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = directory / f"{stem}{suffix}.safetensors"
        names = [name for tensors in shard for name in tensors.specs]
        weight_map |= dict.fromkeys(names, path.name)
        state = "was there" if _holds(path, names) else _write(path, shard)
        logger.info("%s: shard %d of %d %s", directory.name, number, len(shards), state)
    if len(shards) > 1:
        total = sum(tensors.num_bytes for tensors in planned)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / f"{stem}.safetensors.index.json", index)


def split(
    planned: Sequence[PlannedTensors], max_bytes: int = MAX_SHARD_BYTES
) -> list[list[PlannedTensors]]:
    """The tensors of each shard, in their order."""
    shards: list[list[PlannedTensors]] = [[]]
    room = max_bytes
    for tensors in planned:
        if tensors.num_bytes > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensors)
        room -= tensors.num_bytes
    return shards


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(
        path, json.dumps(content, indent=2, sort_keys=True) + "\n", durable=True, mode=READABLE
    )


def copy_file(path: Path, directory: Path) -> None:
    """Copies the file whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_write(directory / path.name, durable=True, mode=READABLE) as part:
        shutil.copyfile(path, part)


def _holds(path: Path, names: Sequence[str]) -> bool:
    try:
        with safe_open(path, framework="pt") as file:  # a file cut short does not open
            return set(file.keys()) == set(names)
    except (FileNotFoundError, SafetensorError):
        return False


def _write(path: Path, shard: Sequence[PlannedTensors]) -> str:
    tensors = {name: tensor for planned in shard for name, tensor in planned.make().items()}
    with atomic_write(path, durable=True, mode=READABLE) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    return f"written, {path.stat().st_size / 1024**2:.0f} MiB"
