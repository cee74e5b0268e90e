"""What must hold before the worker takes a job; the SDK runs these and reports a failure.

A failed check ends the worker with its reason, so that RunPod replaces it instead of losing jobs.
"""

import logging
import tempfile
from collections.abc import Callable

import psutil

from avatar_client.environment import misspelt
from worker import import_guard
from worker.media.encoding import check_encoders
from worker.media.provenance import Credentials
from worker.media.storage import Storage
from worker.media.store_client import Patience
from worker.service.estimate import room_for_video
from worker.service.worker import Worker
from worker.settings import PlatformSettings, Settings, proxy_for
from worker.shapes import LONG_SIDE, SAMPLE_RATE_HZ, count_frames

logger = logging.getLogger(__name__)

MIN_FREE_DISK_BYTES = 2 * 2**30  # of the largest job by default three times what it needs
DISK_TO_SPARE_BYTES = 2**29  # beside the largest job that other settings allow
MIN_FREE_MEMORY_BYTES = 2 * 2**30
MAX_FPS = 25.0

Check = Callable[[], None]


def largest_job_bytes(settings: Settings) -> int:
    """Disk that a job may ask for: two inputs that are fetched, and the longest, largest video."""
    num_frames = count_frames(int(settings.max_audio_seconds * SAMPLE_RATE_HZ), MAX_FPS)
    num_pixels = max(side * long_side for side, long_side in LONG_SIDE.items())
    return 2 * settings.max_input_bytes + room_for_video(num_frames, num_pixels)


def checks(worker: Worker) -> list[Check]:
    """The checks for this worker, in the order in which they are worth reading."""
    settings = worker.settings

    def imports() -> None:
        import_guard.ensure()

    def gpu() -> None:
        skipped = PlatformSettings.from_env().runpod_skip_gpu_check
        if settings.avatar_model != "demo" and not skipped:
            from worker.generation.engine import check_gpu

            check_gpu()

    def memory() -> None:
        if psutil.virtual_memory().available < MIN_FREE_MEMORY_BYTES:
            raise RuntimeError("less than 2 GiB of memory is free")

    def disk() -> None:
        needed = max(MIN_FREE_DISK_BYTES, largest_job_bytes(settings) + DISK_TO_SPARE_BYTES)
        free = psutil.disk_usage(tempfile.gettempdir()).free
        if free < needed:
            raise RuntimeError(
                f"{free / 2**30:.1f} GiB of disk are free, and the largest job that the settings "
                f"allow needs {needed / 2**30:.1f} GiB"
            )

    def encoders() -> None:
        check_encoders()

    def provenance() -> None:
        credentials = Credentials.of(settings)
        if credentials is not None:
            credentials.check()

    def storage() -> None:
        if missing := settings.missing_bucket_variables:
            raise RuntimeError(
                f"a bucket is set up in part: {', '.join(missing)} missing; without a bucket none "
                "of BUCKET_* may be set"
            )
        if settings.bucket is not None:
            # a store that stumbles must not end a worker with a loaded model
            patience = Patience(settings.store_retry_seconds)
            Storage(settings.bucket).check(patience)

    def variables() -> None:
        for sentence in misspelt(Settings):
            if sentence.startswith("BUCKET_"):  # videos would go elsewhere than is thought
                raise RuntimeError(sentence)
            logger.warning("%s", sentence)
        proxy_for("example.com", 443)  # raises if it is of a kind that is not spoken to

    def model() -> None:
        if worker.load_error is not None:
            raise RuntimeError(f"the model was not loaded: {worker.load_error}")

    return [imports, variables, gpu, memory, disk, encoders, provenance, storage, model]
