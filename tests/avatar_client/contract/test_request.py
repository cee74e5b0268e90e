"""What a client may send, and what it hears if it sends something else."""

import base64
import math
from typing import Any

import pytest

from avatar_client.contract.job_errors import InputUrlBlockedError, InvalidInputError
from avatar_client.contract.request import JobInput, validated

IMAGE = base64.b64encode(b"an image").decode()
AUDIO = "https://example.com/speech.wav"


def parse(**fields: Any) -> JobInput:
    return validated(JobInput, {"image": IMAGE, "audio": AUDIO, **fields})


def refusal(**fields: Any) -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught:
        parse(**fields)
    return caught.value


def test_the_defaults_are_the_references_own() -> None:
    params = parse()
    assert (params.resolution, params.num_inference_steps, params.fps) == (704, 50, 25.0)
    assert (params.guidance_scale, params.flow_shift) == (7.5, 5.0)
    assert (params.motion.pose, params.motion.expression) == (25.0, 30.0)
    assert params.seed is None


def test_an_image_is_an_address_a_data_uri_or_base64() -> None:
    assert parse(image="https://example.com/a.png").image.url == "https://example.com/a.png"
    assert parse(image=f"data:image/png;base64,{IMAGE}").image.content == b"an image"
    assert parse(image=f"{IMAGE[:5]}\n{IMAGE[5:]}").image.content == b"an image"


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://a/b", "s3://a/b", "gopher://a"])
def test_an_address_of_another_scheme_is_blocked(address: str) -> None:
    with pytest.raises(InputUrlBlockedError) as caught:
        parse(image=address)
    assert caught.value.field == "image"
    assert address not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["", "   ", "./portrait.png", "not base64!", "data:image/png,abc", "data:;base64,", 7, None],
)
def test_anything_else_is_no_image(value: Any) -> None:
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
) -> None:
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
def test_a_value_out_of_range_is_refused_by_its_field(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert (error.field or "").split(".")[0] == field
    assert error.code == "INVALID_INPUT"


def test_null_means_the_default() -> None:
    nothing = dict.fromkeys(("seed", "preset", "fps", "face_box", "num_inference_steps", "motion"))
    assert parse(**nothing) == parse()


@pytest.mark.parametrize(
    "key", ["../a.mp4", "a/../b.mp4", "/a.mp4", "a//b", "a b", "a\n", "é.mp4", ""]
)
def test_a_key_cannot_leave_its_prefix(key: str) -> None:
    assert refusal(output={"key": key}).field == "output.key"
    assert refusal(output={"prefix": key}).field == "output.prefix"
