"""The pipeline from a model directory onto its device, placed as the plan for its memory says."""

import ctypes
import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from worker.generation.face import TorchScriptFaceDetector
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.generation.torchscript import NoArithmeticError
from worker.loading import loader
from worker.loading.offload import GIB, USABLE_SHARE, MemoryPlan, make_plan, offload_models
from worker.loading.report import LoadReport
from worker.loading.transfer import Place
from worker.model.attention import fastest_backend

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def load(
    model_dir: Path, device: torch.device, memory_gib: float | None
) -> tuple[HunyuanVideoAvatarPipeline, LoadReport, MemoryPlan | None]:
    """The model where the plan for the GPU's memory wants it; on a CPU there is no plan."""
    dtypes = loader.component_dtypes(device, model_dir)
    if device.type == "cpu":
        _keep_freed_memory()
        return *load_pipeline(model_dir, device, dtypes), None
    plan = plan_memory(model_dir, device, memory_gib)
    logger.info("memory plan: %s", plan)
    if plan.all_resident:
        pipeline, report = load_pipeline(model_dir, device, dtypes)
    else:
        placement: dict[str, Place] = {"default": "host", "audio_encoder": "device"}
        pipeline, report = load_pipeline(model_dir, device, dtypes, placement)
        pipeline.offloaded = offload_models(pipeline.components, device, plan)
    pipeline.transformer.set_attention_backend(fastest_backend(device))
    return pipeline, report, plan


def load_pipeline(
    model_dir: Path,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
    placement: Mapping[str, Place] | None = None,
) -> tuple[HunyuanVideoAvatarPipeline, LoadReport]:
    """The pipeline of what `loader.load` loads, and of the face detector where there is one.

    Raises:
        OSError, ValueError: as `loader.load`.
    """

    def load_others() -> dict[str, TorchScriptFaceDetector]:
        directory = model_dir / "face_detector"
        if not directory.is_dir():
            return {}
        try:
            detector = TorchScriptFaceDetector.from_pretrained(directory).to(device)
        except NoArithmeticError as error:
            logger.warning("the checkpoint's face detector is not used: %s", error)
            return {}
        return {"face_detector": detector}

    components, report = loader.load(model_dir, device, dtypes, placement, load_others=load_others)
    return HunyuanVideoAvatarPipeline(**components), report


def _keep_freed_memory() -> None:
    """Has glibc keep what tensors leave, where it is the C library.

    Else each large tensor is new pages, which the kernel clears first: that was a third of the
    decoding.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def plan_memory(model_dir: Path, device: torch.device, memory_gib: float | None) -> MemoryPlan:
    """The plan for what is free of this GPU's memory, or for so much of it.

    Raises:
        OSError, ValueError: a file of weights cannot be read; not even the smallest video fits.
    """
    return make_plan(
        _budget(device, memory_gib),
        loader.network_sizes(model_dir, loader.component_dtypes(device, model_dir)),
    )


def _budget(device: torch.device, memory_gib: float | None) -> int:
    """Bytes of GPU memory for weights and everything else; keeps the process to what was set."""
    free, total = torch.cuda.mem_get_info(device)
    if memory_gib is not None:
        free = min(free, int(memory_gib * GIB))
        torch.cuda.set_per_process_memory_fraction(free / total, device)
    return int(free * USABLE_SHARE)
