"""What must hold before the worker takes a job; the SDK runs these and reports a failure.

A failed check ends the worker with its reason, so that RunPod replaces it instead of losing jobs.
"""

import tempfile
from collections.abc import Callable

import psutil

from worker import import_guard
from worker.media.storage import Patience, Storage
from worker.media.video import check_encoders
from worker.service.worker import Worker
from worker.settings import PlatformSettings

MIN_FREE_DISK_BYTES = 2 * 2**30  # inputs and the video of one job, with room to spare
MIN_FREE_MEMORY_BYTES = 2 * 2**30

Check = Callable[[], None]


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
        if psutil.disk_usage(tempfile.gettempdir()).free < MIN_FREE_DISK_BYTES:
            raise RuntimeError("less than 2 GiB of disk is free")

    def encoders() -> None:
        check_encoders()

    def storage() -> None:
        if missing := settings.missing_bucket_variables:
            raise RuntimeError(
                f"a bucket is set up in part: {', '.join(missing)} missing. AWS_* variables are "
                "not read; without a bucket none of BUCKET_* may be set"
            )
        if settings.bucket is not None:
            # a store that stumbles must not end a worker with a loaded model
            patience = Patience(settings.store_retry_seconds)
            Storage(settings.bucket).check(patience)

    def model() -> None:
        if worker.load_error is not None:
            raise RuntimeError(f"the model was not loaded: {worker.load_error}")

    return [imports, gpu, memory, disk, encoders, storage, model]
