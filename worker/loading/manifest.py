"""`manifest.json`: the files of a model directory and what proves that they are unchanged.

It is written last, when all that it names is there, and it proves itself: a changed byte of it is
found too.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from worker import atomic_file

NAME = "manifest.json"
JOURNAL = "unfinished.json"  # stands in a directory until its manifest does
NUM_PARTS, PART_BYTES = 16, 2**16  # of a file of weights, for the fingerprint without a manifest


def write(model_dir: Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest whole or not at all. `content["files"]` is what `describe` gives."""
    atomic_file.write_text(model_dir / NAME, _text(content), durable=True)


def read(model_dir: Path) -> dict[str, Any] | None:
    """The manifest without its own hash; None if the directory has none.

    Raises:
        ValueError: it was changed or cut.
    """
    path = model_dir / NAME
    if not path.is_file():
        return None
    try:
        text = path.read_text()
        content: dict[str, Any] = json.loads(text)
        content.pop("sha256")
        unchanged = _text(content) == text
    except (ValueError, KeyError, AttributeError, TypeError):  # not text, not JSON, not an object
        unchanged = False
    if not unchanged:
        raise ValueError(f"{path} was changed or cut")
    return content


def fingerprint(model_dir: Path) -> str:
    """Another one for other weights.

    Without a manifest it is of parts of each file that holds weights, spread over its length: so
    it misses a change of few values.
    """
    content = read(model_dir)
    if content is not None:
        return hashlib.sha256(json.dumps(content["files"], sort_keys=True).encode()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(model_dir.glob("*/*.safetensors")):
        size_bytes = path.stat().st_size
        digest.update(f"{path.relative_to(model_dir)} {size_bytes}\0".encode())
        with path.open("rb") as file:
            for part in range(NUM_PARTS):
                file.seek(size_bytes * part // NUM_PARTS)
                digest.update(file.read(PART_BYTES))
    return digest.hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """The entry of a file: its size and sha256."""
    return {"size_bytes": path.stat().st_size, "sha256": sha256(path)}


def faults(
    model_dir: Path, files: Mapping[str, Mapping[str, Any]], *, hashes: bool = False
) -> list[str]:
    """A sentence for each file that is missing, changed, or no part of the model.

    Args:
        files: the entries by path, as the manifest holds them.
        hashes: reads every file through; without it only sizes are compared.
    """
    found = []
    for name, entry in files.items():
        path = model_dir / name
        size_bytes = path.stat().st_size if path.is_file() else None
        if size_bytes is None:
            found.append(f"{name} is missing")
        elif size_bytes != entry["size_bytes"]:
            found.append(f"{name} has {size_bytes} bytes instead of {entry['size_bytes']}")
    weights = {str(path.relative_to(model_dir)) for path in model_dir.glob("*/*.safetensors*")}
    found += [f"{name} is no part of this model" for name in sorted(weights - files.keys())]
    if hashes and not found:
        with ThreadPoolExecutor() as pool:
            digests = pool.map(sha256, (model_dir / name for name in files))
        for (name, entry), digest in zip(files.items(), digests, strict=True):
            if digest != entry["sha256"]:
                found.append(f"{name} was changed: its sha256 is not the manifest's")
    return found


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(content: Mapping[str, Any]) -> str:
    """The only text that a manifest of this content can have."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2, sort_keys=True) + "\n"
