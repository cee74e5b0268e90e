"""Files become objects, and what a store answers becomes an error or not."""

import gc
import json
import re
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from avatar_client.contract import bucket as stores
from avatar_client.contract.job_errors import (
    UploadError,
)
from avatar_client.upload import upload
from tests.conftest import BucketServer, MediaServer
from tests.support.store_proxy import Proxy, bucket_at, headers_of
from tests.support.waiting import AT_ONCE_SECONDS
from worker.media import store_client
from worker.media.storage import ObjectExistsError, Storage
from worker.media.store_client import Patience

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


def test_a_store_keeps_nothing_of_a_job_that_is_over(
    bucket: Callable[..., Any], video: Path
) -> None:
    class Job:
        def __init__(self) -> None:
            self.store = Storage(bucket())

        def check(self) -> None: ...

    job = Job()
    patience = Patience(check=job.check)
    job.store.put(video, "avatar/1.mp4", content_type="video/mp4", patience=patience)
    still_there = weakref.ref(job)
    del job, patience
    gc.collect()
    assert still_there() is None


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
    proxy.failures = [60.0] * 3
    began = time.monotonic()

    with pytest.raises(UploadError, match="ReadTimeoutError"):
        store.put(video, "x.mp4", content_type="video/mp4")

    assert time.monotonic() - began < AT_ONCE_SECONDS


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
    store_client.shared_session.cache_clear()
    try:
        Storage(bucket()).put(video, "plain.mp4", content_type="video/mp4")
        assert upload(b"sound", bucket()).startswith(bucket().endpoint_url)
    finally:
        store_client.shared_session.cache_clear()


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
