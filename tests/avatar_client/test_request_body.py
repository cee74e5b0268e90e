"""The body of a request: what is refused before anything is sent, and how files travel."""

import base64
from pathlib import Path
from typing import Any

import pytest

from avatar_client import request_body
from avatar_client.contract import InputUrlBlockedError, InvalidInputError
from tests.avatar_client.answers import AUDIO, IMAGE
from tests.support.scripted_server import ScriptedServer


def test_files_travel_in_the_request_and_addresses_as_they_are(client: Any, tmp_path: Path) -> None:
    path = tmp_path / "portrait.png"
    path.write_bytes(b"picture")

    body = client.request(path, AUDIO, prompt="Hello.", motion={"pose": 10.0}, seed=3)

    assert body["input"] == {
        "image": base64.b64encode(b"picture").decode(),
        "audio": AUDIO,
        "prompt": "Hello.",
        "motion": {"pose": 10.0},
        "seed": 3,
    }
    assert client.request(IMAGE, b"sound")["input"]["audio"] == base64.b64encode(b"sound").decode()


def test_each_speakers_recording_travels_as_the_one_of_a_single_voice(
    client: Any, tmp_path: Path
) -> None:
    path = tmp_path / "left.wav"
    path.write_bytes(b"left")
    given: list[dict[str, Any]] = [
        {"face": "left", "audio": path},
        {"audio": b"right"},
        {"audio": AUDIO, "name": "C"},
    ]

    body = client.request(IMAGE, speakers=given, order="in_turn")

    assert body["input"] == {
        "image": IMAGE,
        "speakers": [
            {"face": "left", "audio": base64.b64encode(b"left").decode()},
            {"audio": base64.b64encode(b"right").decode()},
            {"audio": AUDIO, "name": "C"},
        ],
        "order": "in_turn",
    }
    assert given[0]["audio"] is path  # the caller's own stay as they are


@pytest.mark.parametrize(
    ("speakers", "field"),
    [
        ([{"audio": AUDIO}, {"audio": Path("nowhere.wav")}], "speakers.1.audio"),
        ([{"audio": AUDIO}, {"audio": "right.wav"}], "speakers.1.audio"),
        ([{"audio": AUDIO}, {"audio": b"s" * 8_000_000}], "speakers.1.audio"),
        ([{"audio": AUDIO}, {"audio": "data:audio/wav;base64," + "A" * 10**7}], "speakers.1.audio"),
        ([{"audio": AUDIO}, {"face": "left"}], "speakers.1.audio"),
        ([{"audio": AUDIO, "face": "top"}], "speakers.0.face"),
        ([{"audio": AUDIO}, "right.wav"], "speakers.1"),
        ({"audio": AUDIO}, "speakers"),
        ([], "speakers"),
    ],
)
def test_a_wrong_speaker_is_named_before_anything_is_sent(
    client: Any, server: ScriptedServer, speakers: Any, field: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        client.submit(IMAGE, speakers=speakers)
    assert caught.value.field == field
    assert server.requests == []


def test_the_platform_is_told_how_long_the_job_may_take(client: Any) -> None:
    assert client.request(IMAGE, AUDIO)["policy"] == {"executionTimeout": 3_600_000}
    body = client.request(IMAGE, AUDIO, execution_timeout_seconds=90.5, webhook="https://me.com/")
    assert (body["policy"], body["webhook"]) == ({"executionTimeout": 90_500}, "https://me.com/")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"image": Path("nowhere.png")}, "image"),
        ({"image": Path()}, "image"),
        ({"image": b""}, "image"),
        ({"image": None}, "image"),
        ({"audio": None}, "audio"),
        ({"speakers": [{"audio": AUDIO}]}, "speakers"),  # and audio
        ({"image": "portrait.png"}, "image"),
        ({"audio": "data:audio/wav,raw"}, "audio"),
        ({"audio": "data:audio/wav;base64," + "A" * 10_000_000}, "audio"),
        ({"resolution": 500}, "resolution"),
        ({"motion": {"pose": 101}}, "motion.pose"),
        ({"promt": "Hello."}, "promt"),
        ({"user_data": {1, 2}}, "user_data"),
        ({"execution_timeout_seconds": 4}, "policy.executionTimeout"),
        ({"execution_timeout_seconds": float("nan")}, "policy.executionTimeout"),
        ({"webhook": "example.com"}, "webhook"),
        ({"webhook": "https://[x"}, "webhook"),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_sent(
    client: Any, server: ScriptedServer, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        client.submit(**{"image": IMAGE, "audio": AUDIO, **options})
    assert caught.value.field == field
    assert server.requests == []


def test_an_address_of_another_scheme_is_refused_before_anything_is_sent(
    client: Any, server: ScriptedServer
) -> None:
    with pytest.raises(InputUrlBlockedError):
        client.submit("ftp://example.com/a.png", AUDIO)
    assert server.requests == []


def test_a_file_that_does_not_fit_needs_a_bucket(client: Any, server: ScriptedServer) -> None:
    with pytest.raises(InvalidInputError, match=r"8000000 bytes .* URL, or .* bucket") as caught:
        client.submit(b"p" * 1000, b"s" * 8_000_000)
    assert caught.value.field == "audio"
    assert server.requests == []


def test_the_largest_request_that_is_built_fits_the_platform(client: Any) -> None:
    room_bytes = request_body.MAX_BODY_BYTES - 300
    body = client.request(b"p" * (room_bytes // 8 * 3), b"s" * (room_bytes // 8 * 3))
    assert 9_900_000 < len(request_body.encode(body)) <= 10_000_000
