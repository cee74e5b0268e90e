"""How a finished video reaches the client."""

import base64
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from avatar_client.contract import bucket as stores
from avatar_client.contract.job_errors import (
    InputUrlBlockedError,
    InvalidInputError,
    ResultTooLargeError,
    StorageNotConfiguredError,
    UploadError,
)
from tests.conftest import BucketServer
from tests.support.scripted_server import CLOSED, Answer, ScriptedServer
from worker.media import store_client
from worker.media.store_client import Patience
from worker.media.video import VideoFile
from worker.service import job_request
from worker.service.delivery import Delivery
from worker.service.job_request import Fingerprint
from worker.settings import Settings

F, G, FIRST, LATE = map(Fingerprint, ("f", "g", "first", "late"))
METADATA = {
    "sha256": "0" * 64,
    "size_bytes": 18_000,
    "duration_seconds": 0.4,
    "num_frames": 10,
    "fps": 25.0,
    "width": 256,
    "height": 320,
    "seed": 7,
    "provenance": "metadata",
    "speakers": [
        {"face_box": [1.5, 2.0, 30.0, 40.0], "start_seconds": 0.0, "duration_seconds": 0.3},
        {"face_box": None, "start_seconds": 0.1, "duration_seconds": 0.3},
    ],
    "warnings": ['zwei  "Räume"'],
}
THUMBNAIL = b"\xff\xd8\xff not really a picture"


@pytest.fixture
def make_delivery(make_input: Callable[..., dict[str, Any]]) -> Callable[..., Delivery]:
    """The delivery of a job: `make_delivery(settings, job_id=..., s3Config=..., **output)`."""

    def make(
        settings: Settings, job_id: str = "job-1", s3_config: Any = None, **output: Any
    ) -> Delivery:
        job = {"id": job_id, "input": make_input(output=output)}
        if s3_config is not None:
            job["s3Config"] = s3_config
        return Delivery.from_request(job_request.parse(job), settings)

    return make


@pytest.fixture
def bucket(object_store: BucketServer) -> Settings:
    """The settings of a worker with the test server's bucket."""
    return with_bucket(object_store.endpoint_url, object_store.bucket)


def with_bucket(endpoint_url: str, name: str = "avatars", **changes: Any) -> Settings:
    return Settings(
        bucket_endpoint_url=endpoint_url,
        bucket_access_key_id="test-access-key",
        bucket_secret_access_key="test-secret-key",
        bucket_name=name,
        **changes,
    )


@pytest.fixture
def video(tmp_path: Path) -> VideoFile:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"not really a video" * 1000)
    return VideoFile(path, num_frames=10, duration_seconds=0.4, size_bytes=18_000, sha256="0" * 64)


@pytest.fixture
def thumbnail_path(tmp_path: Path) -> Path:
    path = tmp_path / "thumbnail.jpg"
    path.write_bytes(THUMBNAIL)
    return path


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    """A store that answers as a test says, and is asked once."""
    monkeypatch.setattr(stores, "ATTEMPTS", 1)
    with ScriptedServer() as server:
        yield server


# Where it goes


@pytest.mark.parametrize(("asked", "told"), [("auto", "s3"), ("s3", "s3"), ("inline", "inline")])
def test_with_a_bucket_the_request_decides(
    make_delivery: Callable[..., Delivery], bucket: Settings, asked: str, told: str
) -> None:
    assert make_delivery(bucket, delivery=asked).describe()["delivery"] == told


@pytest.mark.parametrize("asked", ["auto", "inline"])
def test_without_a_bucket_the_video_goes_into_the_reply(
    make_delivery: Callable[..., Delivery], asked: str
) -> None:
    assert make_delivery(Settings(), delivery=asked).describe() == {"delivery": "inline"}


def test_a_bucket_that_was_asked_for_and_is_not_there_is_an_error_of_the_field(
    make_delivery: Callable[..., Delivery],
) -> None:
    with pytest.raises(StorageNotConfiguredError, match="BUCKET_") as caught:
        make_delivery(Settings(), delivery="s3")
    assert caught.value.field == "output.delivery"


def test_a_clients_bucket_goes_before_the_operators(
    make_delivery: Callable[..., Delivery], bucket: Settings
) -> None:
    own = {
        "endpointUrl": "https://203.0.114.1",
        "accessId": "a",
        "accessSecret": "b",
        "bucketName": "own",
    }
    delivery = make_delivery(bucket, s3_config=own)
    assert delivery.storage is not None
    assert delivery.storage.bucket_name == "own"
    assert delivery.keys.video == "job-1.mp4"  # without the operator's prefix


def test_a_clients_bucket_must_not_lie_at_a_private_address_unless_the_operator_says_so(
    make_delivery: Callable[..., Delivery], object_store: BucketServer
) -> None:
    own = {
        "endpointUrl": object_store.endpoint_url,
        "accessId": "a",
        "accessSecret": "b",
        "bucketName": "own",
    }
    with pytest.raises(InputUrlBlockedError) as caught:
        make_delivery(Settings(), s3_config=own)
    assert caught.value.field == "s3Config.endpointUrl"
    allowed = Settings(runpod_allow_private_download_urls=True)
    assert make_delivery(allowed, s3_config=own).describe() == {
        "delivery": "s3",
        "key": "job-1.mp4",
    }


def test_key_and_prefix_of_the_request_lie_below_the_operators_prefix(
    make_delivery: Callable[..., Delivery], bucket: Settings
) -> None:
    assert make_delivery(bucket).keys.video == "avatar/job-1.mp4"
    chosen = make_delivery(bucket, prefix="a/b", key="c.mp4").keys.video
    assert chosen == "avatar/chosen/a/b/c.mp4"


def test_the_life_of_the_url_is_the_requests_or_else_the_operators(
    make_delivery: Callable[..., Delivery], object_store: BucketServer
) -> None:
    settings = with_bucket(object_store.endpoint_url, bucket_url_expires_seconds=600)
    assert make_delivery(settings).expires_seconds == 600
    assert make_delivery(settings, url_expires_seconds=60).expires_seconds == 60


# What fits


@pytest.mark.parametrize(("job_id", "seconds"), [("job-1", 118.0), ("sync-1", 237.0)])
def test_a_reply_holds_so_many_seconds_of_video_and_no_more(
    make_delivery: Callable[..., Delivery], job_id: str, seconds: float
) -> None:
    delivery = make_delivery(Settings(), job_id=job_id)
    delivery.require_fits_reply(seconds)
    with pytest.raises(ResultTooLargeError, match="set up a bucket") as caught:
        delivery.require_fits_reply(seconds + 1.0)
    assert caught.value.field == "output.delivery"


def test_a_bucket_holds_any_length(
    make_delivery: Callable[..., Delivery], bucket: Settings
) -> None:
    delivery = make_delivery(bucket)
    assert delivery.max_bytes is None
    delivery.require_fits_reply(1e6)


# The video


def test_an_inline_video_stands_in_the_reply_with_its_thumbnail(
    make_delivery: Callable[..., Delivery], video: VideoFile, thumbnail_path: Path
) -> None:
    told = make_delivery(Settings()).deliver(video, {"thumbnail": thumbnail_path}, F, METADATA)

    assert base64.b64decode(told.pop("video_base64")) == video.path.read_bytes()
    assert base64.b64decode(told.pop("thumbnail_base64")) == THUMBNAIL
    assert told.pop("delivery") == "inline"
    assert set(told.values()) == {None}


def test_a_stored_video_is_behind_the_url_of_the_reply_with_its_thumbnail(
    make_delivery: Callable[..., Delivery], bucket: Settings, video: VideoFile, thumbnail_path: Path
) -> None:
    delivery = make_delivery(bucket, job_id="stored-1", url_expires_seconds=60)
    told = delivery.deliver(video, {"thumbnail": thumbnail_path}, F, METADATA)

    answer = requests.get(told["video_url"], timeout=10)
    assert answer.content == video.path.read_bytes()
    assert answer.headers["Content-Type"] == "video/mp4"
    picture = requests.get(told["thumbnail_url"], timeout=10)
    assert picture.content == THUMBNAIL
    assert picture.headers["Content-Type"] == "image/jpeg"
    assert (told["delivery"], told["bucket"]) == ("s3", "avatars")
    assert told["key"] == "avatar/stored-1.mp4"
    assert told["expires_at"].endswith("Z")
    assert told["video_base64"] is told["thumbnail_base64"] is None


def test_a_reply_has_the_same_fields_however_the_video_was_delivered(
    make_delivery: Callable[..., Delivery], bucket: Settings, video: VideoFile
) -> None:
    inline = make_delivery(Settings()).deliver(video, {}, F, METADATA)
    stored = make_delivery(bucket, job_id="fields-1").deliver(video, {}, F, METADATA)
    assert inline.keys() == stored.keys()
    assert inline["thumbnail_base64"] is stored["thumbnail_url"] is None


def test_of_a_public_bucket_the_address_is_plain_and_does_not_end(
    make_delivery: Callable[..., Delivery], store: ScriptedServer, video: VideoFile
) -> None:
    settings = with_bucket(store.origin, bucket_public_base_url=f"{store.origin}/cdn/")
    store.on("PUT /avatars/avatar/public-1.mp4", Answer())
    url = store.on("GET /cdn/avatar/public-1.mp4", Answer(body=b"x"))
    told = make_delivery(settings, job_id="public-1").deliver(video, {}, F, METADATA)
    assert told["video_url"] == url
    assert told["expires_at"] is None


# An earlier run of the same job


@pytest.mark.parametrize("has_thumbnail", [True, False])
def test_an_earlier_run_of_the_same_job_is_found_with_all_that_its_reply_told(
    make_delivery: Callable[..., Delivery],
    bucket: Settings,
    video: VideoFile,
    thumbnail_path: Path,
    has_thumbnail: bool,
) -> None:
    delivery = make_delivery(bucket, job_id=f"twice-{has_thumbnail}")
    assert delivery.find_existing(F) is None

    pictures = {"thumbnail": thumbnail_path, "gif": thumbnail_path} if has_thumbnail else {}
    told = METADATA | delivery.deliver(video, pictures, F, METADATA)

    found = delivery.find_existing(F)
    assert found is not None
    signed = ("video_url", "thumbnail_url", "gif_url", "expires_at")  # made anew
    assert {name: found[name] for name in found if name not in signed} == {
        name: told[name] for name in told if name not in signed
    }
    content = requests.get(found["video_url"], timeout=10).content
    assert hashlib.sha256(content).digest() == hashlib.sha256(video.path.read_bytes()).digest()
    for name, kind in (("thumbnail_url", "image/jpeg"), ("gif_url", "image/gif")):
        assert (found[name] is not None) == has_thumbnail
        if has_thumbnail:
            answer = requests.get(found[name], timeout=10)
            assert (answer.content, answer.headers["Content-Type"]) == (THUMBNAIL, kind)


def test_an_object_of_another_request_is_not_taken_for_an_earlier_run(
    make_delivery: Callable[..., Delivery], bucket: Settings, video: VideoFile
) -> None:
    delivery = make_delivery(bucket, job_id="other-1")
    delivery.deliver(video, {}, F, METADATA)
    assert delivery.find_existing(G) is None


def test_an_object_of_other_origin_is_not_taken_for_an_earlier_run(
    make_delivery: Callable[..., Delivery], bucket: Settings, object_store: BucketServer
) -> None:
    delivery = make_delivery(bucket, job_id="foreign-1")
    object_store.client.put_object(Bucket=object_store.bucket, Key=delivery.keys.video, Body=b"x")
    assert delivery.find_existing(F) is None


def test_without_a_bucket_no_earlier_run_is_found(
    make_delivery: Callable[..., Delivery], video: VideoFile
) -> None:
    delivery = make_delivery(Settings())
    delivery.deliver(video, {}, F, METADATA)
    assert delivery.find_existing(F) is None


# A store that fails

NO_SPACE = Answer(status=403, body=b"<Error><Code>QuotaExceeded</Code></Error>")


def test_a_store_that_refuses_the_video_is_named_with_its_code(
    make_delivery: Callable[..., Delivery], store: ScriptedServer, video: VideoFile
) -> None:
    store.on("PUT /avatars/avatar/job-1.mp4", NO_SPACE)
    with pytest.raises(UploadError, match="the object store answered QuotaExceeded"):
        make_delivery(with_bucket(store.origin), delivery="s3").deliver(video, {}, F, METADATA)


def test_a_video_is_not_stored_before_its_thumbnail(
    make_delivery: Callable[..., Delivery],
    store: ScriptedServer,
    video: VideoFile,
    thumbnail_path: Path,
) -> None:
    store.on("PUT /avatars/avatar/job-1.jpg", NO_SPACE)
    delivery = make_delivery(with_bucket(store.origin), delivery="s3")
    with pytest.raises(UploadError):
        delivery.deliver(video, {"thumbnail": thumbnail_path}, F, METADATA)
    assert [asked.path for asked in store.requests] == ["/avatars/avatar/job-1.jpg"]


def test_a_store_that_does_not_answer_is_an_error_before_anything_is_generated(
    make_delivery: Callable[..., Delivery], store: ScriptedServer
) -> None:
    store.on("GET /avatars/avatar/job-1.mp4", Answer(status=None))
    with pytest.raises(UploadError, match="did not answer as it should"):
        make_delivery(with_bucket(store.origin)).find_existing(F)


# A store that stumbles


FAULTS = {
    "HTML": Answer(status=503, body=b"<html>Service Unavailable</html>"),
    "cut": CLOSED,
    "slow down": Answer(status=503, body=b"<Error><Code>SlowDown</Code></Error>"),
    "skewed": Answer(status=403, body=b"<Error><Code>RequestTimeTooSkewed</Code></Error>"),
    "aborted": Answer(status=409, body=b"<Error><Code>OperationAborted</Code></Error>"),
    **{f"HTTP {status}": Answer(status=status) for status in (429, 500, 502, 504, 520, 524)},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_store_that_stumbles_is_asked_until_it_stands(
    make_delivery: Callable[..., Delivery],
    store: ScriptedServer,
    video: VideoFile,
    fault: Answer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_client, "FIRST_PAUSE_SECONDS", 0.02)
    store.on("PUT /avatars/avatar/job-1.mp4", *[fault] * 6, Answer())
    store.on("GET /avatars/avatar/job-1.mp4", Answer(body=b"x"))
    waits = []
    settings = with_bucket(store.origin)
    delivery = dataclasses.replace(
        make_delivery(settings), patience=Patience(20.0, on_wait=lambda: waits.append(1))
    )

    assert delivery.deliver(video, {}, F, METADATA)["delivery"] == "s3"

    assert len(store.asked("PUT /avatars/avatar/job-1.mp4")) == 7
    assert len(waits) == 6


def test_a_store_that_refuses_is_asked_once(
    make_delivery: Callable[..., Delivery], store: ScriptedServer, video: VideoFile
) -> None:
    store.on("PUT /avatars/avatar/job-1.mp4", NO_SPACE)
    delivery = make_delivery(with_bucket(store.origin), delivery="s3")
    delivery = dataclasses.replace(delivery, patience=Patience(20.0))

    with pytest.raises(UploadError, match="QuotaExceeded"):
        delivery.deliver(video, {}, F, METADATA)

    assert len(store.asked("PUT /avatars/avatar/job-1.mp4")) == 1


def test_a_stop_is_met_while_a_store_is_waited_for(
    make_delivery: Callable[..., Delivery], store: ScriptedServer, video: VideoFile
) -> None:
    class Stopped(Exception):  # noqa: N818
        pass

    def check() -> None:
        if store.requests:
            raise Stopped

    store.on("PUT /avatars/avatar/job-1.mp4", CLOSED)
    delivery = make_delivery(with_bucket(store.origin))
    delivery = dataclasses.replace(delivery, patience=Patience(600.0, check))
    begun = time.monotonic()

    with pytest.raises(Stopped):
        delivery.deliver(video, {}, F, METADATA)

    assert time.monotonic() - begun < 60


def test_a_video_whose_store_stays_away_goes_into_the_reply_with_a_warning(
    make_delivery: Callable[..., Delivery], store: ScriptedServer, video: VideoFile
) -> None:
    store.on("PUT /avatars/avatar/job-1.mp4", CLOSED)

    told = make_delivery(with_bucket(store.origin)).deliver(video, {}, F, METADATA)

    assert base64.b64decode(told["video_base64"]) == video.path.read_bytes()
    assert told["video_url"] is None
    assert told["warnings"][:-1] == METADATA["warnings"]
    assert "the bucket did not take the video" in told["warnings"][-1]


def test_a_video_that_had_to_go_to_a_bucket_goes_nowhere_else(
    make_delivery: Callable[..., Delivery], store: ScriptedServer, video: VideoFile
) -> None:
    store.on("PUT /avatars/avatar/job-1.mp4", CLOSED)

    with pytest.raises(UploadError):
        make_delivery(with_bucket(store.origin), delivery="s3").deliver(video, {}, F, METADATA)


# What is another's


def test_a_key_that_holds_another_jobs_video_is_refused_before_anything_is_generated(
    make_delivery: Callable[..., Delivery], bucket: Settings, video: VideoFile
) -> None:
    make_delivery(bucket, job_id="first", key="latest.mp4").deliver(video, {}, F, METADATA)

    with pytest.raises(InvalidInputError, match="overwrite") as caught:
        make_delivery(bucket, job_id="second", key="latest.mp4").find_existing(G)
    assert caught.value.field == "output.key"


@pytest.mark.parametrize("is_allowed", [True, False])
def test_it_is_replaced_if_both_the_job_and_the_operator_say_so(
    make_delivery: Callable[..., Delivery],
    object_store: BucketServer,
    video: VideoFile,
    is_allowed: bool,
) -> None:
    settings = with_bucket(object_store.endpoint_url, allow_overwrite=is_allowed)
    key = f"latest-{is_allowed}.mp4"
    make_delivery(settings, job_id="first", key=key).deliver(video, {}, F, METADATA)
    delivery = make_delivery(settings, job_id="second", key=key, overwrite=True)

    if is_allowed:
        assert delivery.find_existing(G) is None
    else:
        with pytest.raises(InvalidInputError):
            delivery.find_existing(G)


@pytest.mark.parametrize("asked", ["auto", "s3"])
def test_a_key_that_is_taken_meanwhile_stays_anothers(
    make_delivery: Callable[..., Delivery],
    bucket: Settings,
    object_store: BucketServer,
    video: VideoFile,
    asked: str,
) -> None:
    key = f"meanwhile-{asked}.mp4"
    late = make_delivery(bucket, job_id="late", key=key, delivery=asked)
    assert late.find_existing(LATE) is None
    make_delivery(bucket, job_id="first", key=key).deliver(video, {}, FIRST, METADATA)

    if asked == "s3":
        with pytest.raises(UploadError) as caught:
            late.deliver(video, {}, LATE, METADATA)
        assert (caught.value.field, caught.value.retryable) == ("output.key", False)
    else:
        told = late.deliver(video, {}, LATE, METADATA)
        assert base64.b64decode(told["video_base64"]) == video.path.read_bytes()
    stored = object_store.client.head_object(Bucket="avatars", Key=f"avatar/chosen/{key}")
    assert json.loads(stored["Metadata"][store_client.METADATA_NAME])["fingerprint"] == "first"


def test_the_record_of_a_chosen_key_lies_where_no_client_can_choose(
    make_delivery: Callable[..., Delivery],
    bucket: Settings,
    object_store: BucketServer,
    video: VideoFile,
    thumbnail_path: Path,
) -> None:
    delivery = make_delivery(bucket, job_id="job-7", key="by-a-client.mp4")
    told = delivery.deliver(video, {"thumbnail": thumbnail_path}, F, METADATA)
    delivery.keep_result({"output": {}})

    keys = object_store.keys()
    assert {key for key in keys if "by-a-client" in key or "job-7" in key} == {
        "avatar/chosen/by-a-client.mp4",
        "avatar/job-7.jpg",
        "avatar/job-7.mp4.json",
    }
    assert told["key"] == "avatar/chosen/by-a-client.mp4"
    assert requests.get(told["thumbnail_url"], timeout=10).content == THUMBNAIL


def test_the_same_request_of_another_job_is_another_video(
    make_input: Callable[..., dict[str, Any]],
) -> None:
    def fingerprint(job_id: str) -> Fingerprint:
        return job_request.parse({"id": job_id, "input": make_input()}).fingerprint

    assert fingerprint("a") == fingerprint("a")
    assert fingerprint("a") != fingerprint("b")


# A result that the platform does not take


def test_a_result_is_kept_beside_its_video_and_removed_again(
    make_delivery: Callable[..., Delivery], bucket: Settings, object_store: BucketServer
) -> None:
    delivery = make_delivery(bucket, job_id="kept-1")
    payload = {"output": {"key": delivery.keys.video}}

    where = delivery.keep_result(payload)

    assert where == "in the bucket avatars under avatar/kept-1.mp4.json"
    stored = object_store.client.get_object(Bucket="avatars", Key="avatar/kept-1.mp4.json")
    assert json.loads(stored["Body"].read()) == payload
    delivery.drop_kept_result()
    keys = object_store.keys()
    assert "avatar/kept-1.mp4.json" not in keys


def test_a_result_is_kept_and_removed_by_a_store_that_stumbles(
    make_delivery: Callable[..., Delivery], store: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_client, "FIRST_PAUSE_SECONDS", 0.02)
    stumbling = [CLOSED, Answer(status=503)]
    store.on("PUT /avatars/avatar/job-1.mp4.json", *stumbling, Answer())
    store.on("DELETE /avatars/avatar/job-1.mp4.json", *stumbling, Answer(status=204))
    delivery = make_delivery(with_bucket(store.origin))
    assert delivery.keep_result({"output": {}}) is not None
    delivery.drop_kept_result()
    assert len(store.asked("DELETE /avatars/avatar/job-1.mp4.json")) == 3


def test_where_there_is_no_bucket_no_result_is_kept(make_delivery: Callable[..., Delivery]) -> None:
    assert make_delivery(Settings()).keep_result({"output": {}}) is None


# A request with an id of its own


def as_request(make_input: Callable[..., dict[str, Any]], settings: Settings, **fields: Any) -> Any:
    """The delivery of such a request, as another job each time."""
    job = {"id": f"job-{time.monotonic_ns()}", "input": make_input(**fields)}
    return Delivery.from_request(job_request.parse(job), settings)


def test_its_objects_bear_its_id_in_a_folder_of_their_own(
    make_input: Callable[..., dict[str, Any]], bucket: Settings
) -> None:
    keys = as_request(make_input, bucket, request_id="order-1").keys
    assert dataclasses.astuple(keys) == (
        "avatar/requests/order-1.mp4",
        "avatar/requests/order-1.jpg",
        "avatar/requests/order-1.gif",
        "avatar/requests/order-1.mp4.json",
        "avatar/requests/order-1.claim",
        "avatar/requests/order-1.mp4",
    )
    with pytest.raises(InvalidInputError) as caught:  # a job's own could come to lie there
        as_request(make_input, bucket, output={"prefix": "requests/order-1"})
    assert caught.value.field == "output.prefix"


@pytest.mark.parametrize(("output", "stays"), [({}, False), ({"key": "mine.mp4"}, True)])
def test_a_claim_that_a_lost_worker_left_goes_unless_it_remembers_the_request(
    make_input: Callable[..., dict[str, Any]],
    bucket: Settings,
    thumbnail_path: Path,
    output: dict[str, Any],
    stays: bool,
) -> None:
    delivery = as_request(make_input, bucket, request_id=f"lost-{stays}", output=output)
    assert delivery.storage is not None
    assert delivery.keys.claim is not None
    delivery.drop_claim()  # there need not be one
    delivery.storage.put(thumbnail_path, delivery.keys.claim, content_type="text/plain")
    delivery.drop_claim()
    assert (delivery.storage.head(delivery.keys.claim) is not None) == stays


def test_without_a_bucket_it_is_refused_by_its_field(
    make_input: Callable[..., dict[str, Any]], bucket: Settings
) -> None:
    with pytest.raises(StorageNotConfiguredError, match="BUCKET_") as missing:
        as_request(make_input, Settings(), request_id="order-1")
    with pytest.raises(InvalidInputError, match=r"output\.delivery") as unused:
        as_request(make_input, bucket, request_id="order-1", output={"delivery": "inline"})
    assert missing.value.field == unused.value.field == "request_id"


def test_it_is_known_by_what_was_sent_or_by_its_inputs_content(
    make_input: Callable[..., dict[str, Any]], bucket: Settings, video: VideoFile
) -> None:
    first = as_request(make_input, bucket, request_id="known")
    first.deliver(video, {}, Fingerprint("sent", "content"), METADATA)

    again = as_request(make_input, bucket, request_id="known")
    for fingerprint in (Fingerprint("sent"), Fingerprint("other", "content")):
        assert again.find_existing(fingerprint)["sha256"] == METADATA["sha256"]
    assert again.find_existing(Fingerprint("other")) is None  # not known yet
    with pytest.raises(InvalidInputError, match="another request") as caught:
        again.find_existing(Fingerprint("other", "other"))
    assert caught.value.field == "request_id"


@pytest.mark.parametrize("looks_in_vain", [0, 1])  # or it came between the look and the upload
def test_a_video_that_another_worker_has_put_there_meanwhile_is_the_answer(
    make_input: Callable[..., dict[str, Any]],
    bucket: Settings,
    video: VideoFile,
    monkeypatch: pytest.MonkeyPatch,
    looks_in_vain: int,
) -> None:
    name = f"meanwhile-{looks_in_vain}"
    own, other = (as_request(make_input, bucket, request_id=name) for _ in range(2))
    told = other.deliver(video, {}, F, METADATA)
    find = Delivery.find_existing
    looks: list[Fingerprint] = []

    def look(self: Delivery, fingerprint: Fingerprint) -> Any:
        looks.append(fingerprint)
        return None if len(looks) <= looks_in_vain else find(self, fingerprint)

    monkeypatch.setattr(Delivery, "find_existing", look)
    answer = own.deliver(video, {}, F, METADATA | {"sha256": "1" * 64, "seed": 8})

    assert (answer["sha256"], answer["seed"]) == (METADATA["sha256"], METADATA["seed"])
    assert answer["key"] == told["key"]
    assert answer["reused"] is True
