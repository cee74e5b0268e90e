"""Makes a model directory that the worker serves, from nothing but the network.

    python -m builder.bake --variant bf16|fp8 --revision COMMIT --target MODEL_DIR [--work DIR]
        [--token-file FILE] [--publish YOU/NAME]

Folder by folder of the published checkpoint: download, convert, read back, delete the source; the
disk holds the model and one source folder at most. The same command finishes an interrupted run.
manifest.json is written last, and a directory that has one is whole. Exit codes are those of
builder.download, and 8: the checkpoint could not be converted.

The converter is imported when it is needed, so that a refusal takes no seconds.
"""

import argparse
import json
import logging
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError, safe_open

from builder.download import (
    BuildError,
    Listing,
    Lock,
    PublishedFile,
    Variant,
    add_arguments,
    disk_errors,
    download,
    read_token,
    read_upstream,
    require_space,
    resolve,
)
from builder.publish import publish
from worker import atomic_file
from worker.loading import manifest

logger = logging.getLogger("builder.bake")  # __name__ is __main__ on the command line

CHECKPOINT = "ckpts"
NO_FOLDER = "."  # of the files that are copied as they are


class ConversionError(BuildError):
    """The published files are not what the converter knows."""

    exit_code = 8


class Journal:
    """Which folders are done, and what they became: a file in the target until all are."""

    def __init__(self, target: Path, variant: Variant, commit: str) -> None:
        self._path = target / manifest.JOURNAL
        self._claim = {"variant": variant, "commit": commit}
        content: dict[str, Any] = {}
        if self._path.is_file():
            content = json.loads(self._path.read_text())
            if content["claim"] != self._claim:
                raise BuildError(
                    f"{target} holds a part of {content['claim']}: delete it, or choose another"
                )
        elif target.is_dir() and any(target.iterdir()):
            raise BuildError(f"{target} is not empty, and holds nothing to go on with")
        self.folders: list[str] = content.get("folders", [])
        self.sources: dict[str, dict[str, Any]] = content.get("sources", {})
        self.files: dict[str, dict[str, Any]] = content.get("files", {})

    def save(self) -> None:
        """Writes the journal whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "claim": self._claim,
            "folders": self.folders,
            "sources": self.sources,
            "files": self.files,
        }
        atomic_file.write_text(self._path, json.dumps(content, indent=2), durable=True)


@dataclass(frozen=True)
class Bake:
    """One bake: folder by folder, then the manifest."""

    variant: Variant
    target: Path
    work: Path  # where sources lie meanwhile
    token: str | None
    listing: Listing
    lock: Lock
    journal: Journal

    def run(self) -> None:
        """Makes the model directory, or finishes it.

        Raises:
            BuildError: what went wrong. The target is then no model yet, and can be finished.
        """
        folders = _folders(self.listing)
        with disk_errors(self.target):
            self.work.mkdir(parents=True, exist_ok=True)
            self.journal.save()  # claims the target
        for name in self.journal.folders:
            self._delete_sources(folders.pop(name))
        self._require_space([_size(files) for files in folders.values()])
        for name, files in folders.items():
            download(self.listing, files, self.work, self.lock, self.token)
            with _errors(self.target):
                self._convert(name, files)
                self._record(name, files)
                self._delete_sources(files)
        with _errors(self.target):
            from builder.convert import finish
            from builder.preview import add_preview

            finish(self.target)
            add_preview(self.target)
            (self.target / "NOTICE").write_text(read_upstream().notice)
            self._publish()

    def _require_space(self, sizes: Sequence[int]) -> None:
        """Raises DiskFullError unless the disks have room for these folders, one after the other.

        What a folder becomes is not larger than itself.
        """
        present = _bytes_below(self.work)
        done = sum(entry["size_bytes"] for entry in self.journal.files.values())
        begun = _bytes_below(self.target) - done
        if self.work.stat().st_dev == self.target.stat().st_dev:
            peaks = [sum(sizes[:number]) + 2 * size for number, size in enumerate(sizes)]
            require_space(self.target, max(peaks, default=0) - present - begun)
        else:
            require_space(self.work, max(sizes, default=0) - present)
            require_space(self.target, sum(sizes) - begun)

    def _convert(self, folder: str, files: Sequence[PublishedFile]) -> None:
        logger.info("converting %s", folder)
        if folder == NO_FOLDER:
            for file in files:
                shutil.copyfile(self.work / file.path, self.target / file.path)
            return
        from builder.convert import TRANSFORMER, conversions

        # In bf16 the encoders keep their published precision: the worker runs them in float16, of
        # which bfloat16 would lose three bits.
        is_kept = self.variant == "bf16" and folder != TRANSFORMER
        dtype = "keep" if is_kept else self.variant
        conversions(self.work / CHECKPOINT, self.target, dtype)[folder]()

    def _record(self, folder: str, files: Sequence[PublishedFile]) -> None:
        self.journal.folders.append(folder)
        self.journal.sources.update({file.path: self.lock.files[file.path] for file in files})
        self.journal.files.update(self._describe_new())
        self.journal.save()

    def _describe_new(self) -> dict[str, dict[str, Any]]:
        """The entries of the files that the journal does not know yet, read back from the disk."""
        paths = (path for path in sorted(self.target.rglob("*")) if path.is_file())
        names = {
            str(path.relative_to(self.target)) for path in paths if path.name != manifest.JOURNAL
        }
        new = sorted(names - self.journal.files.keys())
        return {name: manifest.describe(self.target / name) for name in new}

    def _delete_sources(self, files: Sequence[PublishedFile]) -> None:
        for file in files:
            (self.work / file.path).unlink(missing_ok=True)

    def _publish(self) -> None:
        """Writes the manifest, once all that it will name was compared with the journal."""
        files = self.journal.files | self._describe_new()
        _require_unchanged(self.target, files)
        upstream = read_upstream()
        sources = {
            "repository": self.listing.repository,
            "commit": self.listing.commit,
            "files": self.journal.sources,
        }
        content = {
            "variant": self.variant,
            "dtypes": _dtypes(self.target),
            "files": files,
            "sources": sources,
            "licence": {"name": upstream.licence, "notice": upstream.notice},
        }
        manifest.write(self.target, content)
        size_gb = sum(entry["size_bytes"] for entry in files.values()) / 1e9
        logger.info("%s is baked: %d files, %.2f GB", self.target, len(files), size_gb)


def bake(
    variant: Variant, target: Path, work: Path, token: str | None, revision: str | None
) -> None:
    """Makes the model directory with the help of a work directory, which is deleted in the end.

    Raises:
        BuildError: why the target is no model of this variant.
    """
    if _is_baked(variant, target):
        logger.info("%s is there already, and whole", target)
    else:
        lock = Lock(target)
        listing = resolve(variant, lock, token, revision)
        journal = Journal(target, variant, listing.commit)
        Bake(variant, target, work, token, listing, lock, journal).run()
    (target / manifest.JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _is_baked(variant: Variant, target: Path) -> bool:
    """Whether there is nothing to do. Hashes are compared."""
    try:
        content = manifest.read(target)
    except ValueError as error:
        raise BuildError(f"{error}: delete {target} and bake it anew") from error
    if content is None:
        return False
    if content["variant"] != variant:
        raise BuildError(f"{target} holds the variant {content['variant']}: choose another")
    _require_unchanged(target, content["files"])
    return True


def _folders(listing: Listing) -> dict[str, list[PublishedFile]]:
    """The files by their folder in the checkpoint, the largest first.

    While a folder is converted the disk holds what became of those before it, its source and its
    target: least if the largest comes first.
    """
    folders = defaultdict(list)
    for file in listing.files:
        parent = Path(file.path).parent
        folder = str(parent.relative_to(CHECKPOINT)) if parent.parts else NO_FOLDER
        folders[folder].append(file)
    return dict(sorted(folders.items(), key=lambda item: _size(item[1]), reverse=True))


def _size(files: Sequence[PublishedFile]) -> int:
    return sum(file.size_bytes for file in files)


def _bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _require_unchanged(target: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    faults = manifest.faults(target, files, hashes=True)
    if faults:
        raise BuildError(f"{target}: {'; '.join(faults)}: delete it and bake it anew")


def _dtypes(target: Path) -> dict[str, list[str]]:
    """The dtypes in which each component's weights are stored."""
    dtypes: defaultdict[str, set[str]] = defaultdict(set)
    for path in target.glob("*/*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            dtypes[path.parent.name] |= {file.get_slice(name).get_dtype() for name in names}
    return {component: sorted(found) for component, found in dtypes.items()}


@contextmanager
def _errors(target: Path) -> Iterator[None]:
    """Raises BuildError for what the converter raises."""
    with disk_errors(target):
        try:
            yield
        except SafetensorError as error:
            if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise ConversionError(f"the checkpoint was not converted: {error}") from error
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(target)) from error
        except (FileNotFoundError, ValueError, KeyError, RuntimeError, UnpicklingError) as error:
            raise ConversionError(f"the checkpoint was not converted: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m builder.bake",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--target", type=Path, required=True, help="the model directory to make")
    parser.add_argument(
        "--work", type=Path, help="where a folder for the sources is made; if not given, beside it"
    )
    parser.add_argument(
        "--publish",
        metavar="YOU/NAME",
        help="afterwards uploads the model to this repository of yours on the hub",
    )
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("builder").setLevel(logging.INFO)
    target = arguments.target.resolve()
    work = (arguments.work or target.parent) / f"{target.name}.sources"
    try:
        token = read_token(arguments.token_file)
        bake(arguments.variant, target, work, token, arguments.revision)
        if arguments.publish:
            publish(target, arguments.publish, token)
    except BuildError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
