"""What a client may send, and what it hears if it sends something else."""

import base64
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avatar_client.contract import request
from avatar_client.contract.job_errors import InputUrlBlockedError, InvalidInputError, WorkerError
from worker.service import job_request

IMAGE = base64.b64encode(b"an image").decode()
AUDIO = "https://example.com/speech.wav"
S3 = {"endpointUrl": "https://s3.example.com", "accessId": "id", "accessSecret": "hush-hush"}


def parse(top: dict[str, Any] | None = None, **fields: Any) -> job_request.JobRequest:
    return job_request.parse(
        {"id": "job-1", "input": {"image": IMAGE, "audio": AUDIO, **fields}, **(top or {})}
    )


def refusal(**fields: Any) -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught:
        parse(**fields)
    return caught.value


def test_the_defaults_are_the_references_own():
    params = parse().input
    assert (params.resolution, params.num_inference_steps, params.fps) == (704, 50, 25.0)
    assert (params.guidance_scale, params.flow_shift) == (7.5, 5.0)
    assert (params.motion.pose, params.motion.expression) == (25.0, 30.0)
    assert params.seed is None


def test_an_image_is_an_address_a_data_uri_or_base64():
    assert parse(image="https://example.com/a.png").input.image.url == "https://example.com/a.png"
    assert parse(image=f"data:image/png;base64,{IMAGE}").input.image.content == b"an image"
    assert parse(image=f"{IMAGE[:5]}\n{IMAGE[5:]}").input.image.content == b"an image"


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://a/b", "s3://a/b", "gopher://a"])
def test_an_address_of_another_scheme_is_blocked(address: str):
    with pytest.raises(InputUrlBlockedError) as caught:
        parse(image=address)
    assert caught.value.field == "image"
    assert address not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["", "   ", "/etc/passwd", "not base64!", "data:image/png,abc", "data:;base64,", 7, None],
)
def test_anything_else_is_no_image(value: Any):
    assert refusal(image=value).field == "image"


@pytest.mark.parametrize(
    ("given_key", "field", "near"),
    [
        ({"num_inference_step": 4}, "num_inference_step", "num_inference_steps"),
        ({"imege": "x"}, "imege", "image"),
        ({"motion": {"poses": 1}}, "motion.poses", "pose"),
        ({"output": {"deliver": "s3"}}, "output.deliver", "delivery"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_known_one_named(
    given_key: dict[str, Any], field: str, near: str
):
    error = refusal(**given_key)
    assert error.field == field
    assert f"did you mean '{near}'?" in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resolution", 300),
        ("resolution", "704"),
        ("num_inference_steps", 0),
        ("num_inference_steps", 101),
        ("num_inference_steps", 2.5),
        ("num_inference_steps", True),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", 10**400),
        ("flow_shift", 0),
        ("seed", -1),
        ("seed", 2**53),
        ("fps", 24),
        ("preset", "fast"),
        ("face_box", [0, 0, 0, 10]),
        ("face_box", [0, 0, 10]),
        ("face_box", [0, -1, 10, 10]),
        ("audio_start_seconds", -0.1),
        ("max_seconds", 0),
        ("prompt", "x" * 2001),
        ("user_data", "x" * 1001),
        ("user_data", math.nan),
        ("dry_run", "yes"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_field(field: str, value: Any):
    error = refusal(**{field: value})
    assert (error.field or "").split(".")[0] == field
    assert error.code == "INVALID_INPUT"


def test_null_means_the_default():
    nothing = dict.fromkeys(("seed", "preset", "fps", "face_box", "num_inference_steps", "motion"))
    assert parse(**nothing).input == parse().input


@pytest.mark.parametrize(
    "key", ["../a.mp4", "a/../b.mp4", "/a.mp4", "a//b", "a b", "a\n", "é.mp4", ""]
)
def test_a_key_cannot_leave_its_prefix(key: str):
    assert refusal(output={"key": key}).field == "output.key"
    assert refusal(output={"prefix": key}).field == "output.prefix"


def test_the_bucket_of_the_job_wins_over_that_of_the_input():
    top = {"s3Config": {**S3, "bucketName": "top"}}
    request = parse(top, s3Config={**S3, "bucketName": "input"})
    assert request.bucket is not None
    assert (request.bucket.name, request.bucket.from_client) == ("top", True)
    request = parse(s3Config={**S3, "bucketName": "input"})
    assert request.bucket is not None
    assert request.bucket.name == "input"


def test_a_bucket_without_keys_is_named_where_it_stands():
    with pytest.raises(InvalidInputError) as caught:
        parse({"s3Config": {"endpointUrl": "https://s3.example.com"}})
    assert caught.value.field == "s3Config.accessId"


def test_no_secret_and_no_content_stands_in_a_requests_text():
    text = repr(parse(s3Config=S3, image=base64.b64encode(b"face" * 100).decode()))
    assert "hush-hush" not in text
    assert "faceface" not in text


def test_two_deliveries_of_a_job_have_one_fingerprint_and_another_request_has_another():
    assert parse(seed=1).fingerprint == parse(seed=1).fingerprint
    different = [parse(seed=2), parse(image=AUDIO), parse(motion={"pose": 1}), parse(fps=12.5)]
    assert len({request.fingerprint for request in [parse(seed=1), *different]}) == 5
    # how the video is handed over does not change the video
    assert parse(user_data=1, output={"key": "a.mp4"}).fingerprint == parse().fingerprint


def test_an_id_that_cannot_stand_in_a_key_is_replaced():
    assert job_request.safe_id("sync-1a2b-e1") == "sync-1a2b-e1"
    for hostile in ["../../etc", "a\nb", "", None, "x" * 200, "\ud800"]:
        assert job_request.safe_id(hostile).isalnum()


def test_the_room_in_a_reply_depends_on_how_the_job_was_sent():
    job = {"input": {"image": IMAGE, "audio": AUDIO}}
    small = job_request.parse({"id": "a-e1", **job}).max_inline_characters
    assert job_request.parse({"id": "sync-a-e1", **job}).max_inline_characters > small


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_an_input_that_is_no_object_is_refused(value: Any):
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
FIELDS = st.sampled_from([*request.JobInput.model_fields, "s3Config"])


@given(st.dictionaries(FIELDS | st.text(), JSON, max_size=6), JSON)
def test_any_json_is_either_a_request_or_a_refusal_that_can_be_sent(
    fields: dict[str, Any], s3_config: Any
):
    job = {"id": "a", "s3Config": s3_config, "input": {"image": IMAGE, "audio": AUDIO, **fields}}
    try:
        request = job_request.parse(job)
    except WorkerError as error:
        text = json.dumps(error.to_output(stage="parse"), allow_nan=False)
        assert text.encode()
        assert len(text) < 4000
    else:
        assert request.fingerprint
