"""Which tensor of a network goes where in memory: one storage for the weights of each block.

A GPU then fetches a block with one copy (`worker.loading.offload`).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from worker.loading.index import StoredTensor
from worker.model.encoders import canonical_name

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
ALIGNMENT = 256  # of a tensor in its storage, in bytes: what CUDA's own allocations promise
FAULTS_SHOWN = 10

Spec = tuple[torch.dtype, tuple[int, ...]]  # of a tensor; the second is its shape


@dataclass(frozen=True)
class TensorSlot:
    """A tensor's place in memory: its storage, and from which of the storage's bytes on."""

    storage: Tensor  # (bytes,) uint8
    start: int

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The tensor in this slot."""
        return self.bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def bytes(self, num_bytes: int) -> Tensor:
        """That many bytes from here on."""
        return self.storage[self.start : self.start + num_bytes]


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


def aligned(num_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def dtype_in_memory(stored: StoredTensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a loaded tensor where numbers are kept as `dtype`; 8-bit numbers stay bits."""
    own = DTYPES[stored.dtype]
    return dtype if own.is_floating_point else own


def allocate_slots(
    network: nn.Module, specs: Mapping[str, Spec], allocate: Callable[[int], Tensor]
) -> dict[str, TensorSlot]:
    """A slot for each tensor by name, in their order, in the storage of its block.

    Args:
        allocate: gives a storage, (bytes,) uint8.
    """
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
    for name, (dtype, shape) in specs.items():
        block = block_of.get(name, "")
        starts[name] = aligned(ends.get(block, 0))
        ends[block] = starts[name] + math.prod(shape) * dtype.itemsize
    storages = {block: allocate(num_bytes) for block, num_bytes in ends.items()}
    return {
        name: TensorSlot(storages[block_of.get(name, "")], start) for name, start in starts.items()
    }


def match_names(
    network: nn.Module, directory: Path, files: Mapping[Path, Sequence[StoredTensor]]
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
            found_dtype = DTYPES[found.dtype]
            if found.shape != shape:
                faults.append(f"{path}: {found.key} is of shape {found.shape}, not {shape}")
            elif found_dtype.is_floating_point != dtype.is_floating_point:
                faults.append(f"{path}: {found.key} is of {found_dtype}, not {dtype}")
    faults += [f"{directory}: {name} is missing" for name in missing.values()]
    if faults:
        more = f"; and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        raise ValueError("; ".join(faults[:FAULTS_SHOWN]) + more)
    return names
