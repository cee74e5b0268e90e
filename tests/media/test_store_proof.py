"""What is proven of a bucket before anything is made."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests

from avatar_client.contract.job_errors import UploadError
from tests.conftest import BucketServer
from tests.support.store_proxy import Proxy, bucket_at, calls_of
from worker.media import store_proof
from worker.media.storage import Storage
from worker.media.store_client import Patience, StoreClient


@pytest.fixture
def no_proofs() -> Iterator[None]:
    """Nothing is believed of any store, before and after."""
    store_proof.proofs.clear()
    store_proof.read_stores.clear()
    yield
    store_proof.proofs.clear()
    store_proof.read_stores.clear()


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
    monkeypatch.setattr(store_proof, "PROOF_SECONDS", -1.0)
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
    monkeypatch.setattr(store_proof, "PROOF_SECONDS", -1.0)
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


@pytest.mark.parametrize("fault", [(503, "SlowDown"), (403, "RequestTimeTooSkewed")])
def test_an_address_that_stumbles_is_asked_again(
    proxy: Proxy, no_proofs: None, fault: tuple[int, str]
) -> None:
    store = Storage(bucket_at(proxy.url, name="avatars"))
    proxy.failures = [(404, "NoSuchBucketConfiguration"), None, fault]
    store.prove("avatar/1.mp4", Patience(60.0))
    assert calls_of(proxy) == ["PUT", "GET", "GET", "DELETE"]


@pytest.mark.parametrize("fault", [(500, "InternalError"), (503, "SlowDown")])
def test_a_test_is_removed_though_the_store_stumbles(
    proxy: Proxy, object_store: BucketServer, no_proofs: None, fault: tuple[int, str]
) -> None:
    before = object_store.keys()
    store = Storage(bucket_at(proxy.url, name="avatars"))
    proxy.failures = [(404, "NoSuchBucketConfiguration"), None, None, fault]
    store.prove("avatar/1.mp4")
    assert calls_of(proxy) == ["PUT", "GET", "DELETE", "DELETE"]
    assert object_store.keys() == before


def test_the_conditions_test_is_removed_though_the_store_stumbles(
    proxy: Proxy,
    object_store: BucketServer,
    no_proofs: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_proof, "conditional_stores", {})
    before = object_store.keys()
    client = StoreClient(bucket_at(proxy.url, name="avatars"))
    call, stumbles = client.s3.delete_object, iter([True, True])

    def delete(**arguments: Any) -> Any:
        if next(stumbles, False):
            proxy.failures = [(500, "InternalError")]
        return call(**arguments)

    monkeypatch.setattr(client.s3, "delete_object", delete)
    assert store_proof.honours_conditions(client, "avatar/1.claim", Patience())
    assert calls_of(proxy)[-3:] == ["DELETE"] * 3
    assert object_store.keys() == before


@pytest.mark.parametrize("place", ["put", "read"])
def test_a_stop_in_a_test_leaves_nothing(
    proxy: Proxy,
    object_store: BucketServer,
    no_proofs: None,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    class _Stop(BaseException):
        pass

    before = object_store.keys()
    client = StoreClient(bucket_at(proxy.url, name="avatars"))
    put = client.s3.put_object

    def stopped(*_: Any, **arguments: Any) -> Any:
        if "Body" in arguments:
            put(**arguments)
        raise _Stop

    if place == "put":
        monkeypatch.setattr(client.s3, "put_object", stopped)
    else:
        monkeypatch.setattr(store_proof, "_read_a_byte", stopped)
    with pytest.raises(_Stop):
        store_proof.prove(client, "avatar/1.mp4", Patience())
    assert object_store.keys() == before


def test_the_first_video_of_a_store_is_read_back_and_the_others_are_not(
    proxy: Proxy, no_proofs: None, video: Path
) -> None:
    for number in range(3):
        store = Storage(bucket_at(proxy.url, name="avatars"))
        store.put(video, f"{number}.mp4", content_type="video/mp4")
        store.read_back(f"{number}.mp4")
    assert calls_of(proxy) == ["PUT", "GET", "PUT", "PUT"]
