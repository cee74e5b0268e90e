"""Real servers, real files and a real worker for the tests: nothing here stands in for our code."""

import io
import os
import random
import shutil
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import hypothesis
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image, ImageDraw
from pydantic import SecretStr

from avatar_client.contract.bucket import BucketSettings
from local_endpoint import LocalEndpoint, WorkerProcess
from worker.settings import Settings

# Of torch, in this process and in those that it starts: the tests run in a process for each core.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
os.environ |= ONE_THREAD

# An example takes as long as a busy machine makes it take, and all runs try the same ones.
hypothesis.settings.register_profile(
    "busy",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("busy")

START_SECONDS = 300.0  # far more than a worker takes to start
LOST_SECONDS = 60.0  # without a heartbeat, which a busy machine sends late


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """All runs draw the same numbers, in fixtures of every scope too."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what this machine's user has set."""
    ours = {name.upper() for name in Settings.model_fields}
    for name in os.environ:
        if name in ours or name.startswith(("RUNPOD_", "BUCKET_", "AWS_")):
            monkeypatch.delenv(name)
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name)


# Sample media, made here


@pytest.fixture(scope="session")
def make_portrait() -> Callable[..., bytes]:
    """A drawn face as an encoded image: `make_portrait(width=..., height=..., format="PNG")`."""

    def make(width: int = 320, height: int = 320, format: str = "PNG") -> bytes:
        image = Image.new("RGB", (width, height), (120, 150, 180))
        draw = ImageDraw.Draw(image)

        def oval(x: float, y: float, radius_x: float, radius_y: float, colour: Any) -> None:
            left, right = (x - radius_x) * width, (x + radius_x) * width
            draw.ellipse(
                (left, (y - radius_y) * height, right, (y + radius_y) * height), fill=colour
            )

        oval(0.5, 1.1, 0.40, 0.35, (60, 60, 90))  # shoulders
        oval(0.5, 0.40, 0.26, 0.32, (70, 45, 30))  # hair
        oval(0.5, 0.45, 0.21, 0.27, (224, 180, 150))  # face
        for x in (0.42, 0.58):
            oval(x, 0.40, 0.035, 0.02, (250, 250, 250))
            oval(x, 0.40, 0.015, 0.018, (40, 30, 20))
        oval(0.5, 0.48, 0.02, 0.04, (200, 150, 120))  # nose
        oval(0.5, 0.58, 0.07, 0.02, (170, 70, 70))  # mouth
        content = io.BytesIO()
        image.save(content, format)
        return content.getvalue()

    return make


@pytest.fixture(scope="session")
def make_speech() -> Callable[..., bytes]:
    """A voice-like WAV: a 120 Hz buzz through two formants, in four syllables a second."""

    def make(seconds: float = 1.0, rate_hz: int = 16_000) -> bytes:
        times = np.arange(round(seconds * rate_hz)) / rate_hz
        voice = np.zeros_like(times)
        for harmonic in range(1, 25):
            frequency_hz = 120.0 * harmonic
            loudness = sum(np.exp(-(((frequency_hz - peak) / 250.0) ** 2)) for peak in (700, 1200))
            voice += loudness * np.sin(2 * np.pi * frequency_hz * times)
        voice *= 0.5 - 0.5 * np.cos(2 * np.pi * 4.0 * times)
        samples = (voice / max(1e-9, np.abs(voice).max()) * 0.5 * 32767).astype("<i2")
        content = io.BytesIO()
        with wave.open(content, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate_hz)
            file.writeframes(samples.tobytes())
        return content.getvalue()

    return make


# Servers


@dataclass(frozen=True)
class BucketServer:
    """An S3-compatible server with one bucket, and what it takes to reach it."""

    endpoint_url: str
    bucket: str = "avatars"
    access_key_id: str = "test-access-key"
    secret_access_key: str = "test-secret-key"

    @cached_property
    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            region_name="us-east-1",
        )

    @property
    def settings(self) -> BucketSettings:
        return BucketSettings(
            endpoint_url=self.endpoint_url,
            name=self.bucket,
            access_key_id=self.access_key_id,
            secret_access_key=SecretStr(self.secret_access_key),
        )

    @property
    def environment(self) -> dict[str, str]:
        """The worker's settings for this bucket."""
        return {
            "BUCKET_ENDPOINT_URL": self.endpoint_url,
            "BUCKET_ACCESS_KEY_ID": self.access_key_id,
            "BUCKET_SECRET_ACCESS_KEY": self.secret_access_key,
            "BUCKET_NAME": self.bucket,
        }

    def keys(self, prefix: str = "") -> list[str]:
        listing = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for item in listing.get("Contents", [])]


@pytest.fixture(scope="session")
def object_store() -> Iterator[BucketServer]:
    """A running S3 server with an empty bucket, as an operator has one: no endpoint's own."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    store = BucketServer(f"http://{host}:{port}")
    store.client.create_bucket(Bucket=store.bucket)
    yield store
    server.stop()


class MediaServer:
    """An HTTP server that answers each path as it was told to."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self._answers: dict[str, dict[str, Any]] = {}
        media = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                media._answer(self)

            do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815

            def log_message(self, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def add(
        self,
        path: str,
        body: bytes = b"",
        *,
        content_type: str = "application/octet-stream",
        status: int = 200,
        location: str | None = None,  # of a redirect
        delay_seconds: float = 0.0,  # before the answer begins
        bytes_per_second: float | None = None,
        cut_after_bytes: int | None = None,  # the length promised is that of the whole body
        length: int | None = None,  # a Content-Length other than the body's
    ) -> str:
        """The URL under which the answer now stands."""
        headers = {"Content-Type": content_type, "Content-Length": str(length or len(body))}
        if location is not None:
            headers["Location"] = location
        sent = body if cut_after_bytes is None else body[:cut_after_bytes]
        self._answers[path] = {
            "status": status,
            "headers": headers,
            "body": sent,
            "delay_seconds": delay_seconds,
            "bytes_per_second": bytes_per_second,
        }
        return self.url + path

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.requests.append((request.command, request.path))
        answer = self._answers.get(path)
        request.close_connection = True
        if answer is None:
            request.send_error(404)
            return
        time.sleep(answer["delay_seconds"])
        try:
            request.send_response(answer["status"])
            for name, value in answer["headers"].items():
                request.send_header(name, value)
            request.end_headers()
            if request.command != "HEAD":
                self._send_body(request, answer["body"], answer["bytes_per_second"])
        except ConnectionError:
            pass  # the client has had enough, as it should of some answers

    @staticmethod
    def _send_body(
        request: BaseHTTPRequestHandler, body: bytes, bytes_per_second: float | None
    ) -> None:
        if bytes_per_second is None:
            request.wfile.write(body)
            return
        size = max(1, int(bytes_per_second / 10))
        for start in range(0, len(body), size):
            request.wfile.write(body[start : start + size])
            request.wfile.flush()
            time.sleep(0.1)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def media_server() -> Iterator[MediaServer]:
    server = MediaServer()
    yield server
    server.stop()


# Libraries of another language


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the packages that its lock file names, and the programs that use them."""
    directory = tmp_path_factory.mktemp("javascript")
    source = Path(__file__).parent / "support" / "javascript"
    shutil.copytree(source, directory, dirs_exist_ok=True)
    install = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run(install, cwd=directory, check=True)
    return directory


# The platform and a worker on it


@pytest.fixture(scope="session")
def endpoint() -> Iterator[LocalEndpoint]:
    """A running endpoint, shared: each test has its own jobs in it."""
    with LocalEndpoint(lost_after_seconds=LOST_SECONDS) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of random weights, whose videos are noise and quickly made."""
    from tests.support import random_model

    model_dir = tmp_path_factory.mktemp("random-model")
    random_model.write(model_dir)
    return model_dir


@pytest.fixture(scope="session")
def worker_environment(
    object_store: BucketServer, random_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, str]:
    """The operator's settings of a worker with the model of random weights and the bucket."""
    return {
        "MODEL_DIR": str(random_model),
        "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",  # the media server's
        **ONE_THREAD,
        # torch's own cache, which outlives a job, away from the job's temporary files
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("torch-cache")),
        **object_store.environment,
    }


@pytest.fixture(scope="session")
def shared_worker(
    endpoint: LocalEndpoint,
    worker_environment: Mapping[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[WorkerProcess]:
    """The shared worker: `handler.py` with random weights, ready for jobs of `endpoint`."""
    directory = tmp_path_factory.mktemp("worker")
    with WorkerProcess(endpoint, directory, environment=worker_environment) as worker:
        worker.wait_until_polling(START_SECONDS)
        yield worker


@pytest.fixture
def own_endpoint() -> Iterator[LocalEndpoint]:
    """An endpoint for tests that end their worker."""
    with LocalEndpoint(lost_after_seconds=LOST_SECONDS) as endpoint:
        yield endpoint


@pytest.fixture
def own_worker(
    own_endpoint: LocalEndpoint, worker_environment: Mapping[str, str], tmp_path: Path
) -> Iterator[WorkerProcess]:
    """A worker that the test may end, ready for jobs of `own_endpoint`."""
    directory = tmp_path / "worker"
    with WorkerProcess(own_endpoint, directory, environment=worker_environment) as worker:
        worker.wait_until_polling(START_SECONDS)
        yield worker


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy checkpoint as the converter leaves it: a directory that the pipeline loads."""
    from builder.convert import convert
    from tests.support.golden_weights import build_toy_checkpoint

    ckpts = build_toy_checkpoint(tmp_path_factory.mktemp("published"))
    target = tmp_path_factory.mktemp("toy_model")
    convert(ckpts, target)
    return target
