"""The client, a local endpoint and the demo worker: the whole way of a video."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from avatar_client import (
    AsyncAvatarEndpoint,
    AuthenticationError,
    AvatarEndpoint,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    JobStatus,
)
from local_endpoint import LocalEndpoint
from tests.avatar_client.client_kinds import KINDS, clients
from tests.conftest import BucketServer
from tests.support.pictures import encoded

ROOT = Path(__file__).parents[2]
DRAFT: dict[str, Any] = {"resolution": 256, "num_inference_steps": 2, "seed": 128}
JOB_SECONDS = 300
STAGES = ["download", "preprocess", "denoise", "decode", "upload"]

pytestmark = pytest.mark.usefixtures("shared_worker")


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, endpoint: LocalEndpoint) -> Iterator[Any]:
    with clients(request.param, endpoint.api_key) as make:
        yield make(endpoint.url)


def num_frames(path: Path) -> int:
    with av.open(path) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_portrait_and_a_speech_become_a_video_in_a_file(
    client: Any,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    portrait = tmp_path / "portrait.png"
    portrait.write_bytes(make_portrait())
    seen: list[JobStatus] = []

    job = client.submit(portrait, make_speech(1.0), **DRAFT, user_data={"order": 5}, preview=True)
    result = job.wait(on_status=seen.append, timeout_seconds=JOB_SECONDS)
    path = job.download(tmp_path / "video.mp4")

    assert (result.output["seed"], result.output["user_data"]) == (128, {"order": 5})
    assert path.stat().st_size == result.output["size_bytes"]
    assert num_frames(path) == result.output["num_frames"]
    stages = [status.progress.stage for status in seen if status.progress]
    assert stages == sorted(stages, key=STAGES.index)
    previews = [status.progress.preview for status in seen if status.progress]
    assert previews[-1] is not None
    assert previews[-1].startswith(b"\xff\xd8")
    assert {status.status for status in seen} >= {"IN_PROGRESS", "COMPLETED"}


def test_a_video_inside_the_answer_becomes_a_file(
    endpoint: LocalEndpoint,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    inline = {"delivery": "inline"}
    with AvatarEndpoint(endpoint.url, endpoint.api_key) as client:
        job = client.submit(make_portrait(), make_speech(0.5), **DRAFT, output=inline)
        job.wait(timeout_seconds=JOB_SECONDS)
        assert num_frames(job.download(tmp_path / "video.mp4")) > 0


@pytest.mark.slow
def test_two_speakers_become_one_video_and_a_wrong_one_is_named(
    endpoint: LocalEndpoint, make_speech: Callable[..., bytes], tmp_path: Path
) -> None:
    recording = tmp_path / "left.wav"
    recording.write_bytes(make_speech(0.3))
    speakers: list[dict[str, Any]] = [
        {"audio": recording, "face_box": [20, 20, 90, 100], "name": "Ada"},
        {"audio": make_speech(0.5, 44_100), "face_box": [180, 20, 90, 100], "start_seconds": 0.2},
    ]
    picture = encoded(Image.new("RGB", (320, 256), "grey"), "PNG")
    with AvatarEndpoint(endpoint.url, endpoint.api_key) as client:
        job = client.submit(picture, speakers=speakers, **DRAFT)
        output = job.wait(timeout_seconds=JOB_SECONDS).output or {}
        assert num_frames(job.download(tmp_path / "video.mp4")) == 17
        assert [each["name"] for each in output["speakers"]] == ["Ada", None]
        assert [each["face_box"] for each in output["speakers"]] == [
            each["face_box"] for each in speakers
        ]
        job = client.submit(picture, speakers=[{"audio": recording, "face": 1}], **DRAFT)
        with pytest.raises(JobFailedError, match="no face was found") as caught:
            job.wait(timeout_seconds=JOB_SECONDS)
    assert (caught.value.code, caught.value.field) == ("INVALID_INPUT", "speakers.0.face")


def test_the_worker_names_what_it_cannot_use(
    client: Any, make_speech: Callable[..., bytes]
) -> None:
    job = client.submit(b"no picture", make_speech(0.5), **DRAFT)
    with pytest.raises(JobFailedError) as caught:
        job.wait(timeout_seconds=JOB_SECONDS)
    assert (caught.value.code, caught.value.field) == ("UNSUPPORTED_MEDIA", "image")
    assert not caught.value.retryable


def test_a_running_job_is_cancelled(
    client: Any, make_portrait: Callable[..., bytes], make_speech: Callable[..., bytes]
) -> None:
    job = client.submit(make_portrait(), make_speech(2.0), resolution=704)
    for status in job.updates(timeout_seconds=JOB_SECONDS):
        if status.status == "IN_PROGRESS":
            break
    assert job.cancel().status == "CANCELLED"
    with pytest.raises(JobCancelledError):
        job.wait(timeout_seconds=JOB_SECONDS)


def test_an_unknown_job_and_a_wrong_key_are_told_apart(
    client: Any, endpoint: LocalEndpoint
) -> None:
    with pytest.raises(JobNotFoundError):
        client.job("never-submitted").status()
    assert set(client.health()) == {"jobs", "workers"}
    with (
        AvatarEndpoint(endpoint.url, "wrong") as stranger,
        pytest.raises(AuthenticationError),
    ):
        stranger.health()


def test_a_speech_too_large_for_a_request_goes_through_the_bucket(
    endpoint: LocalEndpoint,
    object_store: BucketServer,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    speech = tmp_path / "speech.wav"
    speech.write_bytes(make_speech(25.0, rate_hz=192_000))
    assert speech.stat().st_size > 9_000_000
    with AvatarEndpoint(endpoint.url, endpoint.api_key, object_store.settings) as client:
        job = client.submit(make_portrait(), speech, **DRAFT, max_seconds=0.5, dry_run=True)
        plan = job.wait(timeout_seconds=JOB_SECONDS).output
    assert plan is not None
    assert plan["plan"]["duration_seconds"] == 0.5


def test_many_jobs_are_followed_at_once(
    endpoint: LocalEndpoint, make_portrait: Callable[..., bytes], make_speech: Callable[..., bytes]
) -> None:
    async def plan(client: Any) -> Any:
        job = await client.submit(make_portrait(), make_speech(0.5), **DRAFT, dry_run=True)
        return (await job.wait(timeout_seconds=JOB_SECONDS)).output["plan"]["width"]

    async def plan_all() -> list[Any]:
        async with AsyncAvatarEndpoint(endpoint.url, endpoint.api_key) as client:
            return await asyncio.gather(*(plan(client) for _ in range(5)))

    assert asyncio.run(plan_all()) == [256] * 5


@pytest.fixture
def command(
    endpoint: LocalEndpoint,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
    tmp_path: Path,
) -> Callable[..., Any]:
    """Starts `python -m avatar_client` beside two files."""
    (tmp_path / "portrait.png").write_bytes(make_portrait())
    (tmp_path / "speech.wav").write_bytes(make_speech(1.0))

    def start(*arguments: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "avatar_client", *arguments],
            cwd=tmp_path,
            env={
                "PATH": os.defpath,
                "PYTHONPATH": str(ROOT),
                "RUNPOD_API_KEY": endpoint.api_key,
                "RUNPOD_ENDPOINT_ID": endpoint.url,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background job inherits that Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return start


FILES = ("--image", "portrait.png", "--audio", "speech.wav")
FAST = ("--resolution", "256", "--num-inference-steps", "2")


def test_a_command_makes_a_video(command: Callable[..., Any], tmp_path: Path) -> None:
    with command("generate", *FILES, *FAST, "--output", "mine.mp4") as process:
        printed, told = process.communicate(timeout=JOB_SECONDS)
    assert (process.returncode, printed) == (0, "mine.mp4\n"), told
    assert num_frames(tmp_path / "mine.mp4") > 0


def test_a_command_prints_the_plan_of_a_job(command: Callable[..., Any]) -> None:
    with command("generate", *FILES, *FAST, "--dry-run") as process:
        printed, told = process.communicate(timeout=JOB_SECONDS)
    assert process.returncode == 0, told
    assert json.loads(printed)["plan"]["num_inference_steps"] == 2


def test_an_interrupted_command_leaves_no_job_behind(
    command: Callable[..., Any], endpoint: LocalEndpoint
) -> None:
    with command("generate", *FILES, "--resolution", "704") as process:
        job_id = process.stderr.readline().split()[1]
        process.send_signal(signal.SIGINT)
        try:
            _, told = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            endpoint.cancel(job_id)  # it would keep the shared worker for hours
            raise
    assert process.returncode == 130
    assert f"job {job_id} is CANCELLED" in told
    assert endpoint.state(job_id).status == "CANCELLED"
