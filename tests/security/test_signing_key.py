"""A worker that signs videos: its key stays with it, and what is signed comes through S3 whole."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import c2pa
import psutil
import pytest

from local_endpoint import LocalEndpoint, WorkerProcess
from tests.conftest import START_SECONDS, BucketServer
from tests.support.certificates import signing_pair
from worker.media.provenance import Credentials
from worker.settings import Settings

JOB_SECONDS = 300.0  # far more than a small job takes


def lines_of(key: str) -> list[bytes]:
    """What gives a key in PEM away, however its line breaks are written."""
    return [line.encode() for line in key.splitlines()[1:-1]]


def holders(key: str, name: str, processes: list[psutil.Process] | None = None) -> list[int]:
    """The processes, of this machine or of those, in whose file of that name the key stands."""
    found = []
    for process in processes if processes is not None else psutil.process_iter():
        try:
            content = Path(f"/proc/{process.pid}/{name}").read_bytes()
        except OSError:  # it has ended
            continue
        if any(line in content for line in lines_of(key)):
            found.append(process.pid)
    return found


class Watched(io.BytesIO):
    """A file that notes, whenever the library uses it, what else has the key then."""

    def __init__(self, content: bytes, look: Callable[[], list[int]]) -> None:
        super().__init__(content)
        self._look = look
        self.looks: list[list[int]] = []

    def readinto(self, buffer: Any, /) -> int:
        self.looks.append(self._look())
        return super().readinto(buffer)

    def write(self, data: Any, /) -> int:
        self.looks.append(self._look())
        return super().write(data)


def test_no_process_is_told_the_key_while_a_file_is_signed(
    make_portrait: Callable[..., bytes],
) -> None:
    certificate, key = signing_pair()
    credentials = Credentials.of(Settings(c2pa_certificate=certificate, c2pa_private_key=key))
    assert credentials is not None

    def look() -> list[int]:
        return holders(key, "cmdline") + holders(key, "environ")

    source, target = Watched(make_portrait(format="JPEG"), look), Watched(b"", look)
    credentials.sign(source, target, "image/jpeg", None)

    assert source.looks
    assert target.looks
    assert not any(source.looks + target.looks)


@pytest.fixture
def key_and_worker(
    own_endpoint: LocalEndpoint, worker_environment: Mapping[str, str], tmp_path: Path
) -> Iterator[tuple[str, WorkerProcess]]:
    """A worker with an operator's certificate and key in its environment, and that key."""
    certificate, key = signing_pair()
    pair = {"C2PA_CERTIFICATE": certificate, "C2PA_PRIVATE_KEY": key.replace("\n", "\\n")}
    environment = {**worker_environment, **pair}
    with WorkerProcess(own_endpoint, tmp_path / "w", environment=environment) as worker:
        worker.wait_until_polling(START_SECONDS)
        yield key, worker


def test_a_signed_video_comes_through_s3_whole_and_the_key_nowhere(
    own_endpoint: LocalEndpoint,
    key_and_worker: tuple[str, WorkerProcess],
    object_store: BucketServer,
    media_server: Any,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
) -> None:
    key, worker = key_and_worker
    inputs = {"image": make_portrait(), "audio": make_speech(0.4)}
    sent = {name: media_server.add(f"/{name}", content) for name, content in inputs.items()}
    small = {"resolution": 256, "num_inference_steps": 1, "seed": 7, "output": {"thumbnail": True}}

    job = own_endpoint.wait(own_endpoint.submit({"input": sent | small}), JOB_SECONDS)
    family = psutil.Process(worker.pid).children(recursive=True)

    assert job.status == "COMPLETED", job.error
    made = job.output
    assert made["provenance"] == "c2pa"
    for kind, name in (("video/mp4", "video"), ("image/jpeg", "thumbnail")):
        with urlopen(made[f"{name}_url"]) as answer:
            content = answer.read()
        with c2pa.Reader(kind, io.BytesIO(content)) as reader:
            told = json.loads(reader.json())
            assert reader.get_validation_state() == "Valid"
        manifest = told["manifests"][told["active_manifest"]]
        [facts] = [
            each["data"]
            for each in manifest["assertions"]
            if each["label"] == "avatar-worker.generation"
        ]
        assert facts["seed"] == made["seed"] == 7
        hashes = {f"{one}_sha256": hashlib.sha256(each).hexdigest() for one, each in inputs.items()}
        assert facts["inputs"] == hashes
        if name == "video":
            assert hashlib.sha256(content).hexdigest() == made["sha256"]

    arguments = psutil.Process(worker.pid).cmdline()
    started = [each for each in family if each.cmdline() != arguments]
    assert started  # the decoders'; the SDK's heartbeat is a copy of the worker itself
    assert holders(key, "environ", [psutil.Process(worker.pid)]) == [worker.pid]
    assert holders(key, "environ", started) == holders(key, "cmdline") == []
    told_by_worker = (worker.log + json.dumps(made)).encode()
    assert not [line for line in lines_of(key) if line in told_by_worker]
