"""Where a bucket is, and where in it an object lies. tests/media/test_storage.py asks boto3."""

from typing import Any

import pytest

from avatar_client.contract import InvalidInputError, StorageNotConfiguredError, UploadError
from avatar_client.contract.bucket import BucketLocation, BucketSettings, locate, upload_error


def bucket_at(endpoint_url: Any, **options: Any) -> BucketSettings:
    keys = {"access_key_id": "id", "secret_access_key": "hush-hush"}
    return BucketSettings(endpoint_url=endpoint_url, **keys, **options)


@pytest.mark.parametrize(
    ("bucket", "place"),
    [
        (
            bucket_at("https://videos.s3.us-west-2.amazonaws.com"),
            ("https://s3.us-west-2.amazonaws.com/", "us-west-2", "videos"),
        ),
        (
            bucket_at(f"https://{'0a' * 16}.r2.cloudflarestorage.com/videos"),
            (f"https://{'0a' * 16}.r2.cloudflarestorage.com/", "auto", "videos"),
        ),
        (
            bucket_at("http://127.0.0.1:9000", name="videos", region="here"),
            ("http://127.0.0.1:9000/", "here", "videos"),
        ),
        (
            bucket_at("https://ref.example.co/storage/v1/s3", name="videos"),
            ("https://ref.example.co/storage/v1/s3", "us-east-1", "videos"),
        ),
    ],
)
def test_a_bucket_is_found_by_its_name_or_in_its_endpoint(
    bucket: BucketSettings, place: tuple[str, str, str]
) -> None:
    assert locate(bucket) == BucketLocation(*place)


@pytest.mark.parametrize("endpoint", ["minio.example.com", "https://", "https://minio.example.com"])
def test_a_bucket_that_cannot_be_told_is_the_fault_of_who_named_it(endpoint: Any) -> None:
    with pytest.raises(StorageNotConfiguredError):
        locate(bucket_at(endpoint))
    with pytest.raises(InvalidInputError) as caught:
        locate(bucket_at(endpoint, from_client=True))
    field = (
        "s3Config.bucketName"
        if endpoint.endswith(".com") and "//" in endpoint
        else ("s3Config.endpointUrl")
    )
    assert caught.value.field == field


def test_a_key_lies_below_the_prefix_and_empty_parts_leave_no_trace() -> None:
    assert bucket_at("https://s").key("a", None, "b") == "a/b"
    assert bucket_at("https://s", prefix="/p/q/").key(None, "b") == "p/q/b"


def test_a_public_address_is_quoted_and_a_private_bucket_has_none() -> None:
    public = bucket_at("https://s", public_base_url="https://cdn.example.com/x/")
    assert public.public_url("a b/c.mp4") == "https://cdn.example.com/x/a%20b/c.mp4"
    assert bucket_at("https://s").public_url("a") is None


def test_a_hostile_store_cannot_write_into_a_message() -> None:
    error = upload_error(ValueError("hush"), "Not\nACode https://evil.example/?x=" + "y" * 500)
    assert isinstance(error, UploadError)
    assert error.message.startswith("the object store answered NotACodehttpsevil.examplex")
    assert len(error.message) < 100
    assert "hush" not in upload_error(ValueError("hush")).message
