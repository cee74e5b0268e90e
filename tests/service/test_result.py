"""The form of what a client gets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avatar_client.contract.request import JobInput
from avatar_client.version import __version__
from worker.generation.engine import Engine
from worker.media.video import VideoFile
from worker.service import result
from worker.service.estimate import JobPlan
from worker.service.faces import ShownFaces
from worker.shapes import FrameSize, VideoPlan

PLAN = JobPlan(FrameSize(256, 320), VideoPlan(150), "balanced", 50, 2)

FACES = ShownFaces(
    [(1.0, 2.24, 30.0, 40.0), (50.0, 2.0, 30.0, 40.0)], "data:image/jpeg;base64,AA=="
)
SPEAKER = {"face_box": [1.0, 2.2, 30.0, 40.0], "start_seconds": 0.0, "duration_seconds": 1.5}


@pytest.fixture
def params(make_input: Callable[..., dict[str, Any]]) -> JobInput:
    return JobInput.model_validate(
        make_input(preset="balanced", fps=12.5, num_inference_steps=50, user_data={"order": 1})
    )


def test_a_dry_run_tells_the_plan_the_delivery_and_the_estimate(params: JobInput) -> None:
    output = result.dry_run_output(
        params, PLAN, {"delivery": "inline"}, 12.0004, FACES, 99.5, 0.002, ("w",), "demo"
    )
    assert output.pop("worker")["model"] == "demo"
    assert output == {
        "dry_run": True,
        "plan": {
            "width": 320,
            "height": 256,
            "num_frames": 150,
            "fps": 12.5,
            "duration_seconds": 12.0,
            "num_windows": 2,
            "num_inference_steps": 50,
            "num_computed_steps": 17,
            "delivery": "inline",
        },
        "faces": [
            {"index": 0, "face_box": [1.0, 2.2, 30.0, 40.0]},
            {"index": 1, "face_box": [50.0, 2.0, 30.0, 40.0]},
        ],
        "faces_thumbnail": "data:image/jpeg;base64,AA==",
        "estimate_seconds": 99.5,
        "estimate_usd": 0.199,
        "warnings": ["w"],
        "user_data": {"order": 1},
    }


def test_a_videos_metadata_are_those_of_its_file_and_its_plan(params: JobInput) -> None:
    file = VideoFile(Path("x"), num_frames=150, duration_seconds=12.0, size_bytes=9, sha256="ab")
    assert result.video_metadata(params, PLAN, file, 7, ("no face",), [SPEAKER]) == {
        "sha256": "ab",
        "size_bytes": 9,
        "duration_seconds": 12.0,
        "num_frames": 150,
        "fps": 12.5,
        "width": 320,
        "height": 256,
        "seed": 7,
        "provenance": "metadata",
        "speakers": [SPEAKER],
        "warnings": ["no face"],
    }


def test_a_reply_names_what_shaped_the_video_and_who_made_it(params: JobInput) -> None:
    video = {"seed": 7, "speakers": [SPEAKER]}
    output = result.video_output(params, video, {"total_seconds": 1.0}, "demo")
    assert output["speakers"] == [{"name": None, **SPEAKER}]
    assert (output["seed"], output["content_type"]) == (7, "video/mp4")
    assert output["parameters"] == {
        "preset": "balanced",
        "resolution": 256,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "flow_shift": 5.0,
        "motion": {"pose": 25.0, "expression": 30.0},
    }
    assert output["user_data"] == {"order": 1}
    assert output["metrics"] == {"total_seconds": 1.0}
    assert (output["worker"]["version"], output["worker"]["model"]) == (__version__, "demo")


def test_metrics_tell_the_stages_the_gpu_and_how_the_model_was_loaded(
    params: JobInput, engine: Engine
) -> None:
    metrics = result.job_metrics(params, engine, {"denoise_seconds": 1.5}, 2.0004, 0.001)
    report = engine.load_report
    assert (metrics["denoise_seconds"], metrics["total_seconds"]) == (1.5, 2.0)
    assert metrics["cost_usd"] == 0.002
    assert (metrics["num_gpus"], metrics["gpu"]) == (1, engine.gpu_name)
    assert metrics["model_load_bytes"] == report.num_bytes > 0
    assert metrics["model_load_gigabytes_per_second"] == pytest.approx(
        report.bytes_per_second / 1e9, abs=0.01
    )
