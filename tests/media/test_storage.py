import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import boto3
import pytest
import requests
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from avatar_client.contract import bucket as stores
from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import (
    InputUrlBlockedError,
    InvalidInputError,
    StorageNotConfiguredError,
    UploadError,
)
from avatar_client.contract.request import KEY_PATTERN, OutputOptions
from avatar_client.upload import upload
from tests.conftest import BucketServer, MediaServer
from tests.support.scripted_server import Answer, ScriptedServer
from worker.media import storage, store_http
from worker.media.storage import ObjectExistsError, ObjectKeys, Patience, Storage


def bucket_at(endpoint_url: Any, **options: Any) -> BucketSettings:
    """Settings of a bucket somewhere; the keys are those of the test server."""
    defaults = {"access_key_id": "test-access-key", "secret_access_key": "test-secret-key"}
    return BucketSettings(**{"endpoint_url": endpoint_url, **defaults, **options})


@pytest.fixture
def bucket(object_store: BucketServer) -> Callable[..., Any]:
    """The settings of the test server's bucket; `bucket(name=...)` changes them."""

    def settings(**options: Any) -> BucketSettings:
        return bucket_at(object_store.endpoint_url, **{"name": object_store.bucket, **options})

    return settings


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"not really a video" * 1000)
    return path


class Proxy:
    """In front of the test server: keeps what passes, and does wrong when told to."""

    def __init__(self, target: Any) -> None:
        self.seen: list[tuple[str, str, Any]] = []  # (method, path, headers)
        self.failures: list[
            Any
        ] = []  # for the next requests: (status, code of the store) or seconds to wait
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.seen.append((self.command, self.path, dict(self.headers)))
                failure = proxy.failures.pop(0) if proxy.failures else 0
                if isinstance(failure, tuple):
                    status, content = (
                        failure[0],
                        f"<Error><Code>{failure[1]}</Code></Error>".encode(),
                    )
                    headers: Mapping[str, str] = {}
                else:
                    time.sleep(failure or 0)
                    answer = requests.request(
                        self.command, target + self.path, headers=dict(self.headers), data=body
                    )
                    status, content, headers = answer.status_code, answer.content, answer.headers
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower().startswith("x-amz") or name.lower() in ("content-type", "etag"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def proxy(object_store: BucketServer) -> Iterator[Proxy]:
    proxy = Proxy(object_store.endpoint_url)
    yield proxy
    proxy.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts, and short ones."""
    monkeypatch.setattr(store_http, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.0)


# What is stored


def test_what_was_put_can_be_fetched_by_anyone_with_the_url(
    bucket: Callable[..., Any], video: Path
) -> None:
    store = Storage(bucket())

    store.put(video, "avatar/1.mp4", content_type="video/mp4", metadata={"seed": 7})
    url = store.url("avatar/1.mp4", 60)

    answer = requests.get(url)
    assert answer.status_code == 200
    assert answer.content == video.read_bytes()
    assert answer.headers["Content-Type"] == "video/mp4"


def test_the_url_is_signed_for_as_long_as_asked(bucket: Callable[..., Any]) -> None:
    query = parse_qs(urlsplit(Storage(bucket()).url("a/b.mp4", 1234)).query)

    assert query["X-Amz-Expires"] == ["1234"]
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert query["X-Amz-SignedHeaders"] == ["host"]


def test_the_end_of_the_url_is_told(bucket: Callable[..., Any]) -> None:
    ends = Storage(bucket()).expires_at(3600)

    assert ends is not None
    assert ends.timestamp() == pytest.approx(time.time() + 3600, abs=5)


def test_a_public_bucket_gives_a_plain_address_that_does_not_end(
    bucket: Callable[..., Any],
) -> None:
    store = Storage(bucket(public_base_url="https://cdn.example.com/videos/"))

    assert store.url("avatar/1.mp4", 60) == "https://cdn.example.com/videos/avatar/1.mp4"
    assert store.expires_at(60) is None


def test_a_stored_object_tells_its_metadata(bucket: Callable[..., Any], video: Path) -> None:
    store = Storage(bucket())
    metadata = {"seed": 1, "warnings": ['zwei  Räume, "quoted" ☃'], "fps": 12.5, "nothing": None}

    store.put(video, "metadata.mp4", content_type="video/mp4", metadata=metadata)
    found = store.head("metadata.mp4")

    assert found is not None
    assert found.metadata == metadata
    assert found.size_bytes == video.stat().st_size
    assert store.head("other.mp4") is None


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=20), st.integers() | st.text(max_size=40), max_size=8))
def test_any_metadata_survives_as_a_header(object_store: BucketServer, metadata: Any) -> None:
    assume(len(json.dumps(metadata)) < 1800)
    store = Storage(bucket_at(object_store.endpoint_url, name=object_store.bucket))

    store.put(Path(__file__), "any.mp4", content_type="video/mp4", metadata=metadata)

    found = store.head("any.mp4")
    assert found is not None
    assert found.metadata == metadata


def test_an_object_of_other_origin_has_no_metadata(
    bucket: Callable[..., Any], object_store: BucketServer
) -> None:
    store = Storage(bucket())
    for values in ({}, {"avatar-metadata": "{broken"}, {"avatar-metadata": "[1]"}):
        object_store.client.put_object(
            Bucket=object_store.bucket, Key="foreign.mp4", Body=b"x", Metadata=values
        )
        found = store.head("foreign.mp4")
        assert found is not None
        assert found.metadata == {}


def test_metadata_that_does_not_fit_is_refused_before_anything_is_sent(
    proxy: Proxy, video: Path
) -> None:
    store = Storage(bucket_at(proxy.url, name="avatars"))

    with pytest.raises(ValueError, match="1800"):
        store.put(video, "x.mp4", content_type="video/mp4", metadata={"x": "y" * 1800})
    assert proxy.seen == []


def test_a_file_is_one_request_without_checksums(proxy: Proxy, video: Path) -> None:
    store = Storage(bucket_at(proxy.url, name="avatars"))

    store.put(video, "plain.mp4", content_type="video/mp4", metadata={"seed": 7})

    assert [(method, path) for method, path, _ in proxy.seen] == [("PUT", "/avatars/plain.mp4")]
    headers = {name.lower(): value for name, value in proxy.seen[0][2].items()}
    assert headers["content-type"] == "video/mp4"
    assert headers["x-amz-meta-avatar-metadata"] == '{"seed":7}'
    assert not [name for name in headers if "checksum" in name or name == "x-amz-trailer"]
    assert "content-encoding" not in headers


def test_a_large_file_goes_in_parts_without_checksums(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "MULTIPART_BYTES", 6 * 2**20)
    path = tmp_path / "large.mp4"
    path.write_bytes(bytes(17 * 2**20))
    store = Storage(bucket_at(proxy.url, name="avatars"))

    store.put(path, "large.mp4", content_type="video/mp4", metadata={"seed": 7})

    assert sum(method == "PUT" for method, _, _ in proxy.seen) == 3  # of 8 MiB at most
    names = {name.lower() for _, _, headers in proxy.seen for name in headers}
    assert not [name for name in names if "checksum" in name]
    found = store.head("large.mp4")
    assert found is not None
    assert (found.size_bytes, found.metadata) == (17 * 2**20, {"seed": 7})
    assert requests.get(store.url("large.mp4", 60)).headers["Content-Type"] == "video/mp4"


def test_looking_for_an_object_does_not_fetch_it(
    bucket: Callable[..., Any], tmp_path: Path
) -> None:
    store = Storage(bucket())
    path = tmp_path / "large.mp4"
    path.write_bytes(bytes(30 * 2**20))
    store.put(path, "looked-at.mp4", content_type="video/mp4")

    for _ in range(20):  # more than the client's pool of connections
        found = store.head("looked-at.mp4")
        assert found is not None
        assert found.size_bytes == 30 * 2**20


# What goes wrong


@pytest.mark.parametrize("failure", [(500, "InternalError"), (503, "SlowDown"), 0.6])
def test_two_failures_are_survived(
    proxy: Proxy, video: Path, hasty: None, failure: float | tuple[int, str]
) -> None:
    store = Storage(bucket_at(proxy.url, name="avatars"))
    proxy.failures = [failure, failure]

    store.put(video, "third-time.mp4", content_type="video/mp4", patience=Patience(60))

    assert requests.get(store.url("third-time.mp4", 60)).content == video.read_bytes()


def test_a_store_that_keeps_failing_is_named_by_its_code(
    proxy: Proxy, video: Path, hasty: None
) -> None:
    store = Storage(bucket_at(proxy.url, name="avatars"))
    for act in (
        lambda: store.put(video, "x.mp4", content_type="video/mp4"),
        lambda: store.head("x.mp4"),
        store.check,
    ):
        proxy.failures = [(503, "SlowDown")]
        with pytest.raises(UploadError, match="SlowDown") as caught:
            act()
        assert proxy.url not in str(caught.value)
        assert proxy.failures == []  # one attempt: nobody said to be patient


def test_a_store_that_does_not_answer_ends_after_its_attempts(
    proxy: Proxy, video: Path, hasty: None
) -> None:
    store = Storage(bucket_at(proxy.url, name="avatars"))
    proxy.failures = [5.0] * 3
    began = time.monotonic()

    with pytest.raises(UploadError, match="ReadTimeoutError"):
        store.put(video, "x.mp4", content_type="video/mp4")

    assert time.monotonic() - began < 10


def test_a_store_that_is_not_there_is_an_upload_error(video: Path, hasty: None) -> None:
    store = Storage(bucket_at("http://127.0.0.1:9", name="avatars"))

    with pytest.raises(UploadError) as caught:
        store.put(video, "x.mp4", content_type="video/mp4")
    assert "127.0.0.1" not in str(caught.value)
    assert caught.value.retryable


def test_a_redirect_of_the_store_is_not_followed(
    proxy: Proxy, video: Path, hasty: None, media_server: MediaServer
) -> None:
    answer = media_server.add("/avatars/x.mp4", status=307, location=proxy.url + "/stolen")
    store = Storage(bucket_at(answer.removesuffix("/avatars/x.mp4"), name="avatars"))

    with pytest.raises(UploadError):
        store.head("x.mp4")
    assert proxy.seen == []


def test_a_hostile_store_cannot_write_into_the_message(proxy: Proxy, hasty: None) -> None:
    store = Storage(bucket_at(proxy.url, name="avatars", from_client=True), allow_private=True)
    proxy.failures = [(400, "Not\nACode https://evil.example/?x=" + "y" * 500)]

    with pytest.raises(UploadError) as caught:
        store.head("x.mp4")
    assert re.fullmatch(r"the object store answered [A-Za-z0-9.]{1,64}", caught.value.message)
    assert caught.value.field == "s3Config"


@pytest.fixture(scope="module")
def guarded() -> Iterator[tuple[str, dict[str, tuple[Any, Any]]]]:
    """A store that checks keys and rights, and the keys of one who may write but not list."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    root: Any = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=url, **root).create_bucket(Bucket="guarded")
    iam = boto3.client("iam", endpoint_url=url, **root)
    keys = {}
    for user, actions in {"writer": ["s3:PutObject", "s3:GetObject"], "nobody": ["s3:x"]}.items():
        statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        iam.create_user(UserName=user)
        iam.put_user_policy(UserName=user, PolicyName="p", PolicyDocument=json.dumps(policy))
        created = iam.create_access_key(UserName=user)["AccessKey"]
        keys[user] = (created["AccessKeyId"], created["SecretAccessKey"])
    yield url, keys
    server.stop()


@pytest.fixture
def guarded_store(
    guarded: tuple[str, dict[str, tuple[Any, Any]]],
) -> Iterator[tuple[str, dict[str, tuple[Any, Any]]]]:
    """The same, while it checks: the switch is one for all servers of the process."""
    requests.post(f"{guarded[0]}/moto-api/reset-auth", data=b"0")
    yield guarded
    requests.post(f"{guarded[0]}/moto-api/reset-auth", data=b"inf")


def test_only_the_rights_to_put_and_get_are_needed(
    guarded_store: tuple[str, dict[str, tuple[Any, Any]]], video: Path
) -> None:
    url, keys = guarded_store
    key_id, secret = keys["writer"]
    store = Storage(bucket_at(url, name="guarded", access_key_id=key_id, secret_access_key=secret))

    store.check()
    assert store.head("1.mp4") is None
    store.put(video, "1.mp4", content_type="video/mp4")
    found = store.head("1.mp4")
    assert found is not None
    assert found.size_bytes == video.stat().st_size


def test_wrong_credentials_are_found_before_anything_is_generated(
    guarded_store: tuple[str, dict[str, tuple[Any, Any]]], video: Path
) -> None:
    url, keys = guarded_store
    for key_id, secret, code in [
        ("AKIAIOSFODNN7EXAMPLE", "x", "InvalidAccessKeyId"),
        (keys["writer"][0], "wrong", "SignatureDoesNotMatch"),
    ]:
        store = Storage(
            bucket_at(url, name="guarded", access_key_id=key_id, secret_access_key=secret)
        )
        for act in (store.check, lambda: store.head("1.mp4")):  # noqa: B023
            with pytest.raises(UploadError, match=code) as caught:
                act()
            assert key_id not in str(caught.value)
            assert secret not in str(caught.value).split()


def test_missing_rights_to_write_are_told_by_the_upload(
    guarded_store: tuple[str, dict[str, tuple[Any, Any]]], video: Path
) -> None:
    url, keys = guarded_store
    key_id, secret = keys["nobody"]
    store = Storage(bucket_at(url, name="guarded", access_key_id=key_id, secret_access_key=secret))

    with pytest.raises(UploadError, match="AccessDenied"):
        store.put(video, "1.mp4", content_type="video/mp4")


def test_a_bucket_that_does_not_exist_is_found_by_the_check(bucket: Callable[..., Any]) -> None:
    with pytest.raises(UploadError, match="NoSuchBucket"):
        Storage(bucket(name="no-such-bucket")).check()


def test_the_check_passes_and_leaves_nothing(
    bucket: Callable[..., Any], object_store: BucketServer
) -> None:
    before = object_store.keys()

    Storage(bucket(prefix="avatar")).check()

    assert object_store.keys() == before


# What a store demands


def headers_of(proxy: Proxy) -> list[dict[str, str]]:
    return [{name.lower(): value for name, value in seen[2].items()} for seen in proxy.seen]


def test_encryption_and_a_session_are_told_with_each_upload(proxy: Proxy, video: Path) -> None:
    store = Storage(
        bucket_at(
            proxy.url,
            name="avatars",
            server_side_encryption="aws:kms",
            kms_key_id="alias/videos",
            session_token="the-session",
        )
    )

    store.prove("avatar/1.mp4")
    store.put(video, "avatar/1.mp4", content_type="video/mp4")

    uploads = [
        told for told, seen in zip(headers_of(proxy), proxy.seen, strict=True) if seen[0] == "PUT"
    ]
    assert len(uploads) == 2
    for told in uploads:
        assert told["x-amz-server-side-encryption"] == "aws:kms"
        assert told["x-amz-server-side-encryption-aws-kms-key-id"] == "alias/videos"
    assert {
        told["x-amz-security-token"] for told in headers_of(proxy) if "authorization" in told
    } == {"the-session"}
    assert not [name for told in headers_of(proxy) for name in told if "acl" in name]


def test_a_key_of_kms_alone_means_its_kind_of_encryption(proxy: Proxy, video: Path) -> None:
    Storage(bucket_at(proxy.url, name="avatars", kms_key_id="k")).put(
        video, "1.mp4", content_type="video/mp4"
    )
    assert headers_of(proxy)[0]["x-amz-server-side-encryption"] == "aws:kms"


@pytest.mark.parametrize("threshold", [2**26, 2**10])
def test_checksums_are_sent_where_they_are_asked_for(
    proxy: Proxy, video: Path, monkeypatch: pytest.MonkeyPatch, threshold: int
) -> None:
    monkeypatch.setattr(stores, "MULTIPART_BYTES", threshold)
    store = Storage(bucket_at(proxy.url, name="avatars", checksums="when_supported"))

    store.put(video, "summed.mp4", content_type="video/mp4")

    sent = [
        told for told, seen in zip(headers_of(proxy), proxy.seen, strict=True) if seen[0] == "PUT"
    ]
    assert all(
        [name for name in told if "checksum-crc32" in name] or "x-amz-trailer" in told
        for told in sent
    )
    assert requests.get(store.url("summed.mp4", 60)).content == video.read_bytes()


@pytest.mark.parametrize(
    "environment",
    [
        {"AWS_PROFILE": "not-there"},
        {"AWS_MAX_ATTEMPTS": "many", "AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported"},
        {"AWS_USE_FIPS_ENDPOINT": "true", "AWS_USE_DUALSTACK_ENDPOINT": "true"},
        {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_SESSION_TOKEN": "another's"},
        {"AWS_S3_US_EAST_1_REGIONAL_ENDPOINT": "odd", "AWS_CA_BUNDLE": "/not/there"},
        {"AWS_CONFIG_FILE": "{file}", "AWS_SHARED_CREDENTIALS_FILE": "{file}"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_what_is_set_for_other_tools_of_aws_changes_nothing(
    bucket: Callable[..., Any],
    video: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str],
) -> None:
    file = tmp_path / "config"
    file.write_text("[default]\ns3 =\n  addressing_style = virtual\nregion = x\n[broken")
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(file=file))
    storage.shared_session.cache_clear()
    try:
        Storage(bucket()).put(video, "plain.mp4", content_type="video/mp4")
        assert upload(b"sound", bucket()).startswith(bucket().endpoint_url)
    finally:
        storage.shared_session.cache_clear()


# What is proven before anything is made


@pytest.fixture
def no_proofs() -> Iterator[None]:
    """Nothing is believed of any store, before and after."""
    storage.proofs.clear()
    storage.read_stores.clear()
    yield
    storage.proofs.clear()
    storage.read_stores.clear()


def calls_of(proxy: Proxy) -> list[str]:
    return [method for method, path, _ in proxy.seen if "object-lock" not in path]


def test_a_store_takes_an_object_and_gives_it_out_once_in_some_minutes(
    proxy: Proxy, object_store: BucketServer, no_proofs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = object_store.keys()
    for _ in range(3):  # a job each
        Storage(bucket_at(proxy.url, name="avatars")).prove("avatar/7/1.mp4")
    assert calls_of(proxy) == ["PUT", "GET", "DELETE"]
    assert {path.partition("/.write-test-")[0] for _, path, _ in proxy.seen} >= {
        "/avatars/avatar/7"
    }
    assert proxy.seen[-2][2]["Range"] == "bytes=0-0"
    assert object_store.keys() == before

    Storage(bucket_at(proxy.url, name="avatars")).prove("avatar/8/1.mp4")
    Storage(bucket_at(proxy.url, name="avatars", secret_access_key="x")).prove("avatar/7/1.mp4")
    assert calls_of(proxy) == ["PUT", "GET", "DELETE"] * 3
    monkeypatch.setattr(storage, "PROOF_SECONDS", -1.0)
    Storage(bucket_at(proxy.url, name="avatars")).prove("b/1.mp4")
    Storage(bucket_at(proxy.url, name="avatars")).prove("b/1.mp4")
    assert calls_of(proxy) == ["PUT", "GET", "DELETE"] * 5


def test_a_store_that_takes_no_object_is_refused_before_anything_is_made(
    guarded_store: tuple[str, dict[str, Any]], no_proofs: None
) -> None:
    url, keys = guarded_store
    key_id, secret = keys["nobody"]
    store = Storage(bucket_at(url, name="guarded", access_key_id=key_id, secret_access_key=secret))
    for act in (lambda: store.prove("avatar/1.mp4"), store.check):
        with pytest.raises(UploadError, match="AccessDenied") as caught:
            act()
        assert not caught.value.retryable


def test_a_test_that_may_not_be_removed_is_written_once_in_a_workers_life(
    guarded_store: tuple[str, dict[str, Any]], no_proofs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, keys = guarded_store
    key_id, secret = keys["writer"]  # to put and to get, not to delete
    monkeypatch.setattr(storage, "PROOF_SECONDS", -1.0)
    bucket = bucket_at(url, name="guarded", access_key_id=key_id, secret_access_key=secret)
    for _ in range(3):
        Storage(bucket).prove("kept/1.mp4")
    root: Any = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    requests.post(f"{url}/moto-api/reset-auth", data=b"inf")
    listed = boto3.client("s3", endpoint_url=url, **root).list_objects_v2(
        Bucket="guarded", Prefix="kept/"
    )
    assert len(listed["Contents"]) == 1


def test_nothing_is_left_in_a_bucket_that_keeps_everything(
    object_store: BucketServer, bucket: Callable[..., Any], no_proofs: None, video: Path
) -> None:
    client = object_store.client
    client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
    retention = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
    client.put_object_lock_configuration(
        Bucket="locked",
        ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": retention},
    )

    store = Storage(bucket(name="locked", checksums="when_supported"))
    store.check()

    assert "Versions" not in client.list_object_versions(Bucket="locked")
    assert not client.list_multipart_uploads(Bucket="locked").get("Uploads")
    store.put(video, "1.mp4", content_type="video/mp4")


def test_of_a_bucket_with_versions_the_version_is_removed(
    object_store: BucketServer, bucket: Callable[..., Any], no_proofs: None
) -> None:
    client = object_store.client
    client.create_bucket(Bucket="versioned")
    client.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})

    Storage(bucket(name="versioned")).check()

    listed = client.list_object_versions(Bucket="versioned")
    assert not {"Versions", "DeleteMarkers"} & set(listed)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_address_that_cannot_be_read_is_an_error_with_its_cause(
    proxy: Proxy, no_proofs: None, status: int
) -> None:
    store = Storage(bucket_at(proxy.url, name="avatars"))
    proxy.failures = [(404, "NoSuchBucketConfiguration"), None, (status, "AccessDenied")]

    with pytest.raises(UploadError, match=f"cannot be read .* HTTP {status}") as caught:
        store.prove("avatar/1.mp4")

    assert not caught.value.retryable
    assert calls_of(proxy) == ["PUT", "GET", "DELETE"]  # removed all the same


def test_an_address_that_keeps_stumbling_says_nothing_against_the_bucket(
    proxy: Proxy, no_proofs: None, caplog: pytest.LogCaptureFixture
) -> None:
    store = Storage(bucket_at(proxy.url, name="avatars"))
    proxy.failures = [(404, "NoSuchBucketConfiguration"), None, (503, "SlowDown")]
    store.prove("avatar/1.mp4")
    assert "not known whether addresses can be read" in caplog.text
    assert calls_of(proxy) == ["PUT", "GET", "DELETE"]


def test_an_address_that_stumbles_is_asked_again(proxy: Proxy, no_proofs: None) -> None:
    store = Storage(bucket_at(proxy.url, name="avatars"))
    proxy.failures = [(404, "NoSuchBucketConfiguration"), None, (503, "SlowDown")]
    store.prove("avatar/1.mp4", Patience(60.0))
    assert calls_of(proxy) == ["PUT", "GET", "GET", "DELETE"]


def test_the_first_video_of_a_store_is_read_back_and_the_others_are_not(
    proxy: Proxy, no_proofs: None, video: Path
) -> None:
    for number in range(3):
        store = Storage(bucket_at(proxy.url, name="avatars"))
        store.put(video, f"{number}.mp4", content_type="video/mp4")
        store.read_back(f"{number}.mp4")
    assert calls_of(proxy) == ["PUT", "GET", "PUT", "PUT"]


# What is there already


def test_an_object_that_must_not_be_replaced_stays(bucket: Callable[..., Any], video: Path) -> None:
    store = Storage(bucket())
    store.put(video, "mine.mp4", content_type="video/mp4", metadata={"job": 1})
    with pytest.raises(ObjectExistsError) as caught:
        store.put(
            video, "mine.mp4", content_type="video/mp4", metadata={"job": 2}, only_if_absent=True
        )
    assert caught.value.field == "output.key"
    found = store.head("mine.mp4")
    assert found is not None
    assert found.metadata == {"job": 1}
    store.put(video, "mine.mp4", content_type="video/mp4", metadata={"job": 3})


def test_an_upload_whose_answer_was_lost_is_not_anothers(
    bucket: Callable[..., Any], video: Path
) -> None:
    store = Storage(bucket())
    for _ in range(2):
        store.put(
            video, "lost.mp4", content_type="video/mp4", metadata={"job": 1}, only_if_absent=True
        )


def test_a_store_that_does_not_know_the_condition_is_asked_without(
    proxy: Proxy, video: Path
) -> None:
    store = Storage(bucket_at(proxy.url, name="avatars"))
    proxy.failures = [(501, "NotImplemented")]
    store.put(video, "old-store.mp4", content_type="video/mp4", only_if_absent=True)
    assert [told.get("if-none-match") for told in headers_of(proxy)] == ["*", None]


# Where a bucket is


@pytest.mark.parametrize(
    ("endpoint", "host", "region"),
    [
        ("https://s3.amazonaws.com", "s3.amazonaws.com", "us-east-1"),
        ("https://s3.us-west-2.amazonaws.com", "s3.us-west-2.amazonaws.com", "us-west-2"),
        ("https://videos.s3.us-west-2.amazonaws.com/", "s3.us-west-2.amazonaws.com", "us-west-2"),
        ("https://videos.s3.amazonaws.com", "s3.amazonaws.com", "us-east-1"),
        ("https://s3-eu-west-1.amazonaws.com", "s3-eu-west-1.amazonaws.com", "eu-west-1"),
        (
            "https://s3.dualstack.eu-west-1.amazonaws.com",
            "s3.dualstack.eu-west-1.amazonaws.com",
            "eu-west-1",
        ),
        ("https://s3.cn-north-1.amazonaws.com.cn", "s3.cn-north-1.amazonaws.com.cn", "cn-north-1"),
        ("https://nyc3.digitaloceanspaces.com", "nyc3.digitaloceanspaces.com", "nyc3"),
        ("https://videos.nyc3.digitaloceanspaces.com", "nyc3.digitaloceanspaces.com", "nyc3"),
        ("https://s3.us-west-004.backblazeb2.com", "s3.us-west-004.backblazeb2.com", "us-west-004"),
        (
            f"https://{'0a' * 16}.r2.cloudflarestorage.com/videos",
            f"{'0a' * 16}.r2.cloudflarestorage.com",
            "auto",
        ),
        (
            f"https://{'0a' * 16}.eu.r2.cloudflarestorage.com",
            f"{'0a' * 16}.eu.r2.cloudflarestorage.com",
            "auto",
        ),
        ("https://storage.googleapis.com", "storage.googleapis.com", "auto"),
        ("https://videos.storage.googleapis.com", "storage.googleapis.com", "auto"),
        ("https://s3.fr-par.scw.cloud", "s3.fr-par.scw.cloud", "fr-par"),
        ("https://fsn1.your-objectstorage.com", "fsn1.your-objectstorage.com", "fsn1"),
        ("https://videos.fra1.cdn.digitaloceanspaces.com", "fra1.digitaloceanspaces.com", "fra1"),
        ("https://s3.gra.io.cloud.ovh.net", "s3.gra.io.cloud.ovh.net", "gra"),
        ("https://videos.s3.gra.perf.cloud.ovh.net", "s3.gra.perf.cloud.ovh.net", "gra"),
        ("https://s3.us-east-va.io.cloud.ovh.us", "s3.us-east-va.io.cloud.ovh.us", "us-east-va"),
        ("https://s3.eu-central-1.ionoscloud.com", "s3.eu-central-1.ionoscloud.com", "de"),
        (
            "https://s3-eu-central-2.ionoscloud.com",
            "s3-eu-central-2.ionoscloud.com",
            "eu-central-2",
        ),
        ("https://sos-ch-gva-2.exo.io", "sos-ch-gva-2.exo.io", "ch-gva-2"),
        ("https://videos.sos-de-fra-1.exo.io", "sos-de-fra-1.exo.io", "de-fra-1"),
        ("https://minio.example.com:9000", "minio.example.com:9000", "us-east-1"),
        ("https://s3.example.com", "s3.example.com", "us-east-1"),
    ],
)
@pytest.mark.parametrize("style", ["path", "virtual", "auto"])
def test_region_and_bucket_are_read_from_the_endpoint(
    endpoint: Any, host: str, region: str, style: Any
) -> None:
    named_in_endpoint = "//videos." in endpoint or endpoint.endswith("/videos")
    settings = bucket_at(
        endpoint, name=None if named_in_endpoint else "videos", addressing_style=style
    )

    store = Storage(settings)

    url = urlsplit(store.url("k/1.mp4", 60))
    place = (url.netloc, url.path)
    assert place == (
        (f"videos.{host}", "/k/1.mp4") if style == "virtual" else (host, "/videos/k/1.mp4")
    )
    assert parse_qs(url.query)["X-Amz-Credential"][0].split("/")[2] == region
    assert store.bucket_name == "videos"


@pytest.mark.parametrize("endpoint", ["https://s3-accelerate", "https://videos.s3-accelerate"])
def test_the_accelerated_host_of_aws_has_the_bucket_in_front(endpoint: str) -> None:
    settings = bucket_at(f"{endpoint}.amazonaws.com", name="videos", region="eu-west-1")

    url = urlsplit(Storage(settings).url("k/1.mp4", 60))

    assert (url.netloc, url.path) == ("videos.s3-accelerate.amazonaws.com", "/k/1.mp4")
    assert "eu-west-1" in url.query


@pytest.mark.parametrize(
    ("region", "host"),
    [
        ("eu-west-1", "s3.eu-west-1.amazonaws.com"),
        ("cn-north-1", "s3.cn-north-1.amazonaws.com.cn"),
    ],
)
def test_aws_needs_a_region_and_no_endpoint(region: str, host: str) -> None:
    url = urlsplit(Storage(bucket_at(None, name="videos", region=region)).url("k", 60))
    assert (url.netloc, url.path) == (host, "/videos/k")
    assert f"%2F{region}%2F" in url.query


@pytest.mark.parametrize("style", ["auto", "virtual"])
@pytest.mark.parametrize("port", ["", ":9000"])
def test_a_bucket_in_the_host_of_an_unknown_store_stays_there(style: str, port: str) -> None:
    endpoint = f"https://videos.s3.example.com{port}"
    url = urlsplit(Storage(bucket_at(endpoint, name="videos", addressing_style=style)).url("k", 60))
    assert (url.netloc, url.path) == (f"videos.s3.example.com{port}", "/k")


def test_a_store_whose_host_begins_like_the_bucket_is_named_by_the_style() -> None:
    settings = bucket_at("https://videos.example.com", name="videos", addressing_style="path")
    url = urlsplit(Storage(settings).url("k", 60))
    assert (url.netloc, url.path) == ("videos.example.com", "/videos/k")


def test_a_host_that_stands_for_a_bucket_unseen_is_found_out() -> None:
    with ScriptedServer() as server:
        body = "<Error><Code>NoSuchKey</Code><Key>videos/avatar/1.mp4</Key></Error>"
        server.on("GET /videos/avatar/1.mp4", Answer(status=404, body=body.encode()))
        with pytest.raises(UploadError, match="stands for the bucket") as caught:
            Storage(bucket_at(server.origin, name="videos")).head("avatar/1.mp4")
    assert not caught.value.retryable


@pytest.mark.parametrize("region", ["eu-ro-1", "us-ks-2"])
def test_runpods_network_volumes_are_refused_with_the_reason(region: str) -> None:
    endpoint = f"https://s3api-{region}.runpod.io"
    with pytest.raises(StorageNotConfiguredError, match="no presigned URLs"):
        Storage(bucket_at(endpoint, name="abc"))
    with pytest.raises(InvalidInputError, match="no presigned URLs") as caught:
        Storage(bucket_at(endpoint, name="abc", from_client=True))
    assert caught.value.field == "s3Config.endpointUrl"


def test_a_region_that_is_set_counts() -> None:
    url = Storage(bucket_at("https://s3.amazonaws.com", name="videos", region="eu-west-3")).url(
        "k", 60
    )

    assert "eu-west-3" in url


def test_a_bucket_may_be_named_twice() -> None:
    for endpoint in (
        "https://videos.s3.amazonaws.com",
        f"https://{'0a' * 16}.r2.cloudflarestorage.com/videos",
    ):
        path = urlsplit(Storage(bucket_at(endpoint, name="videos")).url("k", 60)).path
        assert path == "/videos/k"


def test_a_store_below_a_path_keeps_it() -> None:
    url = Storage(bucket_at("https://ref.example.co/storage/v1/s3", name="videos")).url("k", 60)

    assert urlsplit(url).path == "/storage/v1/s3/videos/k"


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        ("https://minio.example.com", None),
        ("https://s3.us-west-2.amazonaws.com", None),
        ("https://minio.example.com/a/b", None),
        ("minio.example.com", "videos"),
        ("https://", "videos"),
        ("https://minio.example.com", "not a name"),
    ],
)
def test_a_bucket_that_cannot_be_told_is_refused_at_once(endpoint: Any, name: Any) -> None:
    with pytest.raises(StorageNotConfiguredError):
        Storage(bucket_at(endpoint, name=name))
    if endpoint.startswith("https://m"):
        client = bucket_at(
            "https://127.0.0.1" + urlsplit(endpoint).path, name=name, from_client=True
        )
        with pytest.raises(InvalidInputError) as caught:
            Storage(client, allow_private=True)
        assert (caught.value.field or "").startswith("s3Config.")


def test_a_clients_store_must_be_public_and_https(bucket: Callable[..., Any]) -> None:
    for endpoint in ("http://93.184.216.34", "https://169.254.169.254", "https://127.0.0.1:9000"):
        with pytest.raises(InputUrlBlockedError) as caught:
            Storage(bucket_at(endpoint, name="videos", from_client=True))
        assert caught.value.field == "s3Config.endpointUrl"
    Storage(bucket(from_client=True), allow_private=True)
    Storage(bucket())  # the operator's own may be anywhere


# Where a video lies in a bucket


@pytest.mark.parametrize(
    ("prefix", "asked", "video", "others"),
    [
        ("avatar", {}, "avatar/job-1.mp4", "avatar/job-1"),
        ("avatar", {"prefix": "user/7"}, "avatar/user/7/job-1.mp4", "avatar/user/7/job-1"),
        ("avatar", {"key": "a/b.mp4"}, "avatar/chosen/a/b.mp4", "avatar/job-1"),
        ("avatar", {"prefix": "p", "key": "k"}, "avatar/chosen/p/k", "avatar/p/job-1"),
        ("", {}, "job-1.mp4", "job-1"),
        ("/a/b/", {}, "a/b/job-1.mp4", "a/b/job-1"),
    ],
)
def test_what_clients_name_lies_apart_from_what_bears_a_jobs_id(
    bucket: Callable[..., Any], prefix: str, asked: dict[str, Any], video: str, others: str
) -> None:
    store = Storage(bucket(prefix=prefix))

    keys = store.keys(OutputOptions(**asked), "job-1")

    assert keys == ObjectKeys(video, f"{others}.jpg", f"{others}.mp4.json")


def test_in_a_clients_own_bucket_all_lies_where_the_client_says(bucket: Callable[..., Any]) -> None:
    store = Storage(bucket(prefix="mine", from_client=True), allow_private=True)

    assert store.keys(OutputOptions(key="a.mp4"), "job-1").video == "mine/a.mp4"
    assert store.keys(OutputOptions(prefix="chosen"), "job-1").video == "mine/chosen/job-1.mp4"


KEYS = st.from_regex(KEY_PATTERN, fullmatch=True).filter(
    lambda key: len(key) <= 256 and not {".", ".."} & set(key.split("/"))
)


@given(prefix=st.none() | KEYS, key=st.none() | KEYS)
def test_no_key_leaves_the_operators_prefix(prefix: Any, key: Any) -> None:
    assume((prefix or "").split("/")[0] != "chosen")
    store = PREFIXED

    keys = store.keys(OutputOptions(prefix=prefix, key=key), "job-1")

    for full in (keys.video, keys.thumbnail, keys.result):
        assert full.startswith("avatar/")
        assert "//" not in full
        assert not {"", ".", ".."} & set(full.split("/"))
        assert unquote(urlsplit(store.url(full, 60)).path) == f"/videos/{full}"
    assert len({keys.video, keys.thumbnail, keys.result}) == 3
    assert keys.video.startswith("avatar/chosen/") == (key is not None)


PREFIXED = Storage(bucket_at("https://minio.example.com", name="videos", prefix="avatar"))


def test_no_prefix_leads_into_the_folder_of_chosen_keys() -> None:
    for prefix in ("chosen", "chosen/a"):
        with pytest.raises(InvalidInputError) as caught:
            PREFIXED.keys(OutputOptions(prefix=prefix), "job-1")
        assert caught.value.field == "output.prefix"
    assert PREFIXED.keys(OutputOptions(prefix="chosen-one"), "job-1")
