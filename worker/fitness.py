"""What must hold before the worker takes a job; the SDK runs these and reports a failure.

A failed check ends the worker with its reason, so that RunPod replaces it instead of losing jobs.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import psutil

from worker import import_guard
from worker.jobs import Worker
from worker.storage import Storage
from worker.video import check_encoders

MIN_FREE_DISK_BYTES = 2 * 2**30  # inputs and the video of one job, with room to spare
MIN_FREE_MEMORY_BYTES = 2 * 2**30

Check = Callable[[], None]


def checks(worker: Worker) -> list[Check]:
    """The checks for this worker, in the order in which they are worth reading."""
    settings = worker.settings

    def imports() -> None:
        import_guard.ensure()

    def weights() -> None:
        if settings.avatar_model != "demo":
            require_whole(Path(settings.model_dir))

    def gpu() -> None:
        if settings.avatar_model != "demo":
            from worker.engine import check_gpu

            check_gpu()

    def memory() -> None:
        if psutil.virtual_memory().available < MIN_FREE_MEMORY_BYTES:
            raise RuntimeError("less than 2 GiB of memory is free")

    def disk() -> None:
        if psutil.disk_usage("/tmp").free < MIN_FREE_DISK_BYTES:  # noqa: S108
            raise RuntimeError("less than 2 GiB of disk is free")

    def encoders() -> None:
        check_encoders()

    def storage() -> None:
        if settings.bucket is not None:
            Storage(settings.bucket).check()

    def model() -> None:
        if worker.load_error is not None:
            raise RuntimeError(f"the model was not loaded: {worker.load_error}")

    return [imports, weights, gpu, memory, disk, encoders, storage, model]


def require_whole(model_dir: Path) -> None:
    """Passes if the directory holds every weight file that it names, at its full length.

    Raises:
        RuntimeError: something is missing or cut; names the file.
    """
    if not (model_dir / "model_index.json").is_file():
        raise RuntimeError(f"no model in {model_dir}: model_index.json is missing")
    parts = json.loads((model_dir / "model_index.json").read_text())
    for index in sorted(model_dir.glob("*/*.safetensors.index.json")):
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if not (index.parent / name).is_file():
                raise RuntimeError(f"the weight file {index.parent.name}/{name} is missing")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "audio_encoder"):
        if part in parts and not any((model_dir / part).glob("*.safetensors")):
            raise RuntimeError(f"the weights of {part} are missing")
    for path in sorted(model_dir.glob("*/*.safetensors")):
        _require_full_length(path)


def _require_full_length(path: Path) -> None:
    """A safetensors file says in its header where its last tensor ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise RuntimeError(f"the weight file {path.parent.name}/{path.name} is cut short")
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if size != 8 + length + max(ends, default=0):
        raise RuntimeError(f"the weight file {path.parent.name}/{path.name} has a wrong length")
