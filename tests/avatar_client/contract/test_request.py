"""What a client may send, and what it hears if it sends something else."""

import base64
import math
from typing import Any

import pytest

from avatar_client.contract.job_errors import InputUrlBlockedError, InvalidInputError
from avatar_client.contract.request import JobInput
from avatar_client.contract.schema import validated

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


def test_a_video_keeps_its_portraits_shape_unless_another_is_named() -> None:
    output = parse().output
    assert (output.aspect, output.fit, output.background) == ("source", "cover", None)
    assert (output.format, output.codec, output.quality) == ("mp4", None, None)
    assert parse(output={"quality": "20"}).output.quality == 20  # a form's


@pytest.mark.parametrize(
    ("output", "field"),
    [
        ({"aspect": "3:2"}, "output.aspect"),
        ({"fit": "stretch"}, "output.fit"),
        ({"fit": "contain", "aspect": "1:1", "background": "white"}, "output.background"),
        ({"fit": "contain", "aspect": "1:1", "background": "#fff"}, "output.background"),
        ({"fit": "contain", "background": "blur"}, "output.background"),  # the portrait's own shape
        ({"aspect": "1:1", "background": "#000000"}, "output.background"),
        ({"format": "avi"}, "output.format"),
        ({"codec": "av1"}, "output.codec"),
        ({"format": "webm", "codec": "hevc"}, "output.codec"),
        ({"format": "webm", "codec": "h264"}, "output.codec"),
        ({"codec": "vp9"}, "output.codec"),
        ({"quality": 0}, "output.quality"),
        ({"quality": 52}, "output.quality"),
        ({"quality": 17.5}, "output.quality"),
        ({"format": "webm", "key": "a/b.mp4"}, "output.key"),
        ({"key": "a/b.WebM"}, "output.key"),
        ({"watermark": {}}, "output.watermark"),
        ({"watermark": {"text": "a", "image": IMAGE}}, "output.watermark"),
        ({"watermark": {"text": "  "}}, "output.watermark.text"),
        ({"watermark": {"text": "a\nb"}}, "output.watermark.text"),
        ({"watermark": {"text": "ÄÖ"}}, "output.watermark.text"),
        ({"watermark": {"text": "a" * 81}}, "output.watermark.text"),
        ({"watermark": {"image": "./a.png"}}, "output.watermark.image"),
        ({"watermark": {"text": "a", "place": "middle"}}, "output.watermark.place"),
        ({"watermark": {"text": "a", "opacity": 0}}, "output.watermark.opacity"),
        ({"watermark": {"text": "a", "opacity": 1.1}}, "output.watermark.opacity"),
    ],
)
def test_a_shape_or_a_file_that_cannot_be_made_is_refused_by_field(
    output: dict[str, Any], field: str
) -> None:
    assert refusal(output=output).field == field


@pytest.mark.parametrize(
    "output",
    [
        {"fit": "contain", "aspect": "9:16", "background": "#1A2b3c"},
        {"format": "webm", "codec": "vp9", "quality": 51, "key": "a/b.webm"},
        {"codec": "hevc", "key": "video"},
        {"key": "my.webm.files/video"},
    ],
)
def test_what_fits_together_is_taken(output: dict[str, Any]) -> None:
    taken = parse(output=output).output
    assert taken.model_dump(include=set(output)) == output


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
        ("resolution", "704px"),
        ("resolution", "704.5"),
        ("seed", "0x10"),
        ("seed", "٤٢"),
        ("seed", "9" * 50),
        ("seed", 42.5),
        ("guidance_scale", "1e999"),
        ("guidance_scale", "nan"),
        ("guidance_scale", True),
        ("guidance_scale", "7,5"),
        ("face_box", "0, 0, 10, 10"),
        ("face_box", [True, 0, 10, 10]),
        ("prompt", 7),
        ("dry_run", 1),
        ("output", {"thumbnail": "on"}),
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


@pytest.mark.parametrize("nothing", [None, "", "  "])
def test_what_is_left_open_means_the_default(nothing: Any) -> None:
    numbers = ("seed", "fps", "face_box", "num_inference_steps", "max_seconds", "dry_run")
    nested = {"motion": {"pose": nothing}, "output": {"thumbnail": nothing, "key": None}}
    assert parse(**dict.fromkeys(numbers, nothing), **nested) == parse()
    assert parse(preset=None, motion=None, output=None, s3Config=None) == parse()


@pytest.mark.parametrize(
    ("field", "written", "meant"),
    [
        ("seed", 42.0, 42),
        ("seed", "42", 42),
        ("seed", " 42.0 ", 42),
        ("seed", "9007199254740991", 2**53 - 1),
        ("resolution", "512", 512),
        ("resolution", 512.0, 512),
        ("guidance_scale", "7.5", 7.5),
        ("guidance_scale", 7, 7.0),
        ("fps", "25", 25.0),
        ("max_seconds", "1e1", 10.0),
        ("face_box", ["1", 2.0, "3.5", 4], (1.0, 2.0, 3.5, 4.0)),
        ("dry_run", "true", True),
        ("dry_run", "False", False),
        ("prompt", "42", "42"),
        ("negative_prompt", "", ""),
        ("user_data", "42", "42"),
        ("user_data", {"a": None}, {"a": None}),
    ],
)
def test_tools_without_code_may_write_values_their_way(
    field: str, written: Any, meant: Any
) -> None:
    value = getattr(parse(**{field: written}), field)
    assert (value, type(value)) == (meant, type(meant))


def test_they_may_inside_objects_too() -> None:
    params = parse(
        motion={"pose": "30", "expression": None},
        output={"url_expires_seconds": "60", "thumbnail": "true", "overwrite": ""},
        s3Config={"endpointUrl": "https://s", "accessId": "a", "accessSecret": "7", "region": None},
    )
    assert (params.motion.pose, params.motion.expression) == (30.0, 30.0)
    assert params.output.url_expires_seconds == 60
    assert (params.output.thumbnail, params.output.overwrite) == (True, False)
    assert params.s3_config is not None
    assert params.s3_config.secret_access_key.get_secret_value() == "7"


@pytest.mark.parametrize(
    "key", ["../a.mp4", "a/../b.mp4", "/a.mp4", "a//b", "a b", "a\n", "é.mp4", ""]
)
def test_a_key_cannot_leave_its_prefix(key: str) -> None:
    assert refusal(output={"key": key}).field == "output.key"
    assert refusal(output={"prefix": key}).field == "output.prefix"
