"""The headers of safetensors files: which tensor lies where in which file. Needs no torch."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}  # of the dtypes that our networks have


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file."""

    key: str
    dtype: str  # as safetensors names it, one of `ITEM_BYTES`
    shape: tuple[int, ...]
    start: int  # in the file
    end: int

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_values * ITEM_BYTES[self.dtype]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a network's directory, in order.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{directory} holds no weights")
    return paths


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a file, from front to back; together they are all of it.

    Raises:
        OSError, ValueError: it cannot be read, or its header is damaged; names the file.
    """
    header, first = read_header(path)
    tensors = []
    for key, entry in header.items():
        if entry["dtype"] not in ITEM_BYTES:
            raise ValueError(f"{path}: {key} is of an unknown dtype, {entry['dtype']}")
        start, end = (first + offset for offset in entry["data_offsets"])
        tensors.append(StoredTensor(key, entry["dtype"], tuple(entry["shape"]), start, end))
    tensors.sort(key=lambda tensor: tensor.start)
    for tensor, before in zip(tensors, [first, *(each.end for each in tensors)], strict=False):
        if tensor.start != before or tensor.end - before != tensor.num_bytes:
            raise ValueError(f"{path}: {tensor.key} is not where it should be, or of another size")
    if path.stat().st_size > tensors[-1].end:
        raise ValueError(f"{path} goes on after its last tensor")
    return tensors


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entry of each tensor, and where in the file the data begin.

    Raises:
        ValueError: the file ends before its header does, or the header is none; names the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path} is cut short")
        content = file.read(length)
    try:
        header = json.loads(content)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is damaged")
    header.pop("__metadata__", None)
    for key, entry in header.items():
        if not _describes_a_tensor(entry):
            raise ValueError(f"{path}: the header is damaged at {key}")
    return header, 8 + length


def has_full_length(path: Path) -> bool:
    """Whether the file ends where its header says that its last tensor does."""
    try:
        header, start = read_header(path)
    except ValueError:
        return False
    ends = (entry["data_offsets"][1] for entry in header.values())
    return bool(path.stat().st_size == start + max(ends, default=0))


def _describes_a_tensor(entry: Any) -> bool:
    match entry:
        case {"dtype": str(), "shape": [*sizes], "data_offsets": [int(), int()]}:
            return all(isinstance(size, int) for size in sizes)
    return False
