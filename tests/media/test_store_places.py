"""Where a bucket is, as boto3 sees it, and where in it a job's objects lie."""

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from avatar_client.contract.job_errors import (
    InputUrlBlockedError,
    InvalidInputError,
    StorageNotConfiguredError,
    UploadError,
)
from avatar_client.contract.request import KEY_PATTERN, OutputOptions
from tests.support.scripted_server import Answer, ScriptedServer
from tests.support.store_proxy import bucket_at
from worker.media.storage import ObjectKeys, Storage

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

    assert keys == ObjectKeys(video, f"{others}.jpg", f"{others}.gif", f"{others}.mp4.json")


def test_a_webm_is_called_one(bucket: Callable[..., Any]) -> None:
    keys = Storage(bucket(prefix="avatar")).keys(OutputOptions(format="webm"), "job-1")

    assert keys == ObjectKeys(
        "avatar/job-1.webm", "avatar/job-1.jpg", "avatar/job-1.gif", "avatar/job-1.webm.json"
    )


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

    for full in (keys.video, keys.thumbnail, keys.gif, keys.result):
        assert full.startswith("avatar/")
        assert "//" not in full
        assert not {"", ".", ".."} & set(full.split("/"))
        assert unquote(urlsplit(store.url(full, 60)).path) == f"/videos/{full}"
    assert len({keys.video, keys.thumbnail, keys.gif, keys.result}) == 4
    assert keys.video.startswith("avatar/chosen/") == (key is not None)


PREFIXED = Storage(bucket_at("https://minio.example.com", name="videos", prefix="avatar"))


def test_no_prefix_leads_into_the_folder_of_chosen_keys() -> None:
    for prefix in ("chosen", "chosen/a"):
        with pytest.raises(InvalidInputError) as caught:
            PREFIXED.keys(OutputOptions(prefix=prefix), "job-1")
        assert caught.value.field == "output.prefix"
    assert PREFIXED.keys(OutputOptions(prefix="chosen-one"), "job-1")
