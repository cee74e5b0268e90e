"""The README's examples of the client, run as they are written."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import pytest
from fastapi.testclient import TestClient

from local_endpoint import LocalEndpoint, WorkerProcess
from tests.avatar_client.answers import DONE

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
JOB_SECONDS = 300


def example(language: str, mark: str) -> str:
    """The one block of the README in this language that holds the mark."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if mark in block]
    return block


@pytest.fixture(scope="module")
def quick_endpoint(
    worker_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalEndpoint]:
    """An endpoint whose worker makes every job small."""
    directory = tmp_path_factory.mktemp("quick-worker")
    script = Path(__file__).with_name("quick_handler.py")
    with (
        LocalEndpoint() as endpoint,
        WorkerProcess(endpoint, directory, script=script, environment=worker_environment) as worker,
    ):
        worker.wait_until_polling(JOB_SECONDS)
        yield endpoint


@pytest.fixture
def run(
    quick_endpoint: LocalEndpoint,
    installed: Path,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
    tmp_path: Path,
) -> Callable[..., str]:
    """Runs a command beside the two files, with the client installed; what it printed."""
    (tmp_path / "portrait.jpg").write_bytes(make_portrait(format="JPEG"))
    (tmp_path / "speech.wav").write_bytes(make_speech(0.4))
    environment = {
        "PATH": os.pathsep.join((str(installed / "bin"), os.defpath)),
        "PYTHONPATH": str(installed),
        "RUNPOD_API_KEY": quick_endpoint.api_key,
        "RUNPOD_ENDPOINT_ID": quick_endpoint.url,
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=JOB_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def num_frames(path: Path) -> int:
    with av.open(path) as container:
        return sum(1 for _ in container.decode(video=0))


def test_the_python_example_makes_a_video(run: Callable[..., str], tmp_path: Path) -> None:
    run(sys.executable, "-c", example("python", "AvatarEndpoint("))
    assert num_frames(tmp_path / "video.mp4") > 0


def test_the_shell_example_makes_a_video(run: Callable[..., str], tmp_path: Path) -> None:
    assert run("sh", "-e", "-c", example("sh", "--audio speech.wav")) == "video.mp4\n"
    assert num_frames(tmp_path / "video.mp4") > 0


@pytest.mark.slow
def test_the_shell_example_of_two_speakers_makes_a_video(
    run: Callable[..., str], make_speech: Callable[..., bytes], tmp_path: Path
) -> None:
    shutil.copy(ROOT / "demo" / "duet.png", tmp_path / "two.jpg")  # told by its content
    for name in ("hello.wav", "answer.wav"):
        (tmp_path / name).write_bytes(make_speech(0.4))

    [name] = run("sh", "-e", "-c", example("sh", "--speaker")).split()

    assert num_frames(tmp_path / name) == 72  # the second speaker has ended after 2.9 s


def test_the_webhook_example_takes_what_the_platform_posts_and_heeds_its_token(
    capsys: pytest.CaptureFixture[str],
) -> None:
    namespace: dict[str, Any] = {}
    exec(example("python", "webhook_token_matches("), namespace)
    client = TestClient(namespace["app"])
    url = "https://store.example.com/a.mp4?X-Amz-Signature=0"
    body = {**DONE, "output": {"video_url": url}}

    assert client.post("/done?token=SECRET", json=body).status_code == 200
    assert capsys.readouterr().out == url + "\n"
    assert client.post("/done?token=WRONG", json=body).status_code == 403
    failed = {"id": "job-1", "status": "FAILED", "error": "ENCODE_FAILED: no room"}
    assert client.post("/done?token=SECRET", json=failed).status_code == 200
    assert capsys.readouterr().out == "ENCODE_FAILED: no room\n"
