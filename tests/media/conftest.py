"""Stores for the tests of storage: moto's server as it is, watched, and one that checks rights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from moto.server import ThreadedMotoServer

from avatar_client.contract.bucket import BucketSettings
from tests.conftest import BucketServer
from tests.support.store_proxy import Proxy, bucket_at
from worker.media import store_client, store_http


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


@pytest.fixture
def proxy(object_store: BucketServer) -> Iterator[Proxy]:
    proxy = Proxy(object_store.endpoint_url)
    yield proxy
    proxy.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts, and short ones."""
    monkeypatch.setattr(store_http, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(store_client, "FIRST_PAUSE_SECONDS", 0.0)


@pytest.fixture(scope="session")
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
