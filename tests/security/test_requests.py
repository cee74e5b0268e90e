"""Requests that no client of ours would send: refused by field, and nothing of them is told."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from avatar_client.contract import plain_json
from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.request import JobInput, S3Config
from local_endpoint.client_api import JobSubmission
from tests.security.conftest import SMALL_INPUT, Handle
from worker.service.job import JobRun
from worker.settings import Settings

MARK = "m4rked-S3cret/value+of=a~client"
S3 = {"endpointUrl": "https://s3.example.com", "accessId": "id", "accessSecret": MARK}
SURROGATES = ["\ud800", "a\udfff", "\ud83d", "\udc00\ud800", "x" * 900 + "\udbff"]
NUMBERS = [math.nan, math.inf, -math.inf, 10**400, -(10**400), 10**5000]
NUMBER_FIELDS = [
    "num_inference_steps",
    "guidance_scale",
    "flow_shift",
    "seed",
    "fps",
    "audio_start_seconds",
    "max_seconds",
    "resolution",
]


def job(top: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"id": "job-1", "input": {**SMALL_INPUT, **fields}, **(top or {})}


def require_refusal(output: dict[str, Any], log: str, field: str | None) -> None:
    """Returns if the answer is a refusal that can be sent, and no secret stands anywhere."""
    text = json.dumps(output, allow_nan=False, ensure_ascii=False)
    assert text.encode()
    assert output["error_info"]["code"] == "INVALID_INPUT", text
    assert not output["error_info"]["retryable"]
    if field is not None:
        assert (output["error_info"]["field"] or "").startswith(field), text
    assert len(text) < 4000
    for secret in (MARK, MARK[2:20]):
        assert secret not in text
        assert secret not in log
    assert "Traceback" not in text + log


MISTYPED: list[Any] = [
    {**S3, "secretAccessKey": MARK},
    {"endpointUrl": "https://s3.example.com", "accessId": "id", "secretAccessKey": MARK},
    {**S3, "AccessSecret": MARK},
    {**S3, "accesssecret": MARK},
    {**S3, "access_secret": MARK},
    {**S3, MARK: "accessSecret"},
    {**S3, "bucket": {"secret": MARK}},
    {**S3, "accessSecret": {"value": MARK}},
    {**S3, "accessSecret": [MARK]},
    {**S3, "accessSecret": None, "x": MARK},
    {**S3, "accessId": 7, "password": MARK},
    {**S3, "region": f"region {MARK}"},
    {**S3, "endpointUrl": 5, "note": MARK},
    {**S3, "\u202eterceSssecca": MARK},
    MARK,
    [MARK],
    {"accessSecret": MARK},
    {"s3Config": S3},
]


@pytest.mark.parametrize("config", MISTYPED, ids=range(len(MISTYPED)))
@pytest.mark.parametrize("place", ["input", "top", "both"])
def test_a_mistyped_bucket_is_refused_and_its_secret_told_to_nobody(
    handle: Handle, log: Callable[[], str], config: Any, place: str
) -> None:
    top = {"s3Config": config} if place != "input" else {}
    fields = {"s3Config": config} if place != "top" else {}
    # a key is echoed as far as it names the field, so that a mistyped one can be found
    output = handle(job(top, **fields))
    if isinstance(config, dict) and MARK in config:
        assert MARK in output["error_info"]["field"]
        return
    require_refusal(output, log(), "s3Config")


SECRET_ADDRESS = f"https://me:{MARK}@example.com/a.wav?token={MARK}"


@pytest.mark.parametrize(
    ("speakers", "field"),
    [
        (SECRET_ADDRESS, "speakers"),
        ({"audio": SECRET_ADDRESS}, "speakers"),
        ([SECRET_ADDRESS], "speakers.0"),
        ([[{"audio": SECRET_ADDRESS}]], "speakers.0"),
        ([{"audio": {"url": SECRET_ADDRESS}}], "speakers.0.audio"),
        ([{"audio": SECRET_ADDRESS, "face": MARK}], "speakers.0.face"),
        ([{"audio": SECRET_ADDRESS, "face": {"left": MARK}}], "speakers.0.face"),
        ([{"audio": SECRET_ADDRESS, "face": "9" * 5000}], "speakers.0.face"),
        ([{"audio": SECRET_ADDRESS, "face_box": [MARK] * 4}], "speakers.0.face_box"),
        ([{"audio": SECRET_ADDRESS, "name": f"{MARK}\n\x1b[2J"}], "speakers.0.name"),
        ([{"audio": SECRET_ADDRESS, "name": [MARK]}], "speakers.0.name"),
        ([{"audio": SECRET_ADDRESS, "start_seconds": MARK}], "speakers.0.start_seconds"),
        ([{"audio": SECRET_ADDRESS}] * 5, "speakers"),
        ([{"audio": SECRET_ADDRESS}] * 9000, "speakers"),
        ([{"audio": SECRET_ADDRESS, "face": 0}] * 2, "speakers.1.face"),
    ],
    ids=range(15),
)
def test_speakers_of_any_shape_are_refused_and_nothing_of_them_is_told(
    handle: Handle, log: Callable[[], str], speakers: Any, field: str
) -> None:
    require_refusal(handle(job(audio=None, speakers=speakers)), log(), field)


@pytest.mark.parametrize("text", SURROGATES, ids=ascii)
@pytest.mark.parametrize(
    "fields",
    [
        lambda text: {"user_data": text},
        lambda text: {"user_data": {"a": [1, {"b": text}]}},
        lambda text: {"user_data": {text: 1}},
        lambda text: {"prompt": text},
        lambda text: {"negative_prompt": text},
        lambda text: {"output": {"key": text}},
        lambda text: {"output": {"prefix": text}},
        lambda text: {"image": text},
        lambda text: {"audio": f"https://example.com/{text}"},
        lambda text: {"speakers": [{"audio": "AAAA", "name": text}]},
        lambda text: {"speakers": [{"audio": text}]},
        lambda text: {"preset": text},
        lambda text: {text: 1},
        lambda text: {"s3Config": {**S3, "bucketName": text}},
    ],
)
def test_text_that_has_no_utf8_is_refused(
    handle: Handle, log: Callable[[], str], text: str, fields: Callable[[str], dict[str, Any]]
) -> None:
    given = fields(text)
    [name] = given
    require_refusal(handle(job(**given)), log(), name if name.isascii() else None)


@pytest.mark.parametrize("number", NUMBERS, ids=range(len(NUMBERS)))
@pytest.mark.parametrize(
    "field", [*NUMBER_FIELDS, "user_data", "face_box", "motion", "output", "speakers"]
)
def test_a_number_that_json_or_its_readers_do_not_know_is_refused(
    handle: Handle, log: Callable[[], str], field: str, number: float
) -> None:
    values: dict[str, Any] = {
        "face_box": [0, 0, number, 10],
        "motion": {"pose": number},
        "speakers": [{"audio": "AAAA", "start_seconds": number, "face": number}],
        "output": {"url_expires_seconds": number},
        "user_data": {"a": [number]},
    }
    fields: dict[str, Any] = {field: values.get(field, number)}
    require_refusal(handle(job(**fields)), log(), field)


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("depth", [33, 100, 400, 985, 5000, 100_000])
@pytest.mark.parametrize(
    "field", ["user_data", "prompt", "s3Config", "image", "speakers", "unknown"]
)
def test_a_value_that_is_nested_too_deep_is_refused(
    handle: Handle, log: Callable[[], str], field: str, depth: int, kind: str
) -> None:
    require_refusal(handle(job(**{field: nested(depth, kind)})), log(), field)


@pytest.mark.parametrize("depth", [40, 985, 100_000, 400_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_a_job_that_json_itself_fails_at_is_read_and_refused(
    handle: Handle, log: Callable[[], str], depth: int, brackets: str
) -> None:
    begin = "[" if brackets == "[]" else '{"a":'
    deep = begin * depth + "1" + brackets[1] * depth
    fields = json.dumps(SMALL_INPUT)[1:-1]
    text = f'{{"input": {{{fields}, "user_data": {deep}, "seed": 3}}, "id": "job-1"}}'
    read = plain_json.read(text.encode())
    assert (read["id"], read["input"]["seed"]) == ("job-1", 3)
    require_refusal(handle(read), log(), "user_data")


@pytest.mark.parametrize(
    "text",
    [
        '{"id": "a", "n": ' + "9" * 5000 + "}",
        '{"id": "a", "n": -' + "9" * 1_000_000 + "}",
        '{"id": "a", "n": 1e999}',
        '{"id": "a", "n": NaN}',
    ],
    ids=range(4),
)
def test_a_number_that_is_too_long_is_read_as_one_that_is_refused(text: str) -> None:
    assert not math.isfinite(plain_json.read(text.encode())["n"])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'"' + b"\\" * 100_001,
        b'{"a": "' + b"\\u0000" * 50_000,
        b"\xff\xfe",
        b"]" * 100_000,
        b'{"a":' * 1_500_000 + b"1" + b"}" * 1_500_000,  # it could be cut, at the worker's cost
    ],
    ids=range(9),
)
def test_what_is_no_json_is_said_to_be_none(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the decoder's own
        plain_json.read(text)


KEYS = [
    "",
    " ",
    "\x00",
    "\x1b[2J",
    "a\nb",
    "\u202e\u202dkey",
    "\u2066x",
    "ключ",
    "🗝" * 50,
    "k" * 10_000,
    "x" * 1_000_000,
    "__proto__",
    "__class__",
    "image ",
    "Image",
    "input.image",
    "{0}",
    "%s%n",
    "${jndi:ldap://x}",
    "<script>",
    "../..",
]


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
@pytest.mark.parametrize("place", ["input", "motion", "output", "speakers"])
def test_an_unknown_key_is_named_in_short_and_in_print(
    handle: Handle, log: Callable[[], str], key: str, place: str
) -> None:
    fields: dict[str, Any] = {key: 1} if place == "input" else {place: {key: 1}}
    if place == "speakers":
        fields = {"audio": None, "speakers": [{"audio": "A" * 80, key: 1}]}
    output = handle(job(**fields))
    require_refusal(output, log(), None)
    named = output["error_info"]["field"]
    assert named is None or (named.isascii() and named.isprintable() and len(named) <= 80)
    assert "unknown key" in output["error"]


@pytest.mark.parametrize(
    "fields",
    [
        {"unknown": [0] * 10_001},
        {"unknown": [[0] * 200] * 200},
        {f"k{number}": 1 for number in range(20_000)},
        {"user_data": {f"k{number}": 1 for number in range(10_001)}},
        {"face_box": [1] * 1_000_000},
        {"prompt": "x" * 5_000_000},
        {"user_data": "\u202e" * 1001},
        {"face_box": [0, 0, 1e-9, 1e-9]},
        {"face_box": [0, 0, 0.5, 100]},
        {"face_box": [-0.0, 0, 5e-324, 5e-324]},
        {"face_box": []},
        {"face_box": {}},
        {"face_box": "1,2,3,4"},
        {"image": {"url": "x"}},
        {"image": ["https://example.com"]},
        {"image": ""},
        {"audio": "data:,"},
        {"audio": "data:audio/wav;base64,"},
        {"audio": "AAAA" * 10 + "\x00"},
        {"audio": "https://" + "a" * 5000},
        {"image": "https://exa\tmple.com"},
    ],
    ids=range(21),
)
def test_a_value_of_an_odd_size_or_kind_is_refused(
    handle: Handle, log: Callable[[], str], fields: dict[str, Any]
) -> None:
    [name, *more] = fields
    require_refusal(handle(job(**fields)), log(), None if more else name)


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        -(10**300),
        1e308,
        "ключ",
        "\u202eright to left",
        "\x00\x1b",
        "🗝\u200d",
        nested(30, "dict"),
    ],
    ids=range(9),
)
def test_what_can_be_sent_comes_back_as_it_was(handle: Handle, value: Any) -> None:
    output = handle(job(user_data=value))
    assert output["user_data"] == value
    assert json.dumps(output, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "value", [None, [], "text", 3, 10**5000, nested(5000, "list"), math.nan], ids=range(7)
)
@pytest.mark.parametrize("top", ["input", "id", "s3Config", "webhook", "policy"])
def test_a_job_of_another_shape_is_no_surprise(
    handle: Handle, log: Callable[[], str], top: str, value: Any
) -> None:
    output = handle({**job(), top: value})
    assert output.get("error_info", {}).get("code", "INVALID_INPUT") == "INVALID_INPUT"
    assert "Traceback" not in log()


@pytest.mark.parametrize("field", list(JobInput.model_fields))
def test_an_unforeseen_exception_tells_a_reference_and_nothing_else(
    handle: Handle, log: Callable[[], str], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(f"{field} in a library's own error: {MARK}")

    monkeypatch.setattr(plain_json, "require_plain", fail)
    output = handle(job({"s3Config": {"oddly": MARK}}))
    assert output["error_info"]["code"] == "INTERNAL"
    assert MARK not in json.dumps(output)
    reference = output["error_info"]["message"].rpartition(" ")[2]
    assert f"reference {reference}" in log()
    assert "RuntimeError" in log()  # for the operator, with the secret taken out
    assert MARK not in log()


@pytest.mark.parametrize(
    "value",
    [*SURROGATES[:3], *NUMBERS[:2], 10**5000, object(), b"bytes", nested(5000, "list")],
    ids=range(9),
)
def test_a_result_that_cannot_be_sent_is_an_error_that_can(
    monkeypatch: pytest.MonkeyPatch, handle: Handle, log: Callable[[], str], value: Any
) -> None:
    monkeypatch.setattr(JobRun, "execute", lambda *_: {"user_data": value})
    output = handle(job())
    assert output["error_info"]["code"] == "INTERNAL"
    assert json.dumps(output, allow_nan=False, ensure_ascii=False).encode()
    assert output["error_info"]["message"].rpartition(" ")[2] in log()


@pytest.mark.parametrize("model", [JobInput, S3Config, BucketSettings, Settings, JobSubmission])
def test_what_a_model_says_of_a_wrong_value_does_not_hold_it(model: type[BaseModel]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"accessSecret": {"x": MARK}, "input": MARK, "zzz": MARK})
    assert MARK not in str(caught.value)
    assert MARK not in repr(caught.value)
