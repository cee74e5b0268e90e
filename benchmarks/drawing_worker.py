"""A worker as RunPod runs it, whose model draws at once: what is left is the worker's own work.

Its frames are of one colour, which tells the seed.
"""

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker import import_guard, logs
from worker.service.serve import serve
from worker.service.worker import Worker
from worker.settings import Settings

FRAMES = 2
SIDE = 256  # px


class Drawing:
    """What the service asks of an engine."""

    gpu_name = peak_memory_gib = stuck_error = latent_to_rgb = None
    num_ranks = 1
    is_lost = False
    load_seconds = 0.0
    load_report = SimpleNamespace(num_bytes=0, bytes_per_second=0.0, disk_ratio=None)

    def num_gpus(self, params: Any) -> int:
        return 1

    def require_fits_memory(
        self, portrait: Any, resolution: Any, aspect: Any, fit: Any
    ) -> None: ...

    def find_face(self, portrait: Any, resolution: Any) -> None: ...

    def find_faces(self, portrait: Any, resolution: Any) -> list[Any]:
        return []

    def foresee(self, portrait: Any, params: Any, size: Any) -> tuple[str, ...]:
        return ()

    def encode(self, portrait: Any, voices: Any, params: Any, size: Any) -> Any:
        return SimpleNamespace(warnings=(), face_boxes=())

    def identity(self, params: Any) -> SimpleNamespace:
        return SimpleNamespace(weights="", code="", arithmetic="", gpu="")

    def sparse_attention(self, params: Any, seed: int) -> None: ...

    def preview(self, conditioning: Any) -> None: ...

    def denoise(
        self,
        conditioning: Any,
        params: Any,
        seed: int,
        watch: Any,
        state: Any,
    ) -> int:
        for step in range(params.num_inference_steps):
            watch.on_step(step + 1, params.num_inference_steps)
        return seed

    def decode_frames(self, conditioning: Any, latents: int) -> Iterator[NDArray[np.uint8]]:
        yield np.full((FRAMES, SIDE, SIDE, 3), latents % 256, np.uint8)


def main() -> None:
    """Serves RunPod's queue, as `handler.py` does."""
    drawing: Any = Drawing()
    worker = Worker(Settings.from_env(), drawing)
    logs.configure(worker.settings.runpod_log_level)
    import_guard.ensure()
    worker.load()
    gc.freeze()  # as `handler.py` does
    serve(worker)


if __name__ == "__main__":
    main()
