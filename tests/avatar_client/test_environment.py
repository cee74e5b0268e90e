"""The environment as the client reads it. tests/test_settings.py has the worker's."""

import pytest

from avatar_client.environment import BucketVariables, ClientSettings, misspelt
from worker.settings import Settings

ENVIRONMENT = {
    "RUNPOD_API_KEY": "the-key",
    "RUNPOD_ENDPOINT_ID": "abc123",
    "BUCKET_ENDPOINT_URL": "https://s3.example.com",
    "BUCKET_ACCESS_KEY_ID": "id",
    "BUCKET_SECRET_ACCESS_KEY": "the-secret",
    "BUCKET_NAME": "inputs",
    "BUCKET_ADDRESSING_STYLE": "path",
    "BUCKET_REGION": "here",
    "BUCKET_PUBLIC_BASE_URL": "https://cdn.example.com",
}


def test_the_client_and_the_worker_read_one_bucket_from_the_same_variables() -> None:
    client, worker = ClientSettings.from_env(ENVIRONMENT), Settings.from_env(ENVIRONMENT)
    assert client.bucket == worker.bucket
    assert client.bucket is not None
    assert (client.bucket.name, client.bucket.prefix) == ("inputs", "avatar")
    assert (client.bucket.addressing_style, client.bucket.region) == ("path", "here")
    assert client.bucket.public_base_url == "https://cdn.example.com"


def test_what_is_wrong_with_a_worker_does_not_concern_its_client() -> None:
    environment = ENVIRONMENT | {"MAX_AUDIO_SECONDS": "a long time"}
    assert ClientSettings.from_env(environment).runpod_endpoint_id == "abc123"
    with pytest.raises(ValueError, match="MAX_AUDIO_SECONDS"):
        Settings.from_env(environment)


def test_no_key_stands_in_the_settings_text() -> None:
    text = repr(ClientSettings.from_env(ENVIRONMENT))
    assert "the-key" not in text
    assert "the-secret" not in text


def test_an_address_alone_is_no_bucket() -> None:
    assert (
        BucketVariables.from_env({"BUCKET_ENDPOINT_URL": "https://s3.example.com"}).bucket is None
    )


AWS = {
    "AWS_ACCESS_KEY_ID": "aws-id",
    "AWS_SECRET_ACCESS_KEY": "aws-secret",
    "AWS_SESSION_TOKEN": "aws-session",
}


def keys_of(environment: dict[str, str]) -> tuple[str | None, ...]:
    bucket = BucketVariables.from_env(environment).bucket
    assert bucket is not None
    token = bucket.session_token
    return (
        bucket.access_key_id,
        bucket.secret_access_key.get_secret_value(),
        token.get_secret_value() if token else None,
    )


def test_the_names_of_aws_are_the_second_choice_where_there_is_a_bucket() -> None:
    place = {"BUCKET_NAME": "videos", "AWS_REGION": "eu-west-1"}
    assert keys_of(AWS | place) == ("aws-id", "aws-secret", "aws-session")
    bucket = BucketVariables.from_env(AWS | place).bucket
    assert bucket is not None
    assert (bucket.endpoint_url, bucket.region) == (None, "eu-west-1")
    # keys belong together, and a region to the store that it is of
    assert keys_of(AWS | ENVIRONMENT) == ("id", "the-secret", None)
    elsewhere = {"BUCKET_ENDPOINT_URL": "https://s3.example.com", "AWS_REGION": "eu-west-1"}
    bucket = BucketVariables.from_env(AWS | elsewhere).bucket
    assert bucket is not None
    assert bucket.region is None
    by_aws = {"BUCKET_NAME": "videos", "AWS_ENDPOINT_URL_S3": "https://s3.example.com"}
    bucket = BucketVariables.from_env(AWS | by_aws).bucket
    assert bucket is not None
    assert bucket.endpoint_url == "https://s3.example.com"


def test_the_names_of_aws_alone_are_no_bucket() -> None:
    found = BucketVariables.from_env(AWS | {"AWS_REGION": "eu-west-1"})
    assert found.bucket is None
    assert found.missing_bucket_variables == []


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"BUCKET_NAME": "v"}, ["ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY"]),
        ({"BUCKET_REGION": "r", "BUCKET_NAME": "v"}, ["ACCESS_KEY_ID", "SECRET_ACCESS_KEY"]),
        (
            {"BUCKET_NAME": "v", "BUCKET_ACCESS_KEY_ID": "i", **AWS},
            ["ENDPOINT_URL", "SECRET_ACCESS_KEY"],
        ),
        ({"BUCKET_NAME": "v", **AWS}, ["ENDPOINT_URL"]),
        ({"BUCKET_KMS_KEY_ID": "k"}, ["ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY"]),
        ({"BUCKET_PREFIX": "avatar", "BUCKET_ADDRESSING_STYLE": "auto"}, []),  # the Hub's form
        ({}, []),
    ],
)
def test_half_a_bucket_names_what_is_missing(
    environment: dict[str, str], missing: list[str]
) -> None:
    found = BucketVariables.from_env(environment)
    assert found.bucket is None
    assert found.missing_bucket_variables == [f"BUCKET_{name}" for name in missing]


def test_an_empty_prefix_is_none_and_one_that_is_not_set_is_the_default() -> None:
    for given, prefix in (
        ({}, "avatar"),
        ({"BUCKET_PREFIX": ""}, ""),
        ({"BUCKET_PREFIX": "a"}, "a"),
    ):
        bucket = BucketVariables.from_env(ENVIRONMENT | given).bucket
        assert bucket is not None
        assert bucket.prefix == prefix


def test_what_was_pasted_loses_its_blanks() -> None:
    padded = {name: f" \t{value}\n" for name, value in ENVIRONMENT.items()}
    assert BucketVariables.from_env(padded) == BucketVariables.from_env(ENVIRONMENT)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("BUCKET_SECRET_ACESS_KEY", "BUCKET_SECRET_ACCESS_KEY"),
        ("BUCKET_SECRET_KEY", None),
        ("bucket_name", "BUCKET_NAME"),
        ("BUCKET_ENDPOINT", "BUCKET_ENDPOINT_URL"),
        ("MAX_AUDIO_SECOND", "MAX_AUDIO_SECONDS"),
        ("RUNPOD_LOG_LEVELS", None),
        ("PATH", None),
        ("AWS_REGION", None),
    ],
)
def test_a_name_that_is_nearly_a_settings_is_named(name: str, meant: str | None) -> None:
    found = misspelt(Settings, {"BUCKET_NAME": "x", name: "hush-hush"})
    assert found == ([f"{name} is not read; did you mean {meant}?"] if meant else [])
