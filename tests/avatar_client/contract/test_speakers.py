"""Who may speak in a video, how a request says it, and what is refused by which field."""

import base64
from typing import Any

import pytest

from avatar_client.contract.job_errors import InputUrlBlockedError, InvalidInputError, WorkerError
from avatar_client.contract.request import JobInput
from avatar_client.contract.schema import described_fields, validated

IMAGE = base64.b64encode(b"an image").decode()
AUDIO = "https://example.com/speech.wav"


def parse(*speakers: Any, **fields: Any) -> JobInput:
    return validated(JobInput, {"image": IMAGE, "speakers": list(speakers), **fields})


def voice(**fields: Any) -> dict[str, Any]:
    return {"audio": AUDIO, **fields}


def refusal(*speakers: Any, **fields: Any) -> WorkerError:
    with pytest.raises((InvalidInputError, InputUrlBlockedError)) as caught:
        parse(*speakers, **fields)
    return caught.value


def test_one_recording_is_the_short_form_of_one_speaker() -> None:
    short = validated(JobInput, {"image": IMAGE, "audio": AUDIO, "face_box": [1, 2, 3, 4]})
    long = parse(voice(face_box=[1, 2, 3, 4]))
    assert short.voices == long.voices
    assert (short.field_of(0, "audio"), long.field_of(0, "audio")) == ("audio", "speakers.0.audio")


@pytest.mark.parametrize(
    ("given", "face"),
    [("left", "left"), (" Right", "right"), (0, 0), ("2", 2), (3.0, 3), ("", None), (None, None)],
)
def test_a_face_is_a_side_or_an_index_however_a_tool_writes_it(given: Any, face: Any) -> None:
    assert parse(voice(face=given)).voices[0].face == face


def test_what_is_left_open_of_a_speaker_means_the_default() -> None:
    open_ = {"face": "", "face_box": "", "start_seconds": "", "name": " "}
    assert parse(voice(**open_)).voices == parse(voice()).voices
    filled = parse(voice(face_box=["1", "2", 3.0, "4.5"], start_seconds="1.5", name=" Ada ")).voices
    assert filled == parse(voice(face_box=[1, 2, 3, 4.5], start_seconds=1.5, name="Ada")).voices


@pytest.mark.parametrize("face", ["middle", "-1", -1, 1.5, True, [0], "٣"])
def test_anything_else_is_no_face(face: Any) -> None:
    assert refusal(voice(), voice(face=face)).field == "speakers.1.face"


@pytest.mark.parametrize(
    ("speakers", "field"),
    [
        ([], "speakers"),
        ([voice()] * 5, "speakers"),
        (["a.wav"], "speakers.0"),
        ([voice(), {}], "speakers.1.audio"),
        ([voice(), {"audio": "./b.wav"}], "speakers.1.audio"),
        ([voice(), voice(start_seconds=-1)], "speakers.1.start_seconds"),
        ([voice(), voice(start_seconds="soon")], "speakers.1.start_seconds"),
        ([voice(), voice(face_box=[0, 0, 0, 9])], "speakers.1.face_box"),
        ([voice(), voice(face_box=[-1, 0, 9, 9])], "speakers.1.face_box"),
        ([voice(), voice(face_box="left")], "speakers.1.face_box"),
        ([voice(), voice(face=0, face_box=[0, 0, 9, 9])], "speakers.1.face"),
        ([voice(face=0), voice(face="left")], "speakers.1.face"),
        ([voice(face=1), voice(), voice(face=1)], "speakers.2.face"),
        ([voice(), voice(name="a\nb")], "speakers.1.name"),
        ([voice(), voice(name="a\u202eb")], "speakers.1.name"),
        ([voice(), voice(name="a" * 61)], "speakers.1.name"),
        ([voice(), voice(name=7)], "speakers.1.name"),
        ([voice(), voice(faces=0)], "speakers.1.faces"),
    ],
)
def test_a_wrong_speaker_is_refused_by_field_and_index(speakers: list[Any], field: str) -> None:
    error = refusal(*speakers)
    assert (error.code, error.field) == ("INVALID_INPUT", field)


def test_a_refusal_says_what_is_meant_in_plain_words() -> None:
    assert refusal(*[voice()] * 5).message == "must have at most 4 items, not 5"
    assert refusal("a.wav").message == "must be an object"
    assert refusal(speakers={}).message == "must be a list"
    assert refusal(voice(fase=0)).message == "unknown key; did you mean 'face'?"


def test_an_address_of_another_scheme_is_blocked_by_index() -> None:
    error = refusal(voice(), {"audio": "file:///etc/passwd"})
    assert isinstance(error, InputUrlBlockedError)
    assert error.field == "speakers.1.audio"


@pytest.mark.parametrize(
    ("other", "is_taken"),
    [
        ([100, 0, 50, 50], True),  # they touch
        ([99.5, 0, 50, 50], True),  # what rounding makes
        ([0, 120, 100, 50], True),
        ([80, 0, 50, 50], False),
        ([20, 20, 10, 10], False),  # one in the other
        ([0, 0, 100, 120], False),  # the same
    ],
)
def test_boxes_may_touch_and_not_overlap(other: list[float], is_taken: bool) -> None:
    speakers = [voice(face_box=[0, 0, 100, 120]), voice(), voice(face_box=other)]
    if is_taken:
        assert len(parse(*speakers).voices) == 3
        return
    error = refusal(*speakers)
    assert error.field == "speakers.2.face_box"
    assert "speakers.0" in error.message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"audio": AUDIO}, "speakers"),
        ({"face_box": [0, 0, 9, 9]}, "face_box"),
        ({"audio_start_seconds": 1}, "audio_start_seconds"),
        ({"pause_seconds": 1}, "pause_seconds"),
        ({"pause_seconds": 6, "order": "in_turn"}, "pause_seconds"),
        ({"order": "mixed"}, "order"),
        ({"trim_silence": "perhaps"}, "trim_silence"),
        ({"max_seconds": 2.0}, "speakers.1.start_seconds"),
    ],
)
def test_what_contradicts_the_speakers_is_refused_by_the_field_to_change(
    fields: dict[str, Any], field: str
) -> None:
    assert refusal(voice(), voice(start_seconds=2), **fields).field == field


def test_in_turn_a_start_is_a_pause_and_lies_before_no_end() -> None:
    speakers = [voice(), voice(start_seconds=2)]
    assert parse(*speakers, order="in_turn", pause_seconds=0.3, max_seconds=2).order == "in_turn"


def test_a_request_without_a_voice_is_told_of_both_ways() -> None:
    with pytest.raises(InvalidInputError, match="speakers") as caught:
        validated(JobInput, {"image": IMAGE})
    assert caught.value.field == "audio"


def test_what_a_speaker_may_hold_is_described_beside_the_other_fields() -> None:
    described = dict(described_fields(JobInput))
    assert described["speakers"]["maxItems"] == 4
    for name in ("audio", "face", "face_box", "start_seconds", "name"):
        assert described[f"speakers.N.{name}"]["description"].endswith(".")
