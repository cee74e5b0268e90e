"""Inputs that go through a bucket of the caller's own."""

import base64
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from avatar_client import BucketSettings
from avatar_client.contract import InvalidInputError, StorageNotConfiguredError, UploadError
from avatar_client.upload import upload
from tests.avatar_client.answers import IMAGE, QUEUED, RUN
from tests.conftest import BucketServer
from tests.support.scripted_server import ScriptedServer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bucket(object_store: BucketServer) -> BucketSettings:
    return object_store.settings.model_copy(update={"prefix": "from-here"})


def test_the_larger_file_goes_to_the_bucket_if_both_do_not_fit(
    make_client: Callable[..., Any], server: ScriptedServer, bucket: BucketSettings
) -> None:
    server.on(RUN, QUEUED)
    client = make_client(f"{server.origin}/v2/local", uploads=bucket)
    speech = bytes(range(256)) * 24_000

    client.submit(b"p" * 3_000_000, speech)

    sent = server.asked(RUN)[0]
    assert len(sent.body) < 10_000_000
    assert sent.json["input"]["image"] == base64.b64encode(b"p" * 3_000_000).decode()
    address = sent.json["input"]["audio"]
    assert f"/{bucket.name}/from-here/inputs/" in address
    with urlopen(address) as answer:
        assert answer.read() == speech


def test_a_file_is_uploaded_as_its_bytes_are(bucket: BucketSettings, tmp_path: Path) -> None:
    path = tmp_path / "speech.wav"
    path.write_bytes(b"sound")
    for content in (path, b"sound"):
        with urlopen(upload(content, bucket)) as answer:
            assert answer.read() == b"sound"


def test_two_uploads_have_two_keys_that_say_nothing_of_the_file(
    bucket: BucketSettings, tmp_path: Path
) -> None:
    path = tmp_path / "my-voice.wav"
    path.write_bytes(b"sound")
    first, second = upload(path, bucket), upload(path, bucket)
    assert first.partition("?")[0] != second.partition("?")[0]
    assert "my-voice" not in first


def test_a_public_bucket_needs_no_signature(bucket: BucketSettings) -> None:
    public = bucket.model_copy(update={"public_base_url": "https://cdn.example.com/"})
    address = upload(b"sound", public)
    assert address.startswith("https://cdn.example.com/from-here/inputs/")
    assert "?" not in address


def test_a_file_that_went_away_is_named(
    make_client: Callable[..., Any],
    server: ScriptedServer,
    bucket: BucketSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "speech.wav"
    path.write_bytes(bytes(8_000_000))
    client = make_client(f"{server.origin}/v2/local", uploads=bucket)
    size = path.stat()
    monkeypatch.setattr(Path, "stat", lambda *_, **__: size)
    path.unlink()
    with pytest.raises(InvalidInputError, match="cannot be read") as caught:
        client.submit(IMAGE, path)
    assert caught.value.field == "audio"
    assert server.requests == []


def test_a_bucket_that_refuses_is_named_by_its_code_alone(bucket: BucketSettings) -> None:
    with pytest.raises(UploadError, match="NoSuchBucket") as caught:
        upload(b"sound", bucket.model_copy(update={"name": "no-such-bucket"}))
    assert "127.0.0.1" not in str(caught.value)


def test_a_store_that_is_not_there_is_an_upload_error(
    bucket: BucketSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    with pytest.raises(UploadError, match="EndpointConnectionError"):
        upload(b"sound", bucket.model_copy(update={"endpoint_url": "http://127.0.0.1:9"}))


def test_a_bucket_that_cannot_be_told_is_refused(bucket: BucketSettings) -> None:
    with pytest.raises(StorageNotConfiguredError):
        upload(b"sound", bucket.model_copy(update={"name": None}))


def test_without_boto3_an_upload_says_what_to_install() -> None:
    script = (
        "import sys\n"
        "sys.modules['boto3'] = None\n"
        "from avatar_client import AvatarEndpoint, BucketSettings, EndpointError\n"
        "bucket = BucketSettings(endpoint_url='https://s', access_key_id='a', "
        "secret_access_key='b', name='c')\n"
        "endpoint = AvatarEndpoint('abc', 'key', bucket)\n"
        "try:\n"
        f"    endpoint.request({IMAGE!r}, bytes(8_000_000))\n"
        "except EndpointError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "an upload needs boto3: pip install 'avatar-client[uploads]'\n"
