"""The endpoint's own object store, with the worker's storage, a player, and strangers."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import httpx
import numpy as np
import psutil
import pytest

from avatar_client.contract import bucket as stores
from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import UploadError
from local_endpoint import LocalEndpoint
from local_endpoint.object_store import ObjectStore
from tests.support.waiting import wait_until
from worker.media.storage import Storage

ROOT = Path(__file__).parents[2]
KEY = "a-key_of-the-store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    directory = tmp_path_factory.mktemp("store")
    with ObjectStore(directory, access_key_id=KEY, secret_access_key="secret") as store:
        yield store


@pytest.fixture
def bucket(store: ObjectStore) -> Storage:
    """The store as a worker uses it."""
    return Storage(store.bucket)


@pytest.fixture
def put(bucket: Storage, tmp_path: Path) -> Callable[[str, bytes], str]:
    """Puts an object; gives its presigned address."""

    def put(key: str, content: bytes) -> str:
        path = tmp_path / "content"
        path.write_bytes(content)
        bucket.put(path, key, content_type="video/mp4")
        return bucket.url(key, 60)

    return put


# What a worker and a player do


def test_the_workers_storage_puts_finds_and_signs(bucket: Storage, tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    video.write_bytes(b"not really a video" * 1000)
    metadata = {"seed": 1, "warnings": ['zwei  Räume, "quoted" ☃'], "fps": 12.5, "nothing": None}

    bucket.check()
    assert bucket.head("avatar/ü 1.mp4") is None
    bucket.put(video, "avatar/ü 1.mp4", content_type="video/mp4", metadata=metadata)

    found = bucket.head("avatar/ü 1.mp4")
    assert found is not None
    assert (found.metadata, found.size_bytes) == (metadata, video.stat().st_size)
    answer = httpx.get(bucket.url("avatar/ü 1.mp4", 60))
    assert (answer.status_code, answer.content) == (200, video.read_bytes())
    assert answer.headers["Content-Type"] == "video/mp4"


def test_a_large_file_is_put_in_parts(
    put: Callable[[str, bytes], str], bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "MULTIPART_BYTES", 6 * 2**20)
    content = np.random.default_rng(0).bytes(17 * 2**20)

    url = put("large.mp4", content)

    assert bucket.head("large.mp4").size_bytes == len(content)
    assert httpx.get(url).content == content


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("bytes=0-0", 0, 0), ("bytes=2-5", 2, 5), ("bytes=7-", 7, 9), ("bytes=-3", 7, 9)],
)
def test_a_range_is_answered_with_its_bytes(
    put: Callable[[str, bytes], str], asked: str, first: int, last: int
) -> None:
    answer = httpx.get(put("ten", b"0123456789"), headers={"Range": asked})

    assert (answer.status_code, answer.content) == (206, b"0123456789"[first : last + 1])
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/10"
    assert answer.headers["Accept-Ranges"] == "bytes"


def test_a_range_beyond_the_end_is_refused(put: Callable[[str, bytes], str]) -> None:
    assert httpx.get(put("ten", b"0123456789"), headers={"Range": "bytes=10-"}).status_code == 416


def test_a_player_reads_a_video_and_jumps_in_it(
    put: Callable[[str, bytes], str], tmp_path: Path
) -> None:
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:  # its index lies at the end: the player has to seek
        stream = container.add_stream("mpeg4", rate=Fraction(25))
        stream.width = stream.height = 128
        stream.bit_rate = 2_000_000
        noise = np.random.default_rng(0)
        for _ in range(100):
            picture = noise.integers(0, 255, (128, 128, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())

    with av.open(put("video.mp4", path.read_bytes())) as container:
        assert container.streams.video[0].frames == 100
        container.seek(3_000_000)
        assert next(container.decode(video=0)).time >= 2
        container.seek(0)
        assert sum(1 for _ in container.decode(video=0)) == 100


def test_a_page_of_any_origin_may_read_what_it_has_the_address_of(
    put: Callable[[str, bytes], str],
) -> None:
    url = put("page.mp4", b"video")
    asks = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "range"}
    origin = {"Origin": "https://example.com"}

    assert httpx.get(url, headers=origin).headers["Access-Control-Allow-Origin"]
    allowed = httpx.options(url, headers={**origin, **asks})
    assert (allowed.status_code, allowed.headers["Access-Control-Allow-Headers"]) == (200, "range")


# What a stranger does


def test_who_does_not_know_the_key_is_refused(
    store: ObjectStore, put: Callable[[str, bytes], str]
) -> None:
    url = put("secret.mp4", b"x")
    bare = url.partition("?")[0]
    calls = [
        ("GET", bare),
        ("GET", f"{store.endpoint_url}/avatars"),
        ("GET", store.endpoint_url),
        ("PUT", f"{store.endpoint_url}/avatars/other"),
        ("DELETE", bare),
        ("POST", f"{store.endpoint_url}/moto-api/reset"),
        ("GET", url.replace(KEY, "another-key")),
        ("GET", f"{bare}?X-Amz-Credential="),
    ]

    answers = {call: httpx.request(*call).status_code for call in calls}

    assert set(answers.values()) == {403}, answers
    assert httpx.get(url).content == b"x"


def test_a_client_with_another_key_is_told_so(store: ObjectStore) -> None:
    other = store.bucket.model_copy(update={"access_key_id": "other"})

    with pytest.raises(UploadError, match="InvalidAccessKeyId"):
        Storage(other).check()


def test_motos_own_commands_are_not_served_to_who_knows_the_key(
    store: ObjectStore, put: Callable[[str, bytes], str]
) -> None:
    url = put("kept.mp4", b"x")

    httpx.post(f"{store.endpoint_url}/moto-api/reset?X-Amz-Credential={KEY}")

    assert httpx.get(url).content == b"x"


def test_other_addresses_of_this_machine_do_not_lead_to_it(store: ObjectStore) -> None:
    port = urlsplit(store.endpoint_url).port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


# Its life


class Served:
    """`python -m local_endpoint` without workers, which ends with the test."""

    def __init__(self, state: Path, **environment: str) -> None:
        self.state = state
        state.mkdir(exist_ok=True)
        options = ["--port", "0", "--workers", "0", "--state", str(state)]
        with (state / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "local_endpoint", *options],
                cwd=ROOT,
                env={"PATH": os.defpath, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self) -> None:
        while "endpoint http" not in (log := (self.state / "log").read_text()):
            assert self.process.poll() is None, log
            time.sleep(0.05)

    def bucket(self) -> BucketSettings:
        return BucketSettings.model_validate_json((self.state / "bucket.json").read_text())


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    all_served = []

    def serve(**environment: str) -> Served:
        served = Served(tmp_path / "state", **environment)
        all_served.append(served)
        served.wait_until_ready()
        return served

    yield serve
    for served in all_served:
        served.process.kill()
        served.process.wait()


def wait_until_refused(url: str) -> None:
    def is_refused() -> bool:
        try:
            httpx.get(url)
        except httpx.ConnectError:
            return True
        except httpx.TransportError:
            return False
        return False

    wait_until(is_refused)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_store_ends_with_its_endpoint_however_that_ends(
    serve: Callable[..., Served], number: signal.Signals
) -> None:
    served = serve()
    [process] = psutil.Process(served.process.pid).children()
    url = served.bucket().endpoint_url or ""
    assert httpx.get(url).status_code == 403

    served.process.send_signal(number)
    served.process.wait()

    wait_until_refused(url)
    with suppress(psutil.NoSuchProcess):
        process.wait(10)
    assert (served.state / "bucket.json").exists() == (number == signal.SIGKILL)


def test_after_a_kill_the_store_has_its_address_again_and_is_empty(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    killed = serve()
    bucket = killed.bucket()
    path = tmp_path / "content"
    path.write_bytes(b"x")
    Storage(bucket).put(path, "1.mp4", content_type="video/mp4")
    killed.process.kill()
    killed.process.wait()
    wait_until_refused(bucket.endpoint_url or "")

    later = serve().bucket()

    assert later == bucket
    assert Storage(later).head("1.mp4") is None


def test_an_endpoint_with_a_bucket_of_the_operators_has_no_store(
    serve: Callable[..., Served],
) -> None:
    killed = serve()
    killed.process.kill()
    killed.process.wait()

    served = serve(BUCKET_ENDPOINT_URL="https://s3.example.com")

    assert not (served.state / "bucket.json").exists()
    assert psutil.Process(served.process.pid).children() == []


def test_two_endpoints_do_not_share_a_store() -> None:
    with (
        LocalEndpoint(with_object_store=True) as first,
        LocalEndpoint(with_object_store=True) as second,
    ):
        theirs = first.object_store.bucket.model_copy(
            update={"access_key_id": second.object_store.bucket.access_key_id}
        )
        Storage(first.object_store.bucket).check()
        with pytest.raises(UploadError, match="InvalidAccessKeyId"):
            Storage(theirs).check()


def test_a_missing_moto_is_told_with_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ModuleNotFoundError, match="extra `local`"):
        LocalEndpoint(tmp_path, with_object_store=True).start()
    LocalEndpoint(tmp_path).__enter__().stop()  # neither port nor directory is held any more
