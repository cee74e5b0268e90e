"""One job after another through one worker: whatever comes, the next one is served."""

import asyncio
import base64
import contextlib
import io
import json
import logging
import math
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker import logs
from worker.generation.engine import Engine
from worker.service.worker import Worker
from worker.settings import Settings


@pytest.fixture
def worker(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker without a bucket, its temporary files in a directory of their own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Worker(Settings(max_audio_seconds=20.0), engine)


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def handle(worker: Worker, job_input: Any, **top: Any) -> dict[str, Any]:
    return asyncio.run(worker.handle({"id": "job-1", "input": job_input, **top}))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


HOSTILE: list[tuple[dict[str, Any], str, str]] = [
    ({"image": "https://127.0.0.1/a.png"}, "INPUT_URL_BLOCKED", "image"),
    ({"image": "https://[::1]/a.png"}, "INPUT_URL_BLOCKED", "image"),
    ({"image": "https://[::ffff:169.254.169.254]/a"}, "INPUT_URL_BLOCKED", "image"),
    ({"audio": "https://169.254.169.254/latest/meta-data"}, "INPUT_URL_BLOCKED", "audio"),
    ({"audio": "https://10.0.0.1/a.wav"}, "INPUT_URL_BLOCKED", "audio"),
    ({"audio": "https://2130706433/a.wav"}, "INPUT_URL_BLOCKED", "audio"),
    ({"audio": "http://example.com/a.wav"}, "INPUT_URL_BLOCKED", "audio"),
    ({"image": "file:///etc/passwd"}, "INPUT_URL_BLOCKED", "image"),
    ({"image": "https://exa mple.com/"}, "INVALID_INPUT", "image"),
    ({"image": encoded(b"not a picture")}, "UNSUPPORTED_MEDIA", "image"),
    ({"image": encoded(png_header(20_000, 20_000))}, "INPUT_TOO_LARGE", "image"),
    ({"image": encoded(png_header(1, 1))}, "INVALID_INPUT", "image"),
    ({"image": encoded(png_header(512, 512))}, "UNSUPPORTED_MEDIA", "image"),
    ({"audio": encoded(b"#EXTM3U\n/etc/passwd\n")}, "UNSUPPORTED_MEDIA", "audio"),
    ({"audio": ""}, "INVALID_INPUT", "audio"),
    ({"audio_start_seconds": 60.0}, "INVALID_INPUT", "audio_start_seconds"),
    ({"face_box": [300, 300, 100, 100]}, "INVALID_INPUT", "face_box"),
    ({"face_box": [100, 100, 1e-9, 1e-9]}, "INVALID_INPUT", "face_box"),
    ({"face_box": [100, 100, 5, 50]}, "INVALID_INPUT", "face_box"),
    ({"guidance_scale": math.nan}, "INVALID_INPUT", "guidance_scale"),
    ({"seed": 10**30}, "INVALID_INPUT", "seed"),
    ({"prompt": "\ud800"}, "INVALID_INPUT", "prompt"),
    ({"\u202eevil": 1}, "INVALID_INPUT", "u202eevil"),
    ({"output": {"key": "../../x"}}, "INVALID_INPUT", "output.key"),
    ({"output": {"delivery": "s3"}}, "STORAGE_NOT_CONFIGURED", "output.delivery"),
]


@pytest.mark.parametrize(("changes", "code", "field"), HOSTILE)
def test_hostile_input_gets_its_code_and_leaves_nothing_behind(
    worker: Worker,
    make_input: Callable[..., dict[str, Any]],
    tmp_path: Path,
    changes: dict[str, Any],
    code: str,
    field: str,
) -> None:
    output = handle(worker, make_input(**changes))

    assert output["error"].startswith(f"{code}: ")
    assert field in output["error_info"]["field"]
    assert output["error_info"]["code"] == code
    assert list(tmp_path.iterdir()) == []
    json.dumps(output, allow_nan=False)
    # and the worker goes on
    assert "plan" in handle(worker, make_input(dry_run=True))
    assert not worker.damaged


def test_a_truncated_picture_and_a_truncated_recording_are_named(
    worker: Worker,
    make_input: Callable[..., dict[str, Any]],
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
) -> None:
    cut = encoded(make_portrait(format="JPEG")[:700])
    assert handle(worker, make_input(image=cut))["error"].startswith("UNSUPPORTED_MEDIA: image")
    header = encoded(make_speech()[:44])
    assert "audio" in handle(worker, make_input(audio=header))["error"]


def test_speech_over_the_limit_is_refused_and_a_part_of_it_is_not(
    worker: Worker, make_input: Callable[..., dict[str, Any]], make_speech: Callable[..., bytes]
) -> None:
    long = encoded(make_speech(seconds=30.0, rate_hz=8_000))
    refused = handle(worker, make_input(audio=long, dry_run=True))
    assert refused["error"].startswith("INPUT_TOO_LARGE: audio")
    part = make_input(audio=long, dry_run=True, audio_start_seconds=20.0, max_seconds=2.0)
    assert handle(worker, part)["plan"]["duration_seconds"] == 2.0


def test_a_clients_bucket_at_a_private_address_is_blocked_before_anything_else(
    worker: Worker, make_input: Callable[..., dict[str, Any]]
) -> None:
    bucket = {"endpointUrl": "https://127.0.0.1:9000", "accessId": "a", "accessSecret": "b"}
    output = handle(worker, make_input(), s3Config=bucket)
    assert output["error"].startswith("INPUT_URL_BLOCKED: s3Config.endpointUrl")


def test_a_dry_run_plans_without_generating(
    worker: Worker, make_input: Callable[..., dict[str, Any]]
) -> None:
    output = handle(worker, make_input(dry_run=True, num_inference_steps=50, fps=12.5))
    assert output["plan"] == {
        "width": 256,
        "height": 256,
        "num_frames": 5,
        "fps": 12.5,
        "duration_seconds": 0.4,
        "num_windows": 1,
        "num_inference_steps": 50,
        "num_computed_steps": 30,
        "delivery": "inline",
    }


def test_without_a_bucket_the_video_comes_in_the_reply(
    worker: Worker, make_input: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    output = handle(worker, make_input(seed=3, output={"thumbnail": True}))
    video = base64.b64decode(output["video_base64"])
    assert video[4:8] == b"ftyp"
    assert len(video) == output["size_bytes"]
    assert base64.b64decode(output["thumbnail_base64"])[:3] == b"\xff\xd8\xff"
    assert output["video_url"] is None
    assert output["worker"]["imports"]["image_processor_backend"] in ("pil", "torchvision")
    assert list(tmp_path.iterdir()) == []


def test_a_drawn_seed_makes_the_same_video_when_it_is_sent_back(
    worker: Worker, make_input: Callable[..., dict[str, Any]]
) -> None:
    first = handle(worker, make_input())
    again = handle(worker, make_input(seed=first["seed"]))
    assert first["sha256"] == again["sha256"]


def test_a_job_over_the_workers_own_limit_ends_with_a_code(
    engine: Engine, make_input: Callable[..., dict[str, Any]]
) -> None:
    worker = Worker(Settings(job_timeout_seconds=0.01), engine)
    output = handle(worker, make_input(num_inference_steps=100))
    assert output["error"].startswith("DEADLINE_EXCEEDED: ")


def test_a_job_that_is_stopped_twice_ends_once_and_the_next_one_runs(
    worker: Worker, make_input: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    async def stop_and_go_on() -> dict[str, Any]:
        job = {"id": "job-1", "input": make_input(num_inference_steps=100)}
        task = asyncio.create_task(worker.handle(job))
        await asyncio.sleep(1.0)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.05)
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert list(tmp_path.iterdir()) == []
        return await worker.handle({"id": "job-2", "input": make_input()})

    assert "error" not in asyncio.run(stop_and_go_on())


def test_an_unforeseen_failure_tells_the_client_a_reference_and_the_log_the_rest(
    worker: Worker,
    make_input: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise LookupError("/secret/path: https://example.com/a?X-Amz-Signature=abc")

    monkeypatch.setattr(Engine, "encode", fail)
    with caplog.at_level(logging.INFO):
        output = handle(worker, make_input())
    assert output["error"].startswith("INTERNAL: ")
    assert "secret" not in json.dumps(output)
    reference = output["error"].rpartition(" ")[2]
    assert reference in caplog.text


@pytest.mark.parametrize(
    ("failure", "code", "refresh"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "OUT_OF_MEMORY", True),
        ("CUDA error: an illegal memory access was encountered", "GENERATION_FAILED", True),
        ("mat1 and mat2 shapes cannot be multiplied", "GENERATION_FAILED", False),
    ],
)
def test_a_fault_of_the_gpu_asks_for_a_fresh_worker(
    worker: Worker,
    make_input: Callable[..., dict[str, Any]],
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    failure: str,
    code: str,
    refresh: bool,
) -> None:
    import torch

    kind = torch.cuda.OutOfMemoryError if "out of memory" in failure else RuntimeError

    def fail(*_: Any, **__: Any) -> None:
        raise kind(failure)

    monkeypatch.setattr(engine.pipeline, "denoise", fail)
    output = handle(worker, make_input())
    assert output["error"].startswith(f"{code}: ")
    assert output.get("refresh_worker", False) is refresh
    assert worker.damaged is refresh
    assert failure not in json.dumps(output)


def test_each_line_of_the_log_names_the_job(
    worker: Worker, make_input: Callable[..., dict[str, Any]]
) -> None:
    stream = io.StringIO()
    logs.configure("INFO")
    root = logging.getLogger()
    assert isinstance(root.handlers[0], logging.StreamHandler)
    root.handlers[0].setStream(stream)
    try:
        handle(worker, make_input(nonsense=1))
    finally:
        logging.basicConfig(level=logging.WARNING, force=True)
    lines = stream.getvalue().splitlines()
    assert lines
    assert all("job job-1: " in line for line in lines)


def test_the_model_that_is_missing_is_an_error_of_the_job_and_not_a_traceback(
    make_input: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    worker = Worker(Settings(model_dir=str(tmp_path / "nothing")))
    worker.load()
    assert worker.load_error is not None
    output = handle(worker, make_input())
    assert output["error"].startswith("INTERNAL: ")
    assert str(tmp_path) not in json.dumps(output)
