"""A job of the queue becomes checked values, or a refusal that can be sent."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avatar_client.contract.job_errors import InvalidInputError, WorkerError
from avatar_client.contract.request import JobInput
from worker.service import job_request

IMAGE = base64.b64encode(b"an image").decode()
AUDIO = "https://example.com/speech.wav"
S3 = {"endpointUrl": "https://s3.example.com", "accessId": "id", "accessSecret": "hush-hush"}


def parse(top: dict[str, Any] | None = None, **fields: Any) -> job_request.JobRequest:
    return job_request.parse(
        {"id": "job-1", "input": {"image": IMAGE, "audio": AUDIO, **fields}, **(top or {})}
    )


def test_the_bucket_of_the_job_wins_over_that_of_the_input() -> None:
    top = {"s3Config": {**S3, "bucketName": "top"}}
    request = parse(top, s3Config={**S3, "bucketName": "input"})
    assert request.bucket is not None
    assert (request.bucket.name, request.bucket.from_client) == ("top", True)
    request = parse(s3Config={**S3, "bucketName": "input"})
    assert request.bucket is not None
    assert request.bucket.name == "input"


def test_a_bucket_without_keys_is_named_where_it_stands() -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse({"s3Config": {"endpointUrl": "https://s3.example.com"}})
    assert caught.value.field == "s3Config.accessId"


EMPTY = {"endpointUrl": None, "accessId": "", "accessSecret": None, "bucketName": ""}


@pytest.mark.parametrize("empty", [None, {}, EMPTY, {"objectPath": ""}])
def test_a_bucket_without_anything_is_none(empty: Any) -> None:
    assert parse({"s3Config": empty}).bucket is None
    assert parse(s3Config=empty).bucket is None
    request = parse({"s3Config": empty}, s3Config={**S3, "bucketName": "input"})
    assert request.bucket is not None
    assert request.bucket.name == "input"


def test_all_that_a_store_may_need_is_taken_from_the_job() -> None:
    own = {
        **{name: f" {value}\n" for name, value in S3.items()},  # as it was pasted
        "bucketName": "videos",
        "region": "eu-west-1",
        "sessionToken": "session-token",
        "addressingStyle": "virtual",
        "serverSideEncryption": "aws:kms",
        "kmsKeyId": "k",
        "checksums": "when_supported",
    }
    bucket = parse({"s3Config": own}).bucket
    assert bucket is not None
    assert bucket.endpoint_url == S3["endpointUrl"]
    assert bucket.secret_access_key.get_secret_value() == "hush-hush"
    assert bucket.session_token is not None
    assert bucket.session_token.get_secret_value() == "session-token"
    assert (bucket.region, bucket.addressing_style) == ("eu-west-1", "virtual")
    assert (bucket.server_side_encryption, bucket.kms_key_id) == ("aws:kms", "k")
    assert bucket.checksums == "when_supported"
    assert "session-token" not in repr(bucket)


@pytest.mark.parametrize(
    ("path", "prefix", "key"),
    [
        ("videos/a", "videos/a", None),
        ("/videos/a/", "videos/a", None),
        ("videos/a.mp4", "videos", "a.mp4"),
        ("a.MP4", "", "a.MP4"),
        ("/", "", None),
    ],
)
def test_the_object_path_of_runpods_sdk_is_a_folder_or_a_key(
    path: str, prefix: str, key: str | None
) -> None:
    request = parse({"s3Config": {**S3, "objectPath": path}})
    assert request.bucket is not None
    assert request.bucket.prefix == prefix
    assert request.input.output.key == key
    asked = parse({"s3Config": {**S3, "objectPath": path}}, output={"key": "mine.mp4"})
    assert asked.input.output.key == "mine.mp4"


def test_the_object_path_names_the_kind_of_file_that_is_made() -> None:
    own = {"s3Config": {**S3, "objectPath": "a/b.webm"}}
    assert parse(own, output={"format": "webm"}).input.output.key == "b.webm"
    with pytest.raises(InvalidInputError, match=r"ends with \.webm") as caught:
        parse(own)
    assert caught.value.field == "s3Config.objectPath"


def test_aws_needs_no_endpoint_in_a_job_either() -> None:
    own = {"accessId": "id", "accessSecret": "s", "region": "eu-west-1", "bucketName": "b"}
    bucket = parse({"s3Config": own}).bucket
    assert bucket is not None
    assert bucket.endpoint_url is None


@pytest.mark.parametrize("key", ["a b.mp4", "/a.mp4", "a/", "a//b", "ü.mp4", "a?b", "a\nb", "a\n"])
@pytest.mark.parametrize("field", ["key", "prefix"])
def test_a_key_that_cannot_be_is_told_in_words(field: str, key: str) -> None:
    with pytest.raises(InvalidInputError, match="letters") as caught:
        parse(output={field: key})
    assert caught.value.field == f"output.{field}"
    assert "pattern" not in caught.value.message
    for folder in ("..", "a/../b", "."):
        with pytest.raises(InvalidInputError, match="as a folder"):
            parse(output={field: folder})
    with pytest.raises(InvalidInputError) as caught:
        parse({"s3Config": {**S3, "objectPath": "a b"}})
    assert caught.value.field == "s3Config.objectPath"


def test_no_secret_and_no_content_stands_in_a_requests_text() -> None:
    text = repr(parse(s3Config=S3, image=base64.b64encode(b"face" * 100).decode()))
    assert "hush-hush" not in text
    assert "faceface" not in text


def test_two_deliveries_of_a_job_have_one_fingerprint_and_another_request_has_another() -> None:
    assert parse(seed=1).fingerprint == parse(seed=1).fingerprint
    different = [parse(seed=2), parse(image=AUDIO), parse(motion={"pose": 1}), parse(fps=12.5)]
    shapes: list[dict[str, Any]] = [
        {"aspect": "1:1"},
        {"fit": "contain"},
        {"format": "webm"},
        {"codec": "hevc"},
    ]
    shapes += [{"quality": 20}, {"watermark": {"text": "a"}}, {"watermark": {"image": IMAGE}}]
    different += [parse(seed=1, output=output) for output in shapes]
    assert len({request.fingerprint for request in [parse(seed=1), *different]}) == 12
    # how the video is handed over does not change the video
    assert parse(user_data=1, output={"key": "a.mp4"}).fingerprint == parse().fingerprint


def test_a_request_with_an_id_has_one_fingerprint_whatever_its_job_is() -> None:
    def fingerprint(job_id: str, **fields: Any) -> job_request.Fingerprint:
        job = {"id": job_id, "input": {"image": IMAGE, "audio": AUDIO, **fields}}
        return job_request.parse(job).fingerprint

    same = fingerprint("a", request_id="order-1", seed=1)
    life: Any = {"url_expires_seconds": 60, "delivery": "s3", "overwrite": True}
    assert fingerprint("b", request_id="order-1", seed=1, output=life, user_data=1) == same
    for change in ({"request_id": "order-2"}, {"seed": 2}, {"output": {"thumbnail": True}}):
        assert fingerprint("a", **({"request_id": "order-1", "seed": 1} | change)) != same
    assert fingerprint("order-1", seed=1) != same  # a job of that name


def test_all_workers_that_may_have_a_request_without_a_seed_give_it_the_same() -> None:
    assert parse(seed=3).seed == 3
    drawn = parse().seed
    assert parse().seed == drawn
    assert parse({"id": "job-2"}).seed != drawn
    own = parse(request_id="order-1").seed
    assert parse({"id": "job-2"}, request_id="order-1").seed == own != drawn


@pytest.mark.parametrize("name", ["a", "Order-1_2.3", "6f1c1d5e-8f2a", "x" * 128])
def test_a_request_id_is_taken_as_it_is(name: str) -> None:
    assert parse(request_id=name).input.request_id == name


@pytest.mark.parametrize(
    "name", ["a/b", "../a", ".", "-a", "a b", "a\n", "ä", "a?b", "x" * 129, ["a"], {"a": 1}, True]
)
def test_a_request_id_that_cannot_stand_in_a_key_is_refused_by_its_field(name: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse(request_id=name)
    assert caught.value.field == "request_id"


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "no list"])
def test_the_addresses_of_speakers_are_as_secret_as_that_of_one_recording(as_list: bool) -> None:
    speaker = {"audio": "https://user:hush-hush@example.com/b.wav?token=0123456789"}
    speakers = [{"audio": AUDIO}, speaker] if as_list else speaker
    hidden = job_request.secret_values({"input": {"speakers": speakers}})
    assert {"hush-hush", "token=0123456789", "0123456789"} <= hidden


def test_two_requests_are_told_apart_by_all_that_their_speakers_say() -> None:
    def sent(speaker: dict[str, Any], **fields: Any) -> tuple[str, str | None]:
        first = {"audio": IMAGE, "face": "left"}
        raw = {"image": IMAGE, "speakers": [first, {"audio": IMAGE, **speaker}], **fields}
        request = job_request.parse({"id": "job-1", "input": raw})
        return request.fingerprint.sent, request.fingerprint_with(["i", "a", "b"]).content

    plain = sent({})
    assert sent({"name": "Ada"}) == plain  # decides nothing
    others = [
        sent({"face": "right"}),
        sent({"face_box": [1, 2, 3, 4]}),
        sent({"start_seconds": 1}),
        sent({}, order="in_turn"),
        sent({}, order="in_turn", pause_seconds=1),
        sent({}, trim_silence=True),
    ]
    for values in zip(plain, *others, strict=True):
        assert len(set(values)) == 7


def test_an_address_may_be_another_at_each_sending_in_each_speaker() -> None:
    def request(token: str) -> job_request.JobRequest:
        speakers = [{"audio": f"https://example.com/{n}.wav?token={token}"} for n in "ab"]
        return job_request.parse({"id": "job-1", "input": {"image": IMAGE, "speakers": speakers}})

    first, second = request("one"), request("two")
    assert first.fingerprint.content is None
    assert first.fingerprint.sent != second.fingerprint.sent
    digests = ["i", "a", "b"]
    assert first.fingerprint_with(digests).content == second.fingerprint_with(digests).content
    assert first.fingerprint_with(["i", "b", "a"]) != first.fingerprint_with(digests)


def test_the_address_of_a_watermark_is_as_secret_as_that_of_an_input() -> None:
    mark = {"image": "https://example.com/logo.png?signature=0123456789"}
    hidden = job_request.secret_values({"input": {"output": {"watermark": mark}}})
    assert "signature=0123456789" in hidden


def test_an_id_that_cannot_stand_in_a_key_is_replaced() -> None:
    assert job_request.safe_id("sync-1a2b-e1") == "sync-1a2b-e1"
    for hostile in ["../../etc", "a\nb", "", None, "x" * 200, "\ud800"]:
        assert job_request.safe_id(hostile).isalnum()


def test_the_room_in_a_reply_depends_on_how_the_job_was_sent() -> None:
    job = {"input": {"image": IMAGE, "audio": AUDIO}}
    small = job_request.parse({"id": "a-e1", **job}).max_inline_characters
    assert job_request.parse({"id": "sync-a-e1", **job}).max_inline_characters > small


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_an_input_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        job_request.parse({"id": "a", "input": value})
    assert caught.value.field == "input"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from([*JobInput.model_fields, "s3Config"])


@given(st.dictionaries(FIELDS | st.text(), JSON, max_size=6), JSON)
def test_any_json_is_either_a_request_or_a_refusal_that_can_be_sent(
    fields: dict[str, Any], s3_config: Any
) -> None:
    job = {"id": "a", "s3Config": s3_config, "input": {"image": IMAGE, "audio": AUDIO, **fields}}
    try:
        request = job_request.parse(job)
    except WorkerError as error:
        text = json.dumps(error.to_output(stage="parse"), allow_nan=False)
        assert text.encode()
        assert len(text) < 4000
    else:
        assert request.fingerprint
