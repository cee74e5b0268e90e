"""A signed result: a good one is accepted and any other refused, in Python and in JavaScript."""

import json
import math
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from avatar_client import JobStatus, SignatureError
from avatar_client.contract import signature

KEY = "0123456789abcdef" * 2
DOCUMENT = Path(__file__).parents[3] / "docs" / "signatures.md"
OUTPUT: dict[str, Any] = {
    "request_id": "order-1",
    "video_url": "https://s3.example.com/a.mp4?X-Amz-Signature=abc&x=<>",
    "key": "avatar/requests/order-1.mp4",
    "sha256": "0" * 64,
    "size_bytes": 18_000,
    "fps": 25.0,
    "duration_seconds": 5.16,
    "user_data": {"é": [1e-7, 1e21, -0.0, None, True], "\U0001f600": 1, "\uffee": "\u2028\x1f\x7f"},
    "warnings": ['a "word"\n'],
}
Body = dict[str, Any]


def body(life_seconds: int = 60, job_id: str = "job-1", **changes: Any) -> Body:
    """What a webhook is sent, from a worker with the key."""
    output = json.loads(json.dumps(OUTPUT | changes))
    output["signature"] = signature.sign(KEY, job_id, output, life_seconds)
    return {"id": job_id, "status": "COMPLETED", "output": output, "input": {}}


def altered(name: str, value: Any) -> Callable[[], Body]:
    def make() -> Body:
        sent = body()
        sent["output"][name] = value
        return sent

    return make


def without(name: str) -> Callable[[], Body]:
    def make() -> Body:
        sent = body()
        del sent["output"][name]
        return sent

    return make


def forged(change: Callable[[str], Any]) -> Callable[[], Body]:
    return lambda: altered("signature", change(body()["output"]["signature"]))()


def of_another_key() -> Body:
    output = dict(OUTPUT)
    output["signature"] = signature.sign("f" * 32, "job-1", output, 60)
    return {"id": "job-1", "status": "COMPLETED", "output": output}


def later(told: str) -> str:
    version, expires, mac = told.split(".")
    return f"{version}.{int(expires) + 1}.{mac}"


REFUSED: dict[str, Callable[[], Body]] = {
    "not signed": without("signature"),
    "another key": of_another_key,
    "another job's": lambda: body(job_id="job-2") | {"id": "job-1"},
    "expired": lambda: body(-1),
    "made to live longer": forged(later),
    "cut": forged(lambda told: told[:-1]),
    "one letter": forged(lambda told: told[:-1] + ("0" if told[-1] != "0" else "1")),
    "not ASCII": forged(lambda told: told[:-1] + "é"),
    "Arabic digits": forged(lambda told: told.replace("v1.", "v1.٣")),
    "a line more": forged(lambda told: told + "\n"),
    "another version": forged(lambda told: "v2" + told[2:]),
    "a number": forged(lambda told: 1),
    "nothing": forged(lambda told: None),
    "no output": lambda: body() | {"output": None},
    "an output of text": lambda: body() | {"output": "x"},
    "another file": altered("sha256", "1" * 64),
    "another address": altered("video_url", "https://evil.example/a.mp4"),
    "another key of the object": altered("key", "avatar/requests/order-2.mp4"),
    "another request": altered("request_id", "order-2"),
    "another number": altered("duration_seconds", 5.17),
    "other words": altered("warnings", []),
    "one field more": altered("reused", True),
    "one field less": without("user_data"),
}


def test_a_good_body_is_accepted_however_it_was_written_anew() -> None:
    sent = body()
    told = json.loads(json.dumps(sent, sort_keys=True, ensure_ascii=False).replace("25.0", "25"))
    for key in (KEY, SecretStr(KEY)):
        assert JobStatus.parse(told, signing_key=key).output == sent["output"]


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_any_other_body_is_refused(make: Callable[[], Body]) -> None:
    with pytest.raises(SignatureError) as caught:
        JobStatus.parse(make(), signing_key=KEY)
    assert KEY not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_status_without_a_result_needs_no_signature() -> None:
    for status in ("IN_PROGRESS", "FAILED", "CANCELLED"):
        told: Body = {"id": "job-1", "status": status, "output": {}, "error": "INTERNAL: x"}
        assert JobStatus.parse(told, signing_key=KEY).output is None


@pytest.mark.parametrize("key", ["", "short", "a" * 31, "a" * 31 + " ", "ä" * 32, "a" * 32 + "\n"])
def test_a_key_that_is_none_is_an_error_of_its_own(key: str) -> None:
    with pytest.raises(ValueError, match="openssl rand"):
        signature.require_key(key)
    with pytest.raises(ValueError, match="openssl rand") as caught:
        JobStatus.parse(body(), signing_key=key)
    assert not isinstance(caught.value, SignatureError)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_written_so_that_it_is_read_again(value: float) -> None:
    assert float(signature.canonical(value)) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, {1: 2}, b"x", {"a": object()}])
def test_what_is_no_json_has_no_canonical_form(value: Any) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError, AttributeError)):
        signature.canonical(value)


def numbers() -> list[float]:
    """Doubles of all kinds: of each power of ten, and of bits without order."""
    powers = [sign * digits * 10.0**power for sign in (1, -1) for digits in (1, 1.5, 123456789.125)
              for power in range(-30, 30)]  # fmt: skip
    drawn = (struct.unpack("<d", struct.pack("<Q", n * 0x9E3779B97F4A7C15 % 2**64))[0]
             for n in range(1, 2000))  # fmt: skip
    return powers + [value for value in drawn if math.isfinite(value)]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to compare")
def test_the_documents_javascript_says_the_same_of_each_body(tmp_path: Path) -> None:
    [code] = re.findall(r"```js\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert sum(map(bool, code.splitlines())) <= 12
    good = [
        body(),
        body(user_data=numbers()),
        body(user_data={chr(n) + "x": chr(n) for n in (*range(1, 300), 0xFFEE, 0x1F600)}),
        body(user_data=[2**53, 12345678901234567890, -5, 0]),
    ]
    bodies = good + [make() for make in REFUSED.values()]
    (tmp_path / "bodies.json").write_text(json.dumps(bodies))
    (tmp_path / "check.mjs").write_text(
        code + 'import { readFileSync } from "node:fs";\n'
        'const bodies = JSON.parse(readFileSync("bodies.json"));\n'
        "console.log(JSON.stringify(bodies.map((b) => isGenuine(b, process.env.KEY))));\n"
    )
    done = subprocess.run(
        ["node", "check.mjs"], cwd=tmp_path, env={"KEY": KEY, "PATH": "/usr/bin:/usr/local/bin"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = dict(zip([*"abcd", *REFUSED], json.loads(done.stdout), strict=True))
    assert said == dict.fromkeys("abcd", True) | dict.fromkeys(REFUSED, False)


def test_the_documents_python_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["received"](body(), KEY).id == "job-1"
    assert names["received"](body(-1), KEY) is None
    assert "has expired" in capsys.readouterr().out


def test_a_signature_lives_as_long_as_it_was_told() -> None:
    told = signature.sign(KEY, "job-1", {}, 60)
    assert int(told.split(".")[1]) == pytest.approx(time.time() + 60, abs=30)
