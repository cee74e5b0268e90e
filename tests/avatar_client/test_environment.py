"""The environment as the client reads it. tests/test_settings.py has the worker's."""

import pytest

from avatar_client.environment import BucketVariables, ClientSettings
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
