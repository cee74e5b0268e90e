import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builder.shards import PlannedTensors, write_shards

BYTES_EACH = 4 * 100


def plan(made: list[str], fail_at: str | None = None) -> list[PlannedTensors]:
    """Five tensors of 400 bytes that note when they are made."""

    def make(name: str, value: int) -> dict[str, torch.Tensor]:
        if name == fail_at:
            raise KeyboardInterrupt
        made.append(name)
        return {name: torch.full((100,), float(value))}

    return [
        PlannedTensors(
            {name: (torch.Size([100]), torch.float32)},
            partial(make, name, value),
        )
        for value, name in enumerate("abcde")
    ]


def test_shards_hold_every_tensor_once_and_none_is_too_big(tmp_path: Path) -> None:
    write_shards(tmp_path, "model", plan([]), max_shard_bytes=2 * BYTES_EACH)

    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * BYTES_EACH
    for value, name in enumerate("abcde"):
        tensor = load_file(tmp_path / index["weight_map"][name])[name]
        assert torch.equal(tensor, torch.full((100,), float(value)))


def test_what_fits_into_one_file_has_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path, "model", plan([]))

    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_interrupted_run_is_finished_without_making_a_shard_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, "model", plan([], fail_at="d"), max_shard_bytes=2 * BYTES_EACH)
    made: list[str] = []
    write_shards(tmp_path, "model", plan(made), max_shard_bytes=2 * BYTES_EACH)

    assert made == ["c", "d", "e"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_shard_cut_short_is_not_taken_for_whole(tmp_path: Path) -> None:
    write_shards(tmp_path, "model", plan([]), max_shard_bytes=2 * BYTES_EACH)
    damaged = tmp_path / "model-00002-of-00003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    made: list[str] = []

    write_shards(tmp_path, "model", plan(made), max_shard_bytes=2 * BYTES_EACH)

    assert made == ["c", "d"]
    assert load_file(damaged).keys() == {"c", "d"}
