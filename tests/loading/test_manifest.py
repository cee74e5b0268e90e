"""What proves a model directory: the manifest of its files, and the manifest itself."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from worker.loading import manifest


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory with weights, another file, and a manifest of both."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model_index.json").write_text("{}")
    names = ["vae/model.safetensors", "model_index.json"]
    files = {name: manifest.describe(tmp_path / name) for name in names}
    manifest.write(tmp_path, {"variant": "bf16", "files": files})
    return tmp_path


def entries(model_dir: Path) -> dict[str, dict[str, Any]]:
    content = manifest.read(model_dir)
    assert content is not None
    files: dict[str, dict[str, Any]] = content["files"]
    return files


def test_a_file_is_described_by_its_size_and_hash(model_dir: Path) -> None:
    assert entries(model_dir)["vae/model.safetensors"] == {
        "size_bytes": 7,
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }


def test_what_is_written_is_read_and_the_same_content_is_the_same_file(model_dir: Path) -> None:
    content = manifest.read(model_dir)
    text = (model_dir / manifest.NAME).read_text()
    assert content is not None
    assert content.keys() == {"variant", "files"}
    manifest.write(model_dir, dict(reversed(content.items())))
    assert (model_dir / manifest.NAME).read_text() == text


def test_a_directory_without_a_manifest_has_none(tmp_path: Path) -> None:
    assert manifest.read(tmp_path) is None


def test_every_changed_byte_of_the_manifest_is_found(model_dir: Path) -> None:
    path = model_dir / manifest.NAME
    whole = path.read_bytes()
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        with pytest.raises(ValueError, match="was changed or cut"):
            manifest.read(model_dir)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", '{"sha256": "0"}'])
def test_what_is_no_manifest_is_found(model_dir: Path, text: str) -> None:
    (model_dir / manifest.NAME).write_text(text)
    with pytest.raises(ValueError, match="was changed or cut"):
        manifest.read(model_dir)


def test_an_entry_that_was_added_by_hand_is_found(model_dir: Path) -> None:
    path = model_dir / manifest.NAME
    content = json.loads(path.read_text())
    content["files"]["more"] = content["files"]["model_index.json"]
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    with pytest.raises(ValueError, match="was changed or cut"):
        manifest.read(model_dir)


def test_whole_files_have_no_faults(model_dir: Path) -> None:
    assert manifest.faults(model_dir, entries(model_dir)) == []
    assert manifest.faults(model_dir, entries(model_dir), hashes=True) == []


def test_missing_cut_and_foreign_files_are_each_named(model_dir: Path) -> None:
    (model_dir / "model_index.json").unlink()
    (model_dir / "vae" / "model.safetensors").write_bytes(b"weight")
    (model_dir / "vae" / "other.safetensors").write_bytes(b"weights")
    (model_dir / "notes.txt").write_text("of no weight")
    assert sorted(manifest.faults(model_dir, entries(model_dir), hashes=True)) == [
        "model_index.json is missing",
        "vae/model.safetensors has 6 bytes instead of 7",
        "vae/other.safetensors is no part of this model",
    ]


def test_changed_bytes_of_the_same_number_are_found_by_their_hash_alone(model_dir: Path) -> None:
    (model_dir / "vae" / "model.safetensors").write_bytes(b"height!")
    assert manifest.faults(model_dir, entries(model_dir)) == []
    assert manifest.faults(model_dir, entries(model_dir), hashes=True) == [
        "vae/model.safetensors was changed: its sha256 is not the manifest's"
    ]
