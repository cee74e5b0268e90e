"""A model directory dealt out to the layers of an image."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder import layers
from tests.builder.toy_repository import ROOT

NAMES = st.text("abc/", min_size=1, max_size=5)
GB = 10**9


@given(st.dictionaries(NAMES, st.integers(0, 2 * GB), max_size=20), st.integers(5, 8))
def test_every_name_is_in_one_layer_and_the_layers_differ_by_one_file_at_most(
    sizes: Any, count: Any
) -> None:
    dealt = layers.deal(sizes, count)
    assert len(dealt) == count
    assert sorted(name for names in dealt for name in names) == sorted(sizes)
    totals = [sum(sizes[name] for name in names) for names in dealt]
    assert max(totals) - min(totals) <= max(sizes.values(), default=0)
    assert max(totals) <= layers.MAX_LAYER_BYTES


@given(st.dictionaries(NAMES, st.integers(0, 2 * GB), max_size=20), st.randoms())
def test_the_layers_depend_on_names_and_sizes_alone(sizes: Any, random: Any) -> None:
    shuffled = list(sizes.items())
    random.shuffle(shuffled)
    assert layers.deal(dict(shuffled), 8) == layers.deal(sizes, 8)


def test_a_layer_that_no_registry_takes_is_refused() -> None:
    sizes = dict.fromkeys("abcdef", 2 * GB)
    assert layers.deal(sizes, 2)
    with pytest.raises(ValueError, match=r"^1 layers are too few: one would have 12\.0 GB$"):
        layers.deal(sizes, 1)


def test_the_layers_copied_into_one_directory_are_the_model_again(tmp_path: Path) -> None:
    files = {"model_index.json": b"index", "vae/config.json": b"{}", "vae/model.bin": b"weights"}
    for name, content in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)

    paths = (str(tmp_path / "model"), str(tmp_path / "layers"))
    command = [sys.executable, "-m", "builder.layers", *paths]
    subprocess.run([*command, "--count", "2"], cwd=ROOT, check=True)

    assert not (tmp_path / "model").exists()
    for number in ("1", "2"):
        shutil.copytree(tmp_path / "layers" / number, tmp_path / "again", dirs_exist_ok=True)
    again = (path for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert {str(path.relative_to(tmp_path / "again")): path.read_bytes() for path in again} == files
