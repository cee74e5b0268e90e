"""Stores that a stranger names in `s3Config`, and objects that a stranger has written.

Every answer here is sent over a real socket, to the real botocore.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import (
    InputUrlBlockedError,
    InvalidInputError,
    UploadError,
    WorkerError,
)
from tests.conftest import BucketServer
from tests.support.waiting import AT_ONCE_SECONDS
from worker import addresses
from worker.media import store_client, store_http, store_proof
from worker.media.storage import Storage
from worker.media.store_client import Patience
from worker.service import job_request
from worker.service.delivery import Delivery
from worker.service.job_request import Fingerprint
from worker.settings import Settings

Answer = Callable[[socket.socket], None]
CHUNK = b"4000\r\n" + b"<" * 0x4000 + b"\r\n"


class RawStore:
    """Reads the head of each request, and then does with the connection what it is told to."""

    def __init__(self, answer: Answer) -> None:
        self.num_connections = 0
        self.num_sent = 0
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.num_connections += 1
                threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                received = connection.recv(65_536)
                if not received:
                    return
                head += received
            self._answer(connection)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits
        self._socket.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], RawStore]]:
    stores: list[RawStore] = []

    def start(answer: Answer) -> RawStore:
        stores.append(RawStore(answer))
        return stores[-1]

    yield start
    for store in stores:
        store.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_http, "ANSWER_SECONDS", 1.0)


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"not really a video")
    return path


def store_at(port: int, **options: Any) -> Storage:
    values = {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "access_key_id": "id",
        "secret_access_key": "hush-hush",
        "name": "videos",
        "from_client": True,
        **options,
    }
    return Storage(BucketSettings(**values), allow_private=True)


def sends(content: bytes) -> Answer:
    return lambda connection: connection.sendall(content)


def error(body: bytes, status: str = "400 Bad Request", headers: bytes = b"") -> Answer:
    length = f"Content-Length: {len(body)}\r\n".encode()
    return sends(b"HTTP/1.1 " + status.encode() + b"\r\n" + length + headers + b"\r\n" + body)


def for_ever(head: bytes, piece: bytes, pause_seconds: float = 0.0) -> Answer:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        end = time.monotonic() + 60.0
        while time.monotonic() < end:
            connection.sendall(piece)
            time.sleep(pause_seconds)

    return answer


ENDLESS = {
    "never an answer": lambda _: time.sleep(60),
    "a byte now and then": for_ever(b"HTTP/1.1 200 OK\r\n", b"x", 0.2),
    "100 Continue again and again": for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
    "headers without end": for_ever(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 100, 0.001),
    "an error without end": for_ever(b"HTTP/1.1 500 No\r\n\r\n", b"<" * 65_536),
    "chunks without end": for_ever(b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNK),
    "a trickling error": for_ever(b"HTTP/1.1 403 No\r\n\r\n", b"<", 0.2),
}
OPERATIONS: dict[str, Callable[[Storage, Path], Any]] = {
    "head": lambda store, _: store.head("a.mp4"),
    "put": lambda store, path: store.put(path, "a.mp4", content_type="video/mp4"),
    "delete": lambda store, _: store.delete("a.mp4"),
    "prove": lambda store, _: store.prove("a.mp4"),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("answer", ENDLESS.values(), ids=ENDLESS)
def test_an_answer_without_end_ends_at_the_deadline(
    serve: Callable[[Answer], RawStore],
    quick: None,
    small_file: Path,
    answer: Answer,
    operation: Callable[[Storage, Path], Any],
) -> None:
    store = store_at(serve(answer).port)
    begun = time.monotonic()

    with pytest.raises(UploadError) as caught:
        operation(store, small_file)

    assert time.monotonic() - begun < AT_ONCE_SECONDS
    assert caught.value.field == "s3Config"


def test_of_an_error_without_end_a_megabyte_is_read(
    serve: Callable[[Answer], RawStore], small_file: Path
) -> None:
    num_sent = 0

    def flood(connection: socket.socket) -> None:
        nonlocal num_sent
        connection.sendall(b"HTTP/1.1 500 No\r\n\r\n")
        for _ in range(1000):
            connection.sendall(b"<" * 2**20)
            num_sent += 2**20

    with pytest.raises(UploadError):
        store_at(serve(flood).port).head("a.mp4")
    assert num_sent < 50 * 2**20  # what the sockets' buffers hold


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("name", ["never an answer", "an error without end"])
def test_a_stop_is_met_whatever_a_store_does(
    serve: Callable[[Answer], RawStore],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    operation: Callable[[Storage, Path], Any],
    small_file: Path,
) -> None:
    class Stopped(Exception):  # noqa: N818
        pass

    stop_at = time.monotonic() + 0.3

    def check() -> None:
        if time.monotonic() > stop_at:
            raise Stopped

    monkeypatch.setattr(store_http, "MAX_ANSWER_BYTES", 2**60)
    store = store_at(serve(ENDLESS[name]).port)
    patience = Patience(600.0, check)
    calls = {
        "head": lambda: store.head("a.mp4", patience),
        "prove": lambda: store.prove("a.mp4", patience),
        "put": lambda: store.put(small_file, "a.mp4", content_type="video/mp4", patience=patience),
    }
    [call] = [calls[key] for key in calls if OPERATIONS[key] is operation] or [calls["head"]]

    with pytest.raises(Stopped):
        call()

    assert time.monotonic() < stop_at + AT_ONCE_SECONDS


DEEP = b"<a>" * 20_000
ENTITIES = (
    b'<!DOCTYPE a [<!ENTITY b "'
    + b"x" * 1000
    + b'">'
    + b"".join(
        b'<!ENTITY c%d "%s">' % (i, (b"&c%d;" % (i - 1) if i else b"&b;") * 50) for i in range(9)
    )
    + b"]><Error><Code>&c8;</Code></Error>"
)
ODD = {
    "nested twenty thousand deep": error(b"<Error>" + DEEP + b"</a>" * 20_000 + b"</Error>"),
    "left open twenty thousand deep": error(DEEP),
    "a code of elements": error(b"<Error><Code><a>b</a></Code></Error>"),
    "errors of text": error(b"<Errors>no</Errors>"),
    "an error of text": error(b"<Error><Error>no</Error></Error>"),
    "many codes": error(b"<Error><Code>a</Code><Code>b</Code></Error>"),
    "entities in entities": error(ENTITIES),
    "no XML": error(b"\x00\xff\xfe<Error>"),
    "another encoding": error(b'<?xml version="1.0" encoding="x-none"?><Error/>'),
    "JSON": error(b'{"Error": {"Code": "no"}}'),
    "nothing": error(b""),
    "a redirect to itself": error(
        b"",
        "301 Moved Permanently",
        b"Location: /videos/a.mp4\r\nx-amz-bucket-region: eu-west-1\r\n",
    ),
    "a redirect of every request": error(
        b"<Error><Code>PermanentRedirect</Code></Error>", "301 Moved Permanently"
    ),
    "a redirect to elsewhere": error(
        b"<Error><Code>PermanentRedirect</Code><Endpoint>169.254.169.254</Endpoint></Error>",
        "307 Temporary Redirect",
        b"Location: http://169.254.169.254/latest\r\n",
    ),
    "a region of blanks": error(
        b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>a b/../c</Region></Error>"
    ),
    "a garbled date": sends(
        b"HTTP/1.1 200 OK\r\nLast-Modified: the day before\r\nExpires: x\r\nDate: y\r\n"
        b"Content-Length: 0\r\n\r\n"
    ),
    "numbers of words": sends(
        b"HTTP/1.1 200 OK\r\nx-amz-mp-parts-count: many\r\nx-amz-missing-meta: all\r\n"
        b"Content-Length: 0\r\n\r\n"
    ),
    "a length of words": sends(b"HTTP/1.1 200 OK\r\nContent-Length: long\r\n\r\n"),
    "a negative length": sends(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"),
    "another protocol": sends(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a status of 999": error(b"", "999 What"),
    "a switch of protocols": sends(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    "less than promised": sends(b"HTTP/1.1 400 No\r\nContent-Length: 100\r\n\r\n<Error>"),
    "a header of bytes": sends(
        b"HTTP/1.1 200 OK\r\nx-amz-meta-avatar-metadata: \xff\xfe\r\nContent-Length: 0\r\n\r\n"
    ),
    "metadata nested deep": sends(
        b"HTTP/1.1 200 OK\r\nx-amz-meta-avatar-metadata: "
        + b"[" * 50_000
        + b"\r\nContent-Length: 0\r\n\r\n"
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("answer", ODD.values(), ids=ODD)
def test_an_odd_answer_is_the_stores_error_or_none(
    serve: Callable[[Answer], RawStore],
    quick: None,
    small_file: Path,
    answer: Answer,
    operation: Callable[[Storage, Path], Any],
) -> None:
    server = serve(answer)
    store_proof.proofs.clear()

    told: WorkerError | None = None
    try:
        operation(store_at(server.port), small_file)
    except WorkerError as raised:
        told = raised

    if told is not None:
        text = json.dumps(told.to_output())
        assert told.code == "UPLOAD_FAILED"
        assert len(text) < 1000
        assert not [leak for leak in ("hush-hush", "127.0.0.1", "Traceback") if leak in text]
    assert server.num_connections <= 4


# Where it leads


@pytest.mark.parametrize(
    "name",
    [
        "x--use1-az4--x-s3",
        "x--use1-az4--xa-s3",
        "a-000000000000000000000000000o01234567890123456--op-s3",
        "arn:aws:s3:::videos",
        "arn:aws:s3:us-east-1:123456789012:accesspoint/videos",
        "arn:aws:s3-outposts:us-east-1:123456789012:outpost/op-1/accesspoint/a",
        "videos/../other",
        "..",
        ".",
        "videos@169.254.169.254",
        "videos#",
        "videos?x=y",
        "videos\r\nHost: other",
        "vidéos",
        "",
        "a" * 256,
    ],
)
def test_a_bucket_whose_name_leads_elsewhere_is_refused_by_its_field(name: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        store_at(9, name=name)
    assert caught.value.field == "s3Config.bucketName"


@pytest.mark.parametrize("style", ["auto", "path", "virtual"])
def test_no_other_host_than_the_stores_is_contacted(
    style: str, small_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = set()

    def unknown(host: str, *_: Any, **__: Any) -> Any:
        asked.add(host)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    store = store_at(9, endpoint_url="https://store.example.com", addressing_style=style)
    for operation in OPERATIONS.values():
        with pytest.raises(UploadError):
            operation(store, small_file)
    assert asked == {"videos.store.example.com" if style == "virtual" else "store.example.com"}


def test_a_request_to_another_host_is_refused_before_it_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = store_at(9, endpoint_url="https://store.example.com")
    monkeypatch.setattr(store._client._http, "_host", "another.example.com")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("was looked up"))
    with pytest.raises(InputUrlBlockedError):
        store.head("a.mp4")


def test_a_name_that_leads_to_a_private_address_later_is_not_dialled(
    serve: Callable[[Answer], RawStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(error(b""))
    answers = iter(["93.184.216.34"])

    def turncoat(*_: Any, **__: Any) -> list[Any]:
        ip = next(answers, "127.0.0.1")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, server.port))]

    monkeypatch.setattr(socket, "getaddrinfo", turncoat)
    bucket = BucketSettings(
        endpoint_url=f"https://rebound.example.com:{server.port}",
        access_key_id="id",
        secret_access_key="hush-hush",
        name="videos",
        from_client=True,
    )
    store = Storage(bucket)

    with pytest.raises(InputUrlBlockedError) as caught:
        store.head("a.mp4", Patience(60.0))

    assert caught.value.field == "s3Config.endpointUrl"
    assert server.num_connections == 0


def test_an_error_does_not_tell_an_open_port_from_a_closed_one(
    serve: Callable[[Answer], RawStore], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(addresses, "is_public", lambda _: True)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed_port = unused.getsockname()[1]
    ports = [
        closed_port,
        serve(lambda _: time.sleep(5)).port,
        serve(sends(b"SSH-2.0-OpenSSH_9.6\r\n")).port,
        serve(lambda _: None).port,
    ]
    told = set()
    for port in ports:
        bucket = BucketSettings(
            endpoint_url=f"https://127.0.0.1:{port}",
            access_key_id="id",
            secret_access_key="hush-hush",
            name="videos",
            from_client=True,
        )
        with pytest.raises(UploadError) as caught:
            Storage(bucket).head("a.mp4")
        told.add(json.dumps(caught.value.to_output()))
    assert len(told) == 1


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://user:password@store.example.com",
        "https://store.example.com?x=y",
        "https://store.example.com#x",
        "https://store.example.com:99999",
        "https://[::1",
        "https://exa mple.com",
        "https://store_1.example.com",
        f"https://{'a' * 64}.example.com",
        "ftp://store.example.com",
        "file:///etc/passwd",
        "gopher://store.example.com",
        "//store.example.com",
        "https://",
        "https:///videos",
        "x" * 2000,
    ],
)
def test_an_endpoint_that_is_none_is_refused_by_its_field(endpoint: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        store_at(9, endpoint_url=endpoint)
    assert caught.value.field == "s3Config.endpointUrl"
    assert "password" not in str(caught.value)


# Objects that another has written

SPEAKER = {"face_box": None, "start_seconds": 0.0, "duration_seconds": 0.4}
RECORD = {
    "fingerprint": "f",
    "thumbnail": False,
    "sha256": "0" * 64,
    "size_bytes": 1,
    "duration_seconds": 0.4,
    "num_frames": 10,
    "fps": 25.0,
    "width": 256,
    "height": 320,
    "seed": 7,
    "speakers": [SPEAKER],
    "warnings": ["a"],
}


@pytest.fixture
def delivery(object_store: BucketServer) -> Callable[..., Delivery]:
    settings = Settings(
        bucket_endpoint_url=object_store.endpoint_url,
        bucket_access_key_id="test-access-key",
        bucket_secret_access_key="test-secret-key",
        bucket_name=object_store.bucket,
    )

    def make(job_id: str, **output: Any) -> Delivery:
        media = {"image": "https://example.com/a.png", "audio": "https://example.com/a.wav"}
        job = {"id": job_id, "input": {**media, "output": output}}
        return Delivery.from_request(job_request.parse(job), settings)

    return make


def write(store: BucketServer, key: str, metadata: str) -> None:
    values = {store_client.METADATA_NAME: metadata}
    store.client.put_object(Bucket=store.bucket, Key=key, Body=b"x", Metadata=values)


def test_a_true_record_is_the_reply(
    object_store: BucketServer, delivery: Callable[..., Delivery]
) -> None:
    job = delivery("true-record")
    write(object_store, job.keys.video, json.dumps(RECORD))

    found = job.find_existing(Fingerprint("f"))

    assert found is not None
    assert found["seed"] == 7
    assert not {"fingerprint", "thumbnail"} & set(found)


FORGED: dict[str, Any] = {
    "a worker to stop": RECORD | {"refresh_worker": True},
    "an error": RECORD | {"error": "no"},
    "an address": RECORD | {"video_url": "https://evil.example"},
    "a name of ours": RECORD | {"worker": {}},
    "text for a number": RECORD | {"width": "256"},
    "a number for text": RECORD | {"sha256": 0},
    "no hash": RECORD | {"sha256": "x" * 64},
    "true for a number": RECORD | {"num_frames": True},
    "warnings of objects": RECORD | {"warnings": [{"error": "x"}]},
    "a warning": RECORD | {"warnings": "text"},
    "no speaker": RECORD | {"speakers": []},
    "five speakers": RECORD | {"speakers": [SPEAKER] * 5},
    "a speaker's error": RECORD | {"speakers": [SPEAKER | {"error": "x"}]},
    "a speaker's name": RECORD | {"speakers": [SPEAKER | {"name": "x"}]},
    "a box of text": RECORD | {"speakers": [SPEAKER | {"face_box": ["x"] * 4}]},
    "another size": RECORD | {"size_bytes": 2},
    "no thumbnail's word": RECORD | {"thumbnail": "yes"},
    "a negative length": RECORD | {"duration_seconds": -1.0},
    "a huge seed": RECORD | {"seed": 2**53},
    "less": {"fingerprint": "f"},
    "nothing": {},
}


@pytest.mark.parametrize("record", FORGED.values(), ids=FORGED)
def test_a_record_that_is_not_ours_is_not_the_reply(
    object_store: BucketServer, delivery: Callable[..., Delivery], record: dict[str, Any]
) -> None:
    job = delivery("forged")
    write(object_store, job.keys.video, json.dumps(record))
    assert job.find_existing(Fingerprint("f")) is None


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_no_json_is_not_the_reply(
    object_store: BucketServer, delivery: Callable[..., Delivery], constant: str
) -> None:
    job = delivery("constants")
    write(object_store, job.keys.video, json.dumps(RECORD).replace("25.0", constant))
    assert job.find_existing(Fingerprint("f")) is None


def test_a_job_cannot_name_the_video_the_thumbnail_or_the_result_of_another(
    delivery: Callable[..., Delivery],
) -> None:
    theirs = delivery("their-job", prefix="p").keys
    for part in ("p/their-job.mp4", "p/their-job.jpg", "p/their-job.mp4.json"):
        mine = delivery("my-job", key=part).keys
        assert {mine.video, mine.thumbnail, mine.result}.isdisjoint(
            {theirs.video, theirs.thumbnail, theirs.result}
        )
    with pytest.raises(InvalidInputError):
        delivery("my-job", prefix="chosen")
