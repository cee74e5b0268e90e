"""The decoder's benchmark, at toy size on the CPU."""

import json

import pytest
import torch

from benchmarks.decode import COLUMNS, main

TOY = "--device cpu --dtype float32 --channels 4 4 8 8 --layers 1 --groups 4 --num-frames 5"


def test_it_measures_every_way_and_finds_the_same_frames(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.set_num_threads(1)
    main([*TOY.split(), "--sizes", "32x48", "--mp4"])
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")][1:]
    assert all(row["seconds"] > 0 for row in rows)
    compared = {row["way"]: row["difference"] for row in rows if "difference" in row}
    assert compared.pop("diffusers") == 0
    assert {"ours", "ours, channels first", "ours, least scratch"} < set(compared)
    assert all(difference < 3e-6 for difference in compared.values())
    assert {row["way"] for row in rows} - {"diffusers", *compared} == {"mp4 in turn", "mp4 ahead"}
    table = lines[-len(rows) - 1 :]
    assert table[0].split() == list(COLUMNS)
