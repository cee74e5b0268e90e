"""Which tensor lies where in a safetensors file."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worker.loading.index import has_full_length, stored_tensors, weight_files


def write(path: Path, header: dict[str, Any], num_bytes: int) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))
    return path


def entry(start: int, end: int, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start], "data_offsets": [start, end]}


def test_the_tensors_of_a_file_come_in_their_order_and_are_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "a": torch.tensor([7.0]),
        "c": torch.arange(5, dtype=torch.uint8),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()

    stored = stored_tensors(path)

    assert {each.key: each.shape for each in stored} == {"a": (1,), "b": (2, 3), "c": (5,)}
    assert [each.end for each in stored[:-1]] == [each.start for each in stored[1:]]
    assert stored[-1].end == len(content)
    for each in stored:
        own = torch.frombuffer(bytearray(content[each.start : each.end]), dtype=torch.uint8)
        assert torch.equal(own.view(tensors[each.key].dtype).view(each.shape), tensors[each.key])
        assert each.num_bytes == tensors[each.key].nbytes
    assert has_full_length(path)


@pytest.mark.parametrize(
    ("header", "num_bytes", "message"),
    [
        ({"a": entry(0, 4), "b": entry(5, 8)}, 8, "b is not where it should be"),
        ({"a": entry(0, 4), "b": entry(3, 8)}, 8, "b is not where it should be"),
        ({"a": entry(0, 4) | {"shape": [3]}}, 4, "a is not where it should be, or of another size"),
        ({"a": entry(0, 4)}, 5, "goes on after its last tensor"),
        ({"a": entry(0, 8, "F64")}, 8, "a is of an unknown dtype, F64"),
        ({"a": {"dtype": "U8"}}, 0, "the header is damaged at a"),
        ({"a": entry(0, 4) | {"shape": ["4"]}}, 4, "the header is damaged at a"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_named(
    tmp_path: Path, header: dict[str, Any], num_bytes: int, message: str
) -> None:
    path = write(tmp_path / "model.safetensors", header, num_bytes)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
        stored_tensors(path)


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 9) + b"{}"])
def test_a_file_without_a_whole_header_is_cut(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert not has_full_length(path)
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short"):
        stored_tensors(path)


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds no weights"):
        weight_files(tmp_path)
