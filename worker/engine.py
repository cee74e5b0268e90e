"""The model on its device: the only module that chooses a device or asks the GPU anything.

Jobs call `encode`, `denoise` and `frames` one after the other. Whatever torch raises inside them
becomes an error of ours here.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from worker import demo, errors, loading, weights
from worker.loading import LoadReport
from worker.pipeline import Conditioning, HunyuanVideoAvatarPipeline
from worker.schema import GenerationParams
from worker.settings import Settings
from worker.shapes import SAMPLE_RATE_HZ

logger = logging.getLogger(__name__)

GIB = 2**30
# Room for activations: the denoiser takes 8 at 704 x 768 (docs/performance.md), and more at the
# largest size; what the VAE's tiles take is not measured yet.
ACTIVATIONS_GIB = 30


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model."""

    pipeline: HunyuanVideoAvatarPipeline
    device: torch.device
    load_seconds: float
    load_report: LoadReport

    @classmethod
    def load(cls, settings: Settings) -> "Engine":
        """Loads the model that the settings name and places it.

        On a GPU it is warmed up too: else the first job would pay for what the GPU's libraries set
        up at their first use, and find out that they do not work.

        Raises:
            OSError, RuntimeError, ValueError: weights are missing, damaged, or do not fit the
                model, or the warm-up failed.
        """
        started = time.monotonic()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if settings.avatar_model == "demo":
            model_dir = demo.MODEL_DIR
            weights.require_whole(model_dir)
        else:
            found = weights.find(settings)
            logger.info("%s", found)
            model_dir = found.path
        pipeline, report = _load(model_dir, device)
        logger.info("weights: %s", report)
        pipeline.set_progress_bar_config(disable=True)  # the reporter's values go to the client
        load_seconds = time.monotonic() - started
        logger.info("model %s ready on %s in %.1f s", settings.avatar_model, device, load_seconds)
        engine = cls(pipeline, device, load_seconds, report)
        if device.type == "cuda":
            engine.warm_up()
        return engine

    def warm_up(self) -> None:
        """Makes one frame of silence in one step, as a job would, at the smallest size.

        Raises:
            RuntimeError: it failed; says why.
        """
        started = time.monotonic()
        params = GenerationParams(resolution=256, num_inference_steps=1)
        portrait = Image.new("RGB", (params.resolution, params.resolution))
        waveform = np.zeros(round(SAMPLE_RATE_HZ / params.fps), np.float32)
        try:
            conditioning = self.encode(portrait, waveform, params)
            latents = self.denoise(conditioning, params, 0, lambda step, num_steps: None)
            for _ in self.frames(conditioning, latents):
                pass
        except errors.WorkerError as error:
            raise RuntimeError(f"the warm-up failed: {error.__cause__}") from error
        logger.info("warmed up in %.1f s", time.monotonic() - started)

    def encode(
        self, portrait: Image.Image, waveform: np.ndarray, params: GenerationParams
    ) -> Conditioning:
        """What the denoiser is told about portrait, speech and prompt."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with _failures_as_ours():
            return self.pipeline.encode(
                image=portrait,
                audio=waveform,
                prompt=params.prompt,
                negative_prompt=params.negative_prompt,
                face_box=params.face_box,
                resolution=params.resolution,
                fps=params.fps,
                motion_pose=params.motion.pose,
                motion_expression=params.motion.expression,
            )

    def denoise(
        self,
        conditioning: Conditioning,
        params: GenerationParams,
        seed: int,
        on_step: Callable[[int, int], None],
    ) -> torch.Tensor:
        """Latents of the video; `on_step(step, num_steps)` may raise to stop between two steps."""
        generator = torch.Generator(self.device).manual_seed(seed)
        with _failures_as_ours():
            return self.pipeline.denoise(
                conditioning,
                num_inference_steps=params.num_inference_steps,
                guidance_scale=params.guidance_scale,
                flow_shift=params.flow_shift,
                generator=generator,
                on_step=on_step,
            )

    def frames(self, conditioning: Conditioning, latents: torch.Tensor) -> Iterator[np.ndarray]:
        """The video in chunks of (frames, height, width, 3) uint8, cut and not rounded."""
        with _failures_as_ours():
            for chunk in self.pipeline.decode_frames(latents, num_frames=conditioning.num_frames):
                pixels = (chunk * 255).to(torch.uint8)  # (F, 3, H, W)
                yield pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (F, H, W, 3)

    @property
    def gpu_name(self) -> str | None:
        """The GPU as its driver names it; None on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    @property
    def peak_memory_gib(self) -> float | None:
        """Most GPU memory that this job held at once; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated(self.device) / GIB, 2)


def check_gpu() -> None:
    """Raises unless a GPU is there and computes.

    Raises:
        RuntimeError: no GPU, or a wrong sum.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is visible")
    total = torch.ones(1024, device="cuda").sum().item()
    if total != 1024:
        raise RuntimeError("the GPU computed a wrong sum")


def _dtypes(device: torch.device) -> dict[str, torch.dtype]:
    if device.type == "cpu":
        return {"default": torch.float32}
    # as the reference runs: the denoiser in bfloat16, the rest in float16
    return {"transformer": torch.bfloat16, "default": torch.float16}


def _load(model_dir: Path, device: torch.device) -> tuple[HunyuanVideoAvatarPipeline, LoadReport]:
    """The model, all of it on the GPU where it fits, else one component at a time."""
    dtypes = _dtypes(device)
    if device.type == "cpu":
        return loading.load(model_dir, device, dtypes)
    weights_gib = loading.weight_bytes(model_dir, dtypes) / GIB
    free_gib = torch.cuda.mem_get_info(device)[0] / GIB
    resident = free_gib > weights_gib + ACTIVATIONS_GIB
    logger.info(
        "weights %.1f GiB, free %.1f GiB: %s",
        weights_gib,
        free_gib,
        "all on the GPU" if resident else "one component on the GPU at a time",
    )
    if resident:
        return loading.load(model_dir, device, dtypes)
    pipeline, report = loading.load(model_dir, torch.device("cpu"), dtypes)
    pipeline.enable_model_cpu_offload(device=device)
    return pipeline, report


@contextlib.contextmanager
def _failures_as_ours() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise errors.OutOfMemoryError(
            "the GPU's memory is too small for this resolution"
        ) from error
    except RuntimeError as error:  # torch has no narrower class on all of 2.11 to 2.13
        if "CUDA" in str(error):
            raise errors.GpuFaultError("the GPU failed") from error
        raise errors.GenerationError("the model failed") from error
    except ValueError as error:
        raise errors.GenerationError("the model refused the input") from error
