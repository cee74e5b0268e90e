"""Where the model's directory is, and whether it is whole. Needs no torch."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.loading import manifest
from worker.loading.index import has_full_length
from worker.settings import Settings

logger = logging.getLogger(__name__)

BAKED_DIR = Path("models/hunyuan-video-avatar")
VOLUME_DIR = Path("runpod-volume/hunyuan-video-avatar")
# The demo model: the real architecture at toy width, trained in a drawn world of talking faces. It
# needs neither a GPU nor a download, and only AVATAR_MODEL=demo selects it. Its card says more.
DEMO_DIR = Path(__file__).parents[1] / "demo_model"
CACHE_DIR = Path("runpod-volume/huggingface-cache/hub")  # RunPod's cached models

SPARE_BYTES = 2 * 2**30  # left free on the disk of a download: for jobs, which may share it


@dataclass(frozen=True)
class ModelLocation:
    """The model directory that the worker loads, and why it is this one."""

    path: Path
    place: str
    skipped: tuple[str, ...] = ()  # what was looked at before, each with the reason

    def __str__(self) -> str:
        before = f"; skipped: {'; '.join(self.skipped)}" if self.skipped else ""
        return f"model directory {self.path} ({self.place}){before}"


class _NoModelError(Exception):
    """There is no model at a place; says why."""


def find(settings: Settings, root: Path = Path("/")) -> ModelLocation:
    """The demo model if it is asked for, else the first place that holds a model.

    A place without a model is skipped. A damaged model is not: whoever put it there means it
    to be used.

    Args:
        root: the top of the file system in which the image and the volume lie.

    Raises:
        FileNotFoundError: no place holds a model; says why for each.
        RuntimeError: the model is damaged, by file, or its download failed.
    """
    if settings.avatar_model == "demo":
        require_whole(DEMO_DIR)
        return ModelLocation(DEMO_DIR, "AVATAR_MODEL=demo")
    skipped: list[str] = []
    for place, look in (
        ("MODEL_DIR", _given),
        ("the image", _baked),
        ("RunPod's model cache", _cached),
        ("the network volume", _on_volume),
        ("a download", _downloaded),
    ):
        try:
            path = look(settings, root)
            if not (path / "model_index.json").is_file():
                missing = "model_index.json is missing" if path.is_dir() else "no such directory"
                raise _NoModelError(f"{path}: {missing}")
        except _NoModelError as reason:
            skipped.append(f"{place}: {reason}")
            continue
        require_whole(path)
        return ModelLocation(path, place, tuple(skipped))
    raise FileNotFoundError(f"no model was found. {'; '.join(skipped)}")


def require_whole(model_dir: Path, *, hashes: bool = False) -> None:
    """Passes if every file of the model is there at its full length, and no other weights.

    Args:
        hashes: reads every file through and compares it with the manifest too.

    Raises:
        RuntimeError: something is missing, cut or foreign; names every such file.
    """
    try:
        content = manifest.read(model_dir)
    except ValueError as error:
        raise RuntimeError(str(error)) from None
    if content is not None:
        faults = manifest.faults(model_dir, content["files"], hashes=hashes)
    elif hashes or (model_dir / manifest.JOURNAL).is_file():
        faults = [f"{manifest.NAME} is missing"]
    else:
        faults = _faults_without_manifest(model_dir)
    if faults:
        raise RuntimeError(f"the model in {model_dir} is damaged: {'; '.join(faults)}")


def _given(settings: Settings, root: Path) -> Path:
    if not settings.model_dir:
        raise _NoModelError("is not set")
    return Path(settings.model_dir)


def _baked(settings: Settings, root: Path) -> Path:
    return root / BAKED_DIR


def _cached(settings: Settings, root: Path) -> Path:
    if settings.model_repository is None:
        raise _NoModelError("MODEL_REPOSITORY is not set")
    repository = root / CACHE_DIR / f"models--{settings.model_repository.replace('/', '--')}"
    main = repository / "refs" / "main"
    if main.is_file():
        return repository / "snapshots" / main.read_text().strip()
    snapshots = sorted((repository / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    if not snapshots:
        raise _NoModelError(f"{repository} has no snapshot")
    return snapshots[-1]


def _on_volume(settings: Settings, root: Path) -> Path:
    return root / VOLUME_DIR


def _downloaded(settings: Settings, root: Path) -> Path:
    """The model, fetched to the network volume, or into the container where that cannot take it."""
    if not settings.allow_model_download:
        raise _NoModelError("ALLOW_MODEL_DOWNLOAD is not set")
    if settings.model_repository is None:
        raise _NoModelError("MODEL_REPOSITORY is not set")
    repository = settings.model_repository
    try:
        with _online():
            target = download_target(root, _published_bytes(repository))
            part = target.with_name(f"{target.name}.part")  # or a half would be taken for damaged
            logger.info("downloading %s to %s", repository, target)
            _fetch(repository, part)
    except Exception as error:  # the library's, and those of the HTTP library below it
        raise RuntimeError(f"{repository} was not downloaded: {error}") from error
    require_whole(part, hashes=True)
    try:
        part.rename(target)
    except OSError:  # another worker on the same volume was quicker
        if not (target / "model_index.json").is_file():
            raise
    return target


def download_target(root: Path, num_bytes: int) -> Path:
    """The first place that this user may write to and that has room for so much.

    Raises:
        RuntimeError: there is none; says why for each.
    """
    reasons = []
    for target in (root / VOLUME_DIR, root / BAKED_DIR):
        if target.is_relative_to(root / VOLUME_DIR.parent) and not target.parent.is_dir():
            reasons.append(f"there is no {target.parent}")
            continue
        part = target.with_name(f"{target.name}.part")
        try:
            part.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=part):  # of another user, perhaps, or read-only
                pass
        except OSError as error:
            reasons.append(f"{target.parent} cannot be written to ({error.strerror})")
            continue
        present = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
        free = shutil.disk_usage(part).free
        if free + present >= num_bytes + SPARE_BYTES:
            return target
        reasons.append(f"{target.parent} has {free / 1e9:.1f} GB free")
        with suppress(OSError):  # it holds a part of an earlier download
            part.rmdir()
    raise RuntimeError(f"it needs {num_bytes / 1e9:.1f} GB; {'; '.join(reasons)}")


def _published_bytes(repository: str) -> int:
    """The size of all files of a repository."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, files_metadata=True)
    return sum(sibling.size or 0 for sibling in info.siblings or ())


def _fetch(repository: str, directory: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    snapshot_download(repository, local_dir=directory)


@contextmanager
def _online() -> Iterator[None]:
    """Inside, the hub's library may ask the hub, which the image forbids it."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _faults_without_manifest(model_dir: Path) -> list[str]:
    """What the index files and the weights say of themselves."""
    faults = []
    parts = _read_json(model_dir / "model_index.json")
    for index in sorted(model_dir.glob("*/*.safetensors.index.json")):
        names = sorted(set(_read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (index.parent / name).is_file()]
        faults += [f"{index.parent.name}/{name} is missing" for name in missing]
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "audio_encoder"):
        if part in parts and not any((model_dir / part).glob("*.safetensors")):
            faults.append(f"the weights of {part} are missing")
    for path in sorted(model_dir.glob("*/*.safetensors")):
        if not has_full_length(path):
            faults.append(f"{path.parent.name}/{path.name} is cut short or too long")
    return faults


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise RuntimeError(f"{path} is damaged: it holds no JSON") from None
