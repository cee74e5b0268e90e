import contextlib
import http.client
import io
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from hashlib import md5, sha256
from pathlib import Path

import av
import boto3
import botocore.auth
import numpy as np
import pytest
import requests
import uvicorn
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from botocore.httpchecksum import AwsChunkedWrapper, Crc32Checksum
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import UploadError
from local_endpoint import object_store
from local_endpoint.object_store import ObjectStore
from worker.media import storage
from worker.media.storage import Storage

KEYS = {"access_key_id": "test-access-key", "secret_access_key": "test-secret-key"}
MAX_BYTES = 20 * 2**20


class Server:
    """A store behind /s3 of an application that uvicorn serves on a free port."""

    def __init__(self, directory: Path, parser: str = "auto") -> None:
        self.directory = directory
        self.store = ObjectStore(directory, **KEYS, max_bytes_per_object=MAX_BYTES)
        app = FastAPI()
        app.mount("/s3", self.store.app)
        self._server = uvicorn.Server(uvicorn.Config(app, http=parser, log_level="error"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/s3"
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    def client(self, **options):
        """A client as boto3 makes it by default, with path-style addresses."""
        given = {
            "aws_access_key_id": KEYS["access_key_id"],
            "aws_secret_access_key": KEYS["secret_access_key"],
            "region_name": "us-east-1",
            "endpoint_url": self.url,
            "config": Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        }
        return boto3.client("s3", **{**given, **options})

    def storage(self, **options) -> Storage:
        given = {"endpoint_url": self.url, "name": "avatars", **KEYS}
        return Storage(BucketSettings(**{**given, **options}))

    def signed_headers(self, method: str, path: str, headers: dict[str, str]) -> dict[str, str]:
        """The headers, and those that sign them; `path` begins with the bucket."""
        request = AWSRequest(method, f"{self.url}/{path}", headers=headers)
        request.context["timestamp"] = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        request.headers["X-Amz-Date"] = request.context["timestamp"]
        signer = botocore.auth.S3SigV4Auth(Credentials(*KEYS.values()), "s3", "us-east-1")
        text = signer.string_to_sign(request, signer.canonical_request(request))
        signer._inject_signature_to_request(request, signer.signature(text, request))
        return dict(request.headers.items())

    def files(self) -> list[Path]:
        return sorted(path for path in self.directory.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("store"))
    yield server
    server.stop()


@pytest.fixture
def own_server(tmp_path) -> Iterator[Server]:
    """An empty one."""
    server = Server(tmp_path / "store")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def body_of(client, key: str, **options) -> bytes:
    with client.get_object(Bucket="avatars", Key=key, **options)["Body"] as body:
        return body.read()


def presigned(client, key: str, method: str = "get_object", seconds: int = 60, **params) -> str:
    # by default boto3 signs addresses, and nothing else, in a version that S3 has given up
    signer = boto3.client(
        "s3",
        endpoint_url=client.meta.endpoint_url,
        aws_access_key_id=KEYS["access_key_id"],
        aws_secret_access_key=KEYS["secret_access_key"],
        region_name="us-east-1",
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    return signer.generate_presigned_url(
        method, Params={"Bucket": "avatars", "Key": key, **params}, ExpiresIn=seconds
    )


def answer(url: str, method: str = "GET", headers=None, data=None):
    """Status, headers and body of a request that no library helps with."""
    request = urllib.request.Request(url, data, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def code_of(body: bytes) -> str:
    return re.search(rb"<Code>(\w+)</Code>", body)[1].decode()


@contextlib.contextmanager
def refused(code: str):
    with pytest.raises(ClientError) as caught:
        yield
    assert caught.value.response["Error"]["Code"] == code


@contextlib.contextmanager
def signing_at(moment: datetime):
    """What boto3 signs meanwhile is signed at another time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.auth, "get_current_datetime", lambda *_, **__: moment)
        yield


# Objects


def test_an_object_comes_back_with_all_that_was_said_of_it(client):
    put = client.put_object(
        Bucket="avatars",
        Key="a/b.mp4",
        Body=b"some bytes",
        ContentType="video/mp4",
        CacheControl="max-age=60",
        ContentDisposition='attachment; filename="b.mp4"',
        Metadata={"facts": '{"seed": 7,  "two": "spaces"}', "Other": "x"},
    )

    got = client.get_object(Bucket="avatars", Key="a/b.mp4")
    head = client.head_object(Bucket="avatars", Key="a/b.mp4")
    with got["Body"] as body:
        assert body.read() == b"some bytes"
    for found in (got, head):
        assert found["ContentType"] == "video/mp4"
        assert found["CacheControl"] == "max-age=60"
        assert found["ContentDisposition"] == 'attachment; filename="b.mp4"'
        assert found["Metadata"] == {"facts": '{"seed": 7,  "two": "spaces"}', "other": "x"}
        assert found["ContentLength"] == 10
        assert found["ETag"] == put["ETag"] == f'"{md5(b"some bytes").hexdigest()}"'
        assert abs(found["LastModified"] - datetime.now(UTC)) < timedelta(minutes=5)


def test_an_empty_object_is_an_object(client):
    client.put_object(Bucket="avatars", Key="empty", Body=b"")

    assert body_of(client, "empty") == b""
    assert client.head_object(Bucket="avatars", Key="empty")["ContentLength"] == 0


def test_a_second_object_takes_the_place_of_the_first(client):
    client.put_object(Bucket="avatars", Key="twice", Body=b"1" * 100, Metadata={"a": "1"})
    client.put_object(Bucket="avatars", Key="twice", Body=b"2")

    assert body_of(client, "twice") == b"2"
    assert client.head_object(Bucket="avatars", Key="twice")["Metadata"] == {}


def test_a_reader_keeps_the_object_that_it_has_begun(own_server):
    client = own_server.client()
    size = MAX_BYTES  # more than sockets hold
    client.put_object(Bucket="avatars", Key="read", Body=b"1" * size)

    with client.get_object(Bucket="avatars", Key="read")["Body"] as body:
        begun = body.read(1)
        client.put_object(Bucket="avatars", Key="read", Body=b"2")
        client.delete_object(Bucket="avatars", Key="read")
        assert begun + body.read() == b"1" * size


def test_a_deleted_object_is_gone_and_may_be_deleted_again(client):
    client.put_object(Bucket="avatars", Key="gone", Body=b"x")

    for _ in range(2):
        client.delete_object(Bucket="avatars", Key="gone")

    with refused("NoSuchKey"):
        client.get_object(Bucket="avatars", Key="gone")
    with refused("404"):
        client.head_object(Bucket="avatars", Key="gone")


def test_another_bucket_does_not_exist(client):
    client.head_bucket(Bucket="avatars")

    with refused("404"):
        client.head_bucket(Bucket="others")
    with refused("NoSuchBucket"):
        client.get_object(Bucket="others", Key="x")
    with refused("NoSuchBucket"):
        client.list_objects_v2(Bucket="others")


def test_the_listing_has_each_object_below_the_prefix_once(own_server):
    client = own_server.client()
    keys = sorted(f"{folder}/{name} +&<>ü" for folder in "ab" for name in range(5))
    for key in keys:
        client.put_object(Bucket="avatars", Key=key, Body=key.encode())

    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket="avatars", PaginationConfig={"PageSize": 3}
    )
    listed = [[item["Key"] for item in page["Contents"]] for page in pages]
    assert [len(page) for page in listed] == [3, 3, 3, 1]
    assert [key for page in listed for key in page] == keys
    below = client.list_objects_v2(Bucket="avatars", Prefix="b/")
    assert [item["Key"] for item in below["Contents"]] == keys[5:]
    assert below["Contents"][0]["Size"] == len(keys[5].encode())
    assert below["Contents"][0]["ETag"] == f'"{md5(keys[5].encode()).hexdigest()}"'
    assert "Contents" not in client.list_objects_v2(Bucket="avatars", Prefix="c/")
    assert client.list_objects_v2(Bucket="avatars", MaxKeys=0)["KeyCount"] == 0


def test_what_the_store_cannot_do_is_not_taken_for_something_else(client):
    client.put_object(Bucket="avatars", Key="kept", Body=b"kept")
    source = {"Bucket": "avatars", "Key": "kept"}

    for act in (
        lambda: client.copy_object(Bucket="avatars", Key="kept", CopySource=source),
        lambda: client.put_object(Bucket="avatars", Key="kept", Body=b"", IfNoneMatch="*"),
        lambda: client.put_object(Bucket="avatars", Key="kept", Body=b"", ContentEncoding="gzip"),
        lambda: client.put_object_tagging(Bucket="avatars", Key="kept", Tagging={"TagSet": []}),
        lambda: client.put_object_acl(Bucket="avatars", Key="kept", ACL="public-read"),
        lambda: client.get_object(Bucket="avatars", Key="kept", VersionId="1"),
        lambda: client.delete_objects(Bucket="avatars", Delete={"Objects": [{"Key": "kept"}]}),
        lambda: client.list_objects_v2(Bucket="avatars", Delimiter="/"),
        lambda: client.list_objects(Bucket="avatars"),
        lambda: client.delete_bucket(Bucket="avatars"),
        lambda: client.create_bucket(Bucket="avatars"),
    ):
        with refused("NotImplemented"):
            act()
    assert body_of(client, "kept") == b"kept"


# Ranges


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=2-5", 2, 5),
        ("bytes=7-", 7, 9),
        ("bytes=-3", 7, 9),
        ("bytes=-99", 0, 9),
        ("bytes=0-", 0, 9),
        ("bytes=5-99", 5, 9),
    ],
)
def test_a_range_is_answered_with_its_bytes(client, asked, first, last):
    client.put_object(Bucket="avatars", Key="ten", Body=b"0123456789")
    url = presigned(client, "ten")

    status, headers, body = answer(url, headers={"Range": asked})
    head_url = presigned(client, "ten", "head_object")
    head_status, head_headers, _ = answer(head_url, "HEAD", {"Range": asked})

    assert (status, body) == (206, b"0123456789"[first : last + 1])
    assert headers["Content-Range"] == f"bytes {first}-{last}/10"
    assert headers["Accept-Ranges"] == "bytes"
    assert head_status == 206
    for name in ("Content-Range", "Content-Length", "ETag", "Content-Type"):
        assert head_headers[name] == headers[name]


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=99-100", "bytes=-0"])
def test_a_range_beyond_the_end_is_refused(client, asked):
    client.put_object(Bucket="avatars", Key="ten", Body=b"0123456789")

    status, _, body = answer(presigned(client, "ten"), headers={"Range": asked})

    assert (status, code_of(body)) == (416, "InvalidRange")


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=0-1,3-4", "lines=1-2", "bytes=-", "bytes=x"])
def test_a_range_that_is_none_brings_the_whole_object(client, asked):
    client.put_object(Bucket="avatars", Key="ten", Body=b"0123456789")

    status, headers, body = answer(presigned(client, "ten"), headers={"Range": asked})

    assert (status, body) == (200, b"0123456789")
    assert headers["Content-Range"] is None


def test_a_download_that_goes_on_never_mixes_two_objects(client):
    old = client.put_object(Bucket="avatars", Key="changing", Body=b"0123456789")["ETag"]
    url = presigned(client, "changing")
    asked = {"Range": "bytes=5-", "If-Range": old}
    assert answer(url, headers=asked)[::2] == (206, b"56789")

    client.put_object(Bucket="avatars", Key="changing", Body=b"abcdefghij")

    assert answer(url, headers=asked)[::2] == (200, b"abcdefghij")
    with refused("PreconditionFailed"):
        client.get_object(Bucket="avatars", Key="changing", Range="bytes=5-", IfMatch=old)


# Signatures


def test_a_presigned_address_works_for_anyone_until_it_ends(client):
    client.put_object(Bucket="avatars", Key="signed.mp4", Body=b"video", ContentType="video/mp4")

    status, headers, body = answer(presigned(client, "signed.mp4"))
    assert (status, body, headers["Content-Type"]) == (200, b"video", "video/mp4")

    with signing_at(datetime.now(UTC) - timedelta(seconds=100)):
        expired, valid = (
            presigned(client, "signed.mp4", seconds=90),
            presigned(client, "signed.mp4", seconds=1000),
        )
    status, _, body = answer(expired)
    assert (status, code_of(body)) == (403, "AccessDenied")
    assert b"expired" in body
    assert answer(valid)[0] == 200


def tampered(url: str) -> dict[str, str]:
    last = url[-1]
    return {
        "signature": url[:-1] + ("0" if last != "0" else "1"),
        "signature cut": url[:-1],
        "signature not ASCII": url + "%C3%BC",
        "key": url.replace("secret.mp4", "other.mp4"),
        "expiry": url.replace("X-Amz-Expires=60", "X-Amz-Expires=61"),
        "second expiry": url + "&X-Amz-Expires=600",
        "headers": url.replace("SignedHeaders=host", "SignedHeaders=host%3Brange"),
        "option": url + "&uploads",
        "fragment": url.replace("secret.mp4", "secret.mp4%23"),
    }


@pytest.mark.parametrize("change", list(tampered("http://")))
def test_a_presigned_address_that_was_changed_is_refused(client, change):
    for key in ("secret.mp4", "other.mp4", "secret.mp4#"):
        client.put_object(Bucket="avatars", Key=key, Body=b"x")
    url = presigned(client, "secret.mp4")
    assert answer(url)[0] == 200

    status, _, body = answer(tampered(url)[change])

    assert (status, code_of(body)) == (403, "SignatureDoesNotMatch")


@pytest.mark.parametrize(
    ("remove", "code"),
    [
        ("X-Amz-Signature", "AccessDenied"),
        ("X-Amz-Credential", "InvalidAccessKeyId"),
        ("X-Amz-Date", "AuthorizationHeaderMalformed"),
        ("X-Amz-SignedHeaders", "AccessDenied"),
        ("X-Amz-Expires", "SignatureDoesNotMatch"),
    ],
)
def test_a_presigned_address_that_lacks_something_is_refused(client, remove, code):
    url = re.sub(rf"&?{remove}=[^&]*", "", presigned(client, "secret.mp4"))

    status, _, body = answer(url)

    assert status in (400, 403)
    assert code_of(body) == code


def test_an_address_for_reading_is_not_one_for_writing(client):
    client.put_object(Bucket="avatars", Key="read-only", Body=b"x")
    url = presigned(client, "read-only")

    for method in ("PUT", "DELETE", "POST", "HEAD"):
        assert answer(url, method, data=b"" if method == "PUT" else None)[0] == 403
    assert body_of(client, "read-only") == b"x"


@pytest.mark.parametrize("parser", ["h11", "httptools"])  # the first passes a bare # on
def test_a_hash_sign_does_not_bring_another_object_than_the_signed_one(tmp_path, parser):
    server = Server(tmp_path, parser)
    try:
        for key in ("a", "a#b"):
            server.client().put_object(Bucket="avatars", Key=key, Body=f"this is {key}".encode())
        headers = server.signed_headers(
            "GET", "avatars/a", {"x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
        )
        bodies = []
        for target in ("/s3/avatars/a", "/s3/avatars/a#b"):
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            with contextlib.closing(connection):
                connection.request("GET", target, headers=headers)
                bodies.append(connection.getresponse().read())
    finally:
        server.stop()

    assert bodies[0] == b"this is a"
    assert b"this is a#b" not in bodies[1]


def test_a_life_of_more_than_a_week_is_refused(client):
    client.put_object(Bucket="avatars", Key="long", Body=b"x")

    assert answer(presigned(client, "long", seconds=604_800))[0] == 200
    assert answer(presigned(client, "long", seconds=604_801))[0] == 400


def test_a_presigned_address_of_tomorrow_does_not_work_yet(client):
    client.put_object(Bucket="avatars", Key="early", Body=b"x")
    with signing_at(datetime.now(UTC) + timedelta(hours=23)):
        url = presigned(client, "early", seconds=604_800)

    assert answer(url)[0] == 403


def test_anyone_can_put_with_a_presigned_address(client):
    url = presigned(client, "from-browser", "put_object", ContentType="image/png")

    wrong = answer(url, "PUT", {"Content-Type": "text/html"}, b"image")
    unsigned = answer(url, "PUT", {"Content-Type": "image/png", "x-amz-meta-a": "1"}, b"image")
    right = answer(url, "PUT", {"Content-Type": "image/png"}, b"image")

    assert (wrong[0], code_of(wrong[2])) == (403, "SignatureDoesNotMatch")
    assert (unsigned[0], code_of(unsigned[2])) == (403, "AccessDenied")
    assert right[0] == 200
    assert body_of(client, "from-browser") == b"image"
    assert client.head_object(Bucket="avatars", Key="from-browser")["ContentType"] == "image/png"


def test_requests_without_a_signature_are_refused(server):
    for method, path in [
        ("GET", "avatars/x"),
        ("PUT", "avatars/x"),
        ("GET", "avatars?list-type=2"),
    ]:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "AWS4-HMAC-SHA256 x"}):
            status, _, body = answer(f"{server.url}/{path}", method, headers)
            assert (status, code_of(body)) == (403, "AccessDenied")


def test_wrong_keys_are_told_apart(server):
    for options, code in [
        ({"aws_access_key_id": "other"}, "InvalidAccessKeyId"),
        ({"aws_secret_access_key": "other"}, "SignatureDoesNotMatch"),
        ({"region_name": "eu-west-1"}, "AuthorizationHeaderMalformed"),
    ]:
        client = server.client(**options)
        for act in (
            lambda: client.get_object(Bucket="avatars", Key="x"),  # noqa: B023
            lambda: client.put_object(Bucket="avatars", Key="x", Body=b"x" * 2**21),  # noqa: B023
        ):
            with refused(code) as caught:
                act()
            assert KEYS["secret_access_key"] not in str(caught)


def test_a_client_that_sends_its_body_all_the_same_hears_the_refusal_and_may_go_on(client):
    right = presigned(client, "x", "put_object")
    wrong = right.replace("/x?", "/y?")
    with requests.Session() as session:
        for _ in range(3):
            refusal = session.put(wrong, data=bytes(8 * 2**20))
            assert code_of(refusal.content) == "SignatureDoesNotMatch"
            assert session.put(right, data=b"x").status_code == 200


def test_a_clock_that_is_wrong_is_named(client):
    for minutes, code in [(-16, "RequestTimeTooSkewed"), (16, "RequestTimeTooSkewed")]:
        with signing_at(datetime.now(UTC) + timedelta(minutes=minutes)), refused(code):
            client.put_object(Bucket="avatars", Key="late", Body=b"x")
    with signing_at(datetime.now(UTC) - timedelta(minutes=14)):
        client.put_object(Bucket="avatars", Key="late", Body=b"x")


def test_a_header_of_s3s_that_is_not_signed_is_refused(server):
    headers = server.signed_headers(
        "PUT", "avatars/extra", {"x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
    )

    for extra, status in [({"x-amz-meta-facts": "forged"}, 403), ({}, 200)]:
        assert answer(f"{server.url}/avatars/extra", "PUT", {**headers, **extra}, b"x")[0] == status


# Bodies


def test_a_body_that_is_not_the_signed_one_leaves_the_old_object(server, client):
    client.put_object(Bucket="avatars", Key="body", Body=b"old")
    names = {"x-amz-content-sha256": sha256(b"new").hexdigest()}
    headers = server.signed_headers("PUT", "avatars/body", names)

    status, _, body = answer(f"{server.url}/avatars/body", "PUT", headers, b"new!")
    assert (status, code_of(body)) == (400, "XAmzContentSHA256Mismatch")
    assert body_of(client, "body") == b"old"

    assert answer(f"{server.url}/avatars/body", "PUT", headers, b"new")[0] == 200
    assert body_of(client, "body") == b"new"


def chunks(data: bytes, size: int = 1000) -> bytes:
    return AwsChunkedWrapper(
        io.BytesIO(data), Crc32Checksum, "x-amz-checksum-crc32", chunk_size=size
    ).read()


def put_chunks(server, key: str, body, length: int):
    """The answer to a body in the form that boto3 uses over https."""
    headers = server.signed_headers(
        "PUT",
        f"avatars/{key}",
        {
            "x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
            "content-encoding": "aws-chunked",
            "x-amz-trailer": "x-amz-checksum-crc32",
            "x-amz-decoded-content-length": str(length),
            "x-amz-sdk-checksum-algorithm": "CRC32",
        },
    )
    return requests.put(f"{server.url}/avatars/{key}", data=body, headers=headers)


@pytest.mark.parametrize("size", [0, 1, 1000, 2**20 + 7])
def test_a_body_in_chunks_is_put_together(server, client, size):
    data = np.random.default_rng(size).bytes(size)

    for body in (chunks(data), iter([chunks(data)])):  # with a length, and with HTTP's own chunks
        assert put_chunks(server, "chunked", body, size).status_code == 200
        assert body_of(client, "chunked") == data
    assert "ContentEncoding" not in client.head_object(Bucket="avatars", Key="chunked")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"3\r\nnew",
        b"3\r\nnew\r\n",
        b"-1\r\nnew\r\n0\r\n\r\n",
        b"3 \r\nnew\r\n0\r\n\r\n",
        b"2\r\nne\r\n0\r\n\r\n",
        b"4\r\nnew!\r\n0\r\n\r\n",
        b"fffffffffffffff\r\nnew\r\n0\r\n\r\n",
        b"0" * 100 + b"3\r\nnew\r\n0\r\n\r\n",
    ],
)
def test_chunks_that_are_not_whole_leave_the_old_object(server, client, body):
    client.put_object(Bucket="avatars", Key="chunked", Body=b"old")

    refusal = put_chunks(server, "chunked", body, 3)

    assert (refusal.status_code, code_of(refusal.content)) == (400, "IncompleteBody")
    assert body_of(client, "chunked") == b"old"


def test_chunks_with_signatures_are_refused(server):
    names = {"x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"}
    headers = server.signed_headers("PUT", "avatars/x", names)

    status, _, body = answer(f"{server.url}/avatars/x", "PUT", headers, b"x")

    assert (status, code_of(body)) == (501, "NotImplemented")


def test_an_object_over_the_limit_is_refused(server, client):
    before = server.files()

    with refused("EntityTooLarge"):
        client.put_object(Bucket="avatars", Key="large", Body=bytes(MAX_BYTES + 1))
    url = presigned(client, "large", "put_object")
    endless = requests.put(url, data=(bytes(2**20) for _ in range(21)))  # of no known length
    assert (endless.status_code, code_of(endless.content)) == (400, "EntityTooLarge")
    lying = put_chunks(server, "large", chunks(bytes(MAX_BYTES + 1), 2**20), 3)
    assert (lying.status_code, code_of(lying.content)) == (400, "EntityTooLarge")

    assert server.files() == before
    client.put_object(Bucket="avatars", Key="large", Body=bytes(MAX_BYTES))


# Keys


HOSTILE = [
    "../../etc/passwd",
    "..",
    ".",
    "/",
    "//",
    "/leading",
    "a//b",
    "trailing/",
    "a/../b",
    "./a",
    "with space",
    "plus+sign",
    "%2F",
    "%",
    "%25",
    "a%00b",
    "a?b=c&d",
    "a#b",
    "a;b=c",
    "C:\\windows",
    "\\\\host\\share",
    "ünïcödé/☃/𝄞",
    "e\u0301",
    "é",
    "'\"<>&",
    "~!@$^*()_-=[]{}|:,.",
    "k" * 1024,
    "☃" * 341,
    "a/" * 500,
    "con",
    "upload",
]


@pytest.mark.parametrize("key", HOSTILE, ids=lambda key: ascii(key)[:20])
def test_a_key_is_only_a_name(server, client, key, tmp_path_factory):
    content = f"content of {key}".encode()
    outside = set(server.directory.parent.iterdir())

    client.put_object(Bucket="avatars", Key=key, Body=content)

    assert body_of(client, key) == content
    assert answer(presigned(client, key))[::2] == (200, content)
    assert key in [item["Key"] for item in listed(client)]
    client.upload_fileobj(io.BytesIO(content * 2), "avatars", key)
    assert body_of(client, key) == content * 2
    client.delete_object(Bucket="avatars", Key=key)
    with refused("NoSuchKey"):
        client.get_object(Bucket="avatars", Key=key)
    assert set(server.directory.parent.iterdir()) == outside
    assert {path.name for path in server.directory.iterdir()} == {"avatars"}


def listed(client) -> list[dict]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="avatars")
    return [item for page in pages for item in page.get("Contents", [])]


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("k" * 1025, "KeyTooLongError"),
        ("☃" * 342, "KeyTooLongError"),
        ("a\x00b", "InvalidArgument"),
        ("a\x1b", "InvalidArgument"),
        ("a\uffff", "InvalidArgument"),
        ("a\nb", "404"),  # meets no route
    ],
)
def test_a_key_that_could_not_be_listed_or_is_too_long_is_refused(server, key, code):
    with refused(code):
        server.client().put_object(Bucket="avatars", Key=key, Body=b"x")


def test_a_key_that_is_not_utf_8_is_refused(server):
    headers = server.signed_headers(
        "GET", "avatars/%ff", {"x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
    )

    status, _, body = answer(f"{server.url}/avatars/%ff", headers=headers)

    assert (status, code_of(body)) == (400, "InvalidURI")


OBJECT_KEYS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"),
    min_size=1,
    max_size=60,
)
METADATA = st.dictionaries(
    st.from_regex("[a-z][a-z0-9-]{0,20}", fullmatch=True),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60).map(str.strip),
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(key=OBJECT_KEYS, metadata=METADATA, content=st.binary(max_size=200))
def test_any_key_any_metadata_and_any_bytes_come_back(server, client, key, metadata, content):
    client.put_object(Bucket="avatars", Key=key, Body=content, Metadata=metadata)
    status, headers, body = answer(presigned(client, key))

    assert (status, body) == (200, content)
    names = {name.lower(): value for name, value in headers.items()}
    assert {
        name.removeprefix("x-amz-meta-"): value
        for name, value in names.items()
        if name.startswith("x-amz-meta-")
    } == metadata
    assert key in [item["Key"] for item in listed(client)]
    client.delete_object(Bucket="avatars", Key=key)


# Uploads in parts


PART = 5 * 2**20


def test_three_parts_become_one_object(own_server):
    client = own_server.client()
    where = {"Bucket": "avatars", "Key": "parts.mp4"}
    created = client.create_multipart_upload(
        **where, ContentType="video/mp4", Metadata={"seed": "7"}
    )
    upload = {**where, "UploadId": created["UploadId"]}
    bodies = {3: b"c" * 10, 1: b"a" * PART, 2: b"?"}
    etags = {
        number: client.upload_part(**upload, PartNumber=number, Body=body)["ETag"]
        for number, body in bodies.items()
    }
    etags[2] = client.upload_part(**upload, PartNumber=2, Body=b"b" * PART)["ETag"]  # again
    with refused("NoSuchKey"):
        client.get_object(**where)

    parts = [{"PartNumber": number, "ETag": etags[number]} for number in (1, 2, 3)]
    done = client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})

    assert body_of(client, "parts.mp4") == b"a" * PART + b"b" * PART + b"c" * 10
    head = client.head_object(**where)
    assert (head["ContentType"], head["Metadata"]) == ("video/mp4", {"seed": "7"})
    assert head["ETag"] == done["ETag"]
    assert re.fullmatch(r'"[0-9a-f]{32}-3"', done["ETag"])
    assert len(own_server.files()) == 1  # the parts are gone


def test_parts_that_do_not_fit_are_refused_and_can_be_mended(own_server):
    client = own_server.client()
    where = {"Bucket": "avatars", "Key": "parts"}
    upload = {**where, "UploadId": client.create_multipart_upload(**where)["UploadId"]}
    parts = [
        {
            "PartNumber": number,
            "ETag": client.upload_part(**upload, PartNumber=number, Body=b"%d" % number)["ETag"],
        }
        for number in (1, 2)
    ]
    other = {"PartNumber": 2, "ETag": parts[0]["ETag"]}
    missing = {"PartNumber": 3, "ETag": parts[0]["ETag"]}

    for wrong, code in [
        ([parts[1], parts[0]], "InvalidPartOrder"),
        ([parts[0], parts[0]], "InvalidPartOrder"),
        ([parts[0], other], "InvalidPart"),
        ([parts[0], missing], "InvalidPart"),
    ]:
        with refused(code):
            client.complete_multipart_upload(**upload, MultipartUpload={"Parts": wrong})
    for elsewhere in ({"Key": "other"}, {"UploadId": "0" * 32}, {"UploadId": "../objects"}):
        with refused("NoSuchUpload"):
            client.upload_part(**{**upload, **elsewhere}, PartNumber=1, Body=b"x")
    with refused("InvalidArgument"):
        client.upload_part(**upload, PartNumber=10_001, Body=b"x")

    client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    assert body_of(client, "parts") == b"12"
    with refused("NoSuchUpload"):
        client.abort_multipart_upload(**upload)


@pytest.mark.parametrize(
    "body", [b"", b"<", b"<a/>", b"<a><Part><PartNumber>x</PartNumber></Part></a>"]
)
def test_a_list_of_parts_that_is_none_is_refused(server, client, body):
    where = {"Bucket": "avatars", "Key": "parts"}
    upload_id = client.create_multipart_upload(**where)["UploadId"]
    path = f"avatars/parts?uploadId={upload_id}"
    headers = server.signed_headers("POST", path, {"x-amz-content-sha256": "UNSIGNED-PAYLOAD"})

    status, _, answered = answer(f"{server.url}/{path}", "POST", headers, body)

    assert (status, code_of(answered)) == (400, "MalformedXML")


def test_an_aborted_upload_leaves_nothing(own_server):
    client = own_server.client()
    where = {"Bucket": "avatars", "Key": "aborted"}
    upload = {**where, "UploadId": client.create_multipart_upload(**where)["UploadId"]}
    client.upload_part(**upload, PartNumber=1, Body=b"x")

    client.abort_multipart_upload(**upload)

    assert own_server.files() == []
    with refused("NoSuchUpload"):
        client.upload_part(**upload, PartNumber=2, Body=b"x")


def test_parts_that_are_too_large_together_are_refused(client, monkeypatch):
    where = {"Bucket": "avatars", "Key": "too-large"}
    upload = {**where, "UploadId": client.create_multipart_upload(**where)["UploadId"]}
    parts = [
        {
            "PartNumber": number,
            "ETag": client.upload_part(**upload, PartNumber=number, Body=bytes(MAX_BYTES // 2 + 1))[
                "ETag"
            ],
        }
        for number in (1, 2)
    ]

    with refused("EntityTooLarge"):
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    client.abort_multipart_upload(**upload)


def test_boto3s_transfers_of_large_files_work_as_they_are(client, tmp_path):
    path = tmp_path / "large"
    path.write_bytes(np.random.default_rng(0).bytes(18 * 2**20))  # by default parts from 8 MiB on

    client.upload_file(str(path), "avatars", "large", ExtraArgs={"ContentType": "video/mp4"})
    client.download_file("avatars", "large", str(tmp_path / "copy"))  # in ranges

    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    assert client.head_object(Bucket="avatars", Key="large")["ContentType"] == "video/mp4"


def test_signed_and_unsigned_payloads_are_taken(server):
    for sign in (True, False):
        config = Config(s3={"addressing_style": "path", "payload_signing_enabled": sign})
        client = server.client(config=config)
        client.put_object(Bucket="avatars", Key=f"signed-{sign}", Body=b"x" * 1000)
        assert body_of(client, f"signed-{sign}") == b"x" * 1000


# The project's own uploads


def test_the_workers_storage_puts_finds_and_signs(server, tmp_path):
    store = server.storage(prefix="avatar")
    video = tmp_path / "video.mp4"
    video.write_bytes(b"not really a video" * 1000)
    facts = {"seed": 1, "warnings": ['zwei  Räume, "quoted" ☃'], "fps": 12.5, "nothing": None}

    store.check()
    assert store.head("avatar/1.mp4") is None
    store.put(video, "avatar/1.mp4", content_type="video/mp4", facts=facts)

    found = store.head("avatar/1.mp4")
    assert (found.facts, found.size_bytes) == (facts, video.stat().st_size)
    status, headers, body = answer(store.url("avatar/1.mp4", 60))
    assert (status, body) == (200, video.read_bytes())
    assert headers["Content-Type"] == "video/mp4"


def test_the_workers_storage_puts_a_large_file_in_parts(server, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MULTIPART_BYTES", 6 * 2**20)
    path = tmp_path / "large.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(17 * 2**20))
    store = server.storage()

    store.put(path, "large.mp4", content_type="video/mp4", facts={"seed": 7})

    found = store.head("large.mp4")
    assert (found.size_bytes, found.facts) == (17 * 2**20, {"seed": 7})
    assert answer(store.url("large.mp4", 60))[2] == path.read_bytes()


def test_the_workers_storage_names_what_is_wrong(server):
    for options, code in [
        ({"access_key_id": "other"}, "InvalidAccessKeyId"),
        ({"secret_access_key": "other"}, "SignatureDoesNotMatch"),
        ({"name": "others"}, "NoSuchBucket"),
    ]:
        with pytest.raises(UploadError, match=code):
            server.storage(**options).check()


def test_looking_for_an_object_does_not_fetch_it_and_holds_no_file(own_server, tmp_path):
    store = own_server.storage()
    path = tmp_path / "large.mp4"
    path.write_bytes(bytes(MAX_BYTES))
    store.put(path, "looked-at.mp4", content_type="video/mp4")

    for _ in range(20):
        assert store.head("looked-at.mp4").size_bytes == MAX_BYTES

    data = next(path for path in own_server.files() if path.parent.name == "objects")
    deadline = time.monotonic() + 30
    while is_open(data) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_open(data)


def is_open(path: Path) -> bool:
    """Whether this process, where the server is, has the file open."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if link.readlink() == path:
                return True
    return False


# Players and pages


def make_video(path: Path, seconds: int = 4) -> None:
    with av.open(str(path), "w") as container:  # its index lies at the end: the player has to seek
        stream = container.add_stream("mpeg4", rate=Fraction(25))
        stream.width = stream.height = 128
        stream.bit_rate = 2_000_000
        noise = np.random.default_rng(0)
        for _ in range(25 * seconds):
            picture = noise.integers(0, 255, (128, 128, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def test_a_player_reads_a_video_and_jumps_in_it(server, tmp_path):
    path = tmp_path / "video.mp4"
    make_video(path)
    store = server.storage()
    store.put(path, "video.mp4", content_type="video/mp4")

    with av.open(store.url("video.mp4", 60)) as container:
        assert container.streams.video[0].frames == 100
        container.seek(3_000_000)
        assert next(container.decode(video=0)).time >= 2
        container.seek(0)
        assert sum(1 for _ in container.decode(video=0)) == 100


def test_a_page_of_any_origin_may_read_what_is_signed_and_nothing_else(client):
    client.put_object(Bucket="avatars", Key="page.mp4", Body=b"video")
    url = presigned(client, "page.mp4")
    origin = {"Origin": "https://example.com"}
    asks = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "range"}

    _, headers, body = answer(url, headers={**origin, "Range": "bytes=1-2"})
    assert body == b"id"
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert headers["Access-Control-Expose-Headers"] == "*"
    assert headers["Access-Control-Allow-Credentials"] is None
    status, headers, _ = answer(url, "OPTIONS", {**origin, **asks})
    assert status == 200
    assert "range" in headers["Access-Control-Allow-Headers"]
    asks["Access-Control-Request-Method"] = "PUT"
    assert answer(url, "OPTIONS", {**origin, **asks})[0] == 400


def test_a_stored_page_does_not_run_on_this_host(client):
    client.put_object(
        Bucket="avatars", Key="x.html", Body=b"<script>1</script>", ContentType="text/html"
    )

    _, headers, _ = answer(presigned(client, "x.html"))

    assert headers["Content-Security-Policy"] == "sandbox"
    assert headers["X-Content-Type-Options"] == "nosniff"


# What goes wrong


def begin_upload(server: Server, key: str, length: int, sent: bytes) -> socket.socket:
    """A connection on which a signed upload has begun."""
    names = {"x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
    headers = server.signed_headers("PUT", f"avatars/{key}", names)
    headers |= {"Host": f"127.0.0.1:{server.port}", "Content-Length": str(length)}
    lines = [f"PUT /s3/avatars/{key} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall("\r\n".join(lines).encode() + sent)
    return connection


def unfinished(server: Server) -> list[Path]:
    return [path for path in server.files() if path.parent.name == "unfinished"]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_upload_that_is_cut_leaves_the_old_object_and_no_rest(own_server):
    client = own_server.client()
    client.put_object(Bucket="avatars", Key="cut", Body=b"old")

    with begin_upload(own_server, "cut", 2**20, bytes(2**19)):
        wait_until(lambda: unfinished(own_server))
        assert body_of(client, "cut") == b"old"
    wait_until(lambda: not unfinished(own_server))

    assert body_of(client, "cut") == b"old"
    assert len(own_server.files()) == 1


def test_an_upload_that_pauses_too_long_is_ended(own_server, monkeypatch):
    monkeypatch.setattr(object_store, "IDLE_SECONDS", 0.2)

    with begin_upload(own_server, "slow", 2**20, b"x") as connection:
        refusal = b""
        while not refusal.endswith(b"</Error>"):
            part = connection.recv(65536)  # head and body may come apart
            assert part, refusal
            refusal += part

    assert code_of(refusal) == "RequestTimeout"
    assert own_server.files() == []


def test_objects_are_kept_over_a_restart(tmp_path):
    first = Server(tmp_path)
    first.client().put_object(Bucket="avatars", Key="kept", Body=b"x", Metadata={"a": "1"})
    first.stop()

    second = Server(tmp_path)
    try:
        assert body_of(second.client(), "kept") == b"x"
        head = second.client().head_object(Bucket="avatars", Key="kept")
        assert head["Metadata"] == {"a": "1"}
    finally:
        second.stop()


KILLED = """
import sys, time
from pathlib import Path
from local_endpoint.object_store import ObjectStore

def blocks():
    yield b"new" * 100_000
    print("begun", flush=True)
    time.sleep(600)

store = ObjectStore(Path(sys.argv[1]), access_key_id="a", secret_access_key="b")
store._write(store._path("killed"), [b"old"], "killed", {})
store._write(store._path("killed"), blocks(), "killed", {})
"""


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_object(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGKILL)

    server = Server(tmp_path)
    try:
        assert body_of(server.client(), "killed") == b"old"
        assert len(server.files()) == 1
    finally:
        server.stop()


def test_concurrent_uploads_of_one_key_leave_one_of_them_whole(own_server):
    bodies = [bytes([number]) * (2**20 + number) for number in range(12)]
    clients = [own_server.client() for _ in bodies]
    reader = own_server.client()
    reader.put_object(Bucket="avatars", Key="contended", Body=bodies[0])

    with ThreadPoolExecutor(12) as pool:
        puts = [
            pool.submit(client.put_object, Bucket="avatars", Key="contended", Body=body)
            for client, body in zip(clients, bodies, strict=True)
        ]
        seen = [body_of(reader, "contended") for _ in range(10)]
        for put in puts:
            put.result()

    assert {*seen, body_of(reader, "contended")} <= set(bodies)
    assert len(own_server.files()) == 1


def test_a_disk_that_fails_is_an_error_of_the_store(own_server, caplog):
    client = own_server.client()
    unfinished = own_server.directory / "avatars" / "unfinished"
    unfinished.rmdir()

    with refused("InternalError"):
        client.put_object(Bucket="avatars", Key="x", Body=b"x")
    assert "No such file" in caplog.text


def test_what_is_older_than_the_limit_is_deleted(own_server):
    client = own_server.client()
    client.put_object(Bucket="avatars", Key="x", Body=b"x")
    upload = client.create_multipart_upload(Bucket="avatars", Key="y")["UploadId"]

    own_server.store.delete_older_than(3600)
    assert body_of(client, "x") == b"x"
    client.upload_part(Bucket="avatars", Key="y", UploadId=upload, PartNumber=1, Body=b"y")

    own_server.store.delete_older_than(-1)
    assert own_server.files() == []
    with refused("NoSuchKey"):
        client.get_object(Bucket="avatars", Key="x")
    client.put_object(Bucket="avatars", Key="x", Body=b"x")
