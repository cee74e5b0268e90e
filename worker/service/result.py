"""What the client gets of a job that went well: the plan of a dry run, or a video's reply.

Pure functions of values that are known by then. The README's tables say what the fields mean.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from avatar_client.contract.request import JobInput
from avatar_client.version import __version__
from worker import import_guard
from worker.media.video import VideoFile
from worker.service.estimate import JobPlan, cost_usd
from worker.service.faces import ShownFaces

if TYPE_CHECKING:  # imports torch
    from worker.generation.engine import Engine
    from worker.model.sparse_attention import SparseAttention, SparsityReport

TOLD_PARAMETERS = {
    "preset",
    "resolution",
    "num_inference_steps",
    "guidance_scale",
    "flow_shift",
    "motion",
}


def dry_run_output(
    params: JobInput,
    plan: JobPlan,
    delivery: Mapping[str, Any],  # as `Delivery.describe` says it
    duration_seconds: float,
    faces: ShownFaces,
    estimate_seconds: float | None,  # None: nothing is known of this GPU yet
    price_per_second: float | None,
    warnings: Sequence[str],
    model: str,
) -> dict[str, Any]:
    """The reply to a dry run."""
    return {
        "dry_run": True,
        "plan": {
            "width": plan.shown_size.width,
            "height": plan.shown_size.height,
            "num_frames": plan.video.num_frames,
            "fps": params.fps,
            "duration_seconds": round(duration_seconds, 3),
            "num_windows": plan.video.num_windows,
            "num_inference_steps": plan.num_inference_steps,
            "num_computed_steps": plan.num_computed_steps,
            **delivery,
        },
        "faces": [
            {"index": index, "face_box": [round(value, 1) for value in box]}
            for index, box in enumerate(faces.boxes)
        ],
        "faces_thumbnail": faces.thumbnail,
        "estimate_seconds": estimate_seconds,
        "estimate_usd": cost_usd(estimate_seconds, price_per_second),
        "warnings": list(warnings),
        "user_data": params.user_data,
        "worker": worker_identity(model),
    }


def video_metadata(
    params: JobInput,
    plan: JobPlan,
    video: VideoFile,
    seed: int,
    warnings: Sequence[str],
    speakers: Sequence[Mapping[str, Any]],  # but for their names, which the request tells
) -> dict[str, Any]:
    """What stays true of the video wherever it lies: part of the reply, and stored beside it."""
    return {
        "sha256": video.sha256,
        "size_bytes": video.size_bytes,
        "duration_seconds": round(video.duration_seconds, 3),
        "num_frames": video.num_frames,
        "fps": params.fps,
        "width": plan.shown_size.width,
        "height": plan.shown_size.height,
        "seed": seed,
        "provenance": video.provenance,
        "speakers": list(speakers),
        "warnings": list(warnings),
    }


def video_output(
    params: JobInput,
    video: Mapping[str, Any],  # its metadata, and where it lies
    metrics: Mapping[str, Any],
    model: str,
) -> dict[str, Any]:
    """The reply to a job whose video has been delivered."""
    names = [speaker.name for speaker in params.voices]
    return {
        "request_id": params.request_id,
        **video,
        "speakers": [
            {"name": name, **speaker}
            for name, speaker in zip(names, video["speakers"], strict=False)
        ],
        "content_type": params.output.video_format.content_type,
        "parameters": params.model_dump(mode="json", include=TOLD_PARAMETERS),
        "user_data": params.user_data,
        "metrics": dict(metrics),
        "worker": worker_identity(model),
    }


def job_metrics(
    params: JobInput,
    engine: "Engine",
    stage_seconds: Mapping[str, float],
    total_seconds: float,
    price_per_second: float | None,
    sparsity: "SparseAttention | None" = None,
) -> dict[str, Any]:
    """What the job took, and on what."""
    return {
        **stage_seconds,
        "total_seconds": round(total_seconds, 3),
        "cost_usd": cost_usd(total_seconds, price_per_second),
        "peak_memory_gib": engine.peak_memory_gib,
        "gpu": engine.gpu_name,
        "num_gpus": engine.num_gpus(params),
        **({} if sparsity is None else _attention_metrics(sparsity.report())),
        **_load_metrics(engine),
    }


def _attention_metrics(report: "SparsityReport") -> dict[str, float]:
    """What sparse attention left out, and what that cost."""
    return {
        "attention_density": round(report.density, 3),
        "attention_error": round(report.error, 4),
        "attention_fallbacks": report.fallbacks,
    }


def _load_metrics(engine: "Engine") -> dict[str, float | None]:
    """How this worker's model was loaded."""
    report = engine.load_report
    ratio = report.disk_ratio
    return {
        "model_load_seconds": round(engine.load_seconds, 1),
        "model_load_bytes": report.num_bytes,
        "model_load_gigabytes_per_second": round(report.bytes_per_second / 1e9, 2),
        "model_load_disk_ratio": None if ratio is None else round(ratio, 2),
    }


def worker_identity(model: str) -> dict[str, Any]:
    """Which worker answered: its version, its model, and how its packages imported."""
    return {"version": __version__, "model": model, "imports": import_guard.report().brief()}
