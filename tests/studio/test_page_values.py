"""The studio without its page: controls, snippets, history, and what is said about a job."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from avatar_client import Progress
from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.contract.request import SPEECH_FIELDS, VIDEO_FIELDS, GenerationParams
from studio import views
from studio.fields import controls, is_output, page_values, request_fields, video_suffix
from studio.history import History, Record, stored_output
from studio.snippets import Request, curl, python
from studio.tracker import JobState
from worker.service import job_request

ROOT = Path(__file__).parents[2]
MEDIA = {"image": "AA==", "audio": "AA=="}
HOSTILE = 'it\'s "5 $HOME" `id` \\n \\ $(id)\nEOF\n日本 100%'


def accepted(fields: dict[str, Any]) -> bool:
    """Whether a worker would take the fields."""
    try:
        job_request.parse({"input": {**MEDIA, **fields}})
    except InvalidInputError:
        return False
    return True


def defaults() -> dict[str, Any]:
    return page_values({})


# Controls


def test_every_field_that_decides_the_frames_or_the_file_has_a_control_with_words_for_it() -> None:
    known = controls()
    shown = {name.partition(".")[0] for name in known if not is_output(name)}
    assert shown == {*GenerationParams.model_fields, *SPEECH_FIELDS}
    assert {name.split(".")[1] for name in known if is_output(name)} == {
        *VIDEO_FIELDS,
        *("thumbnail", "gif"),
    }
    assert all(control.help.endswith(".") for control in known.values())
    assert all(control.label for control in known.values())


@pytest.mark.parametrize(
    "name", [name for name, control in controls().items() if control.minimum is not None]
)
def test_a_control_ends_where_the_schema_does(name: str) -> None:
    def takes(value: float) -> bool:
        others = {"output.watermark.text": "AI", "order": "in_turn"}  # without which there is none
        return accepted(request_fields({**others, name: value}))

    control = controls()[name]
    assert control.minimum is not None
    step = 1 if control.is_integer else 0.01
    assert takes(control.minimum)
    assert not takes(control.minimum - step)
    if control.maximum is not None:
        assert takes(control.maximum)
        assert not takes(control.maximum + step)


@pytest.mark.parametrize("name", [name for name, control in controls().items() if control.choices])
def test_every_choice_is_one_that_the_schema_takes(name: str) -> None:
    for choice in controls()[name].choices:
        container = "webm" if choice == "vp9" else "mp4"
        others = {"output.format": container, "output.watermark.text": "AI"}
        assert accepted(request_fields({**others, name: choice}))


def test_what_nobody_changed_is_left_to_the_worker() -> None:
    assert request_fields(defaults()) == {}


def test_the_page_shows_a_request_as_it_was_entered() -> None:
    entered = {
        **defaults(),
        "prompt": "A woman in a garden.",
        "preset": "balanced",
        "num_inference_steps": 30,
        "seed": "7",
        "motion.expression": 42,
        "face_box": "10, 20.5, 30, 40",
        "max_seconds": "2.5",
        "output.aspect": "9:16",
        "output.fit": "contain",
        "output.background": "#102030",
        "output.format": "webm",
        "output.codec": "vp9",
        "output.quality": "30",
        "output.watermark.text": "AI-generated",
        "output.watermark.place": "top-left",
        "output.gif": True,
    }
    fields = request_fields(entered)
    assert fields["output"]["watermark"] == {"text": "AI-generated", "place": "top-left"}
    assert video_suffix(fields) == ".webm"
    assert fields["motion"] == {"expression": 42}
    assert fields["face_box"] == [10, 20.5, 30, 40]
    assert accepted(fields)
    assert request_fields(page_values(fields)) == fields


def test_a_place_of_no_watermark_is_not_sent() -> None:
    assert request_fields({"output.watermark.place": "top-left", "output.codec": ""}) == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [("seed", "1.5"), ("seed", "seven"), ("max_seconds", "x"), ("face_box", "1 2")],
)
def test_a_text_that_is_no_number_is_refused_at_its_field(name: str, text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        request_fields({name: text})
    assert caught.value.field == name
    assert caught.value.message in views.field_error(name, caught.value.message)


# Snippets


def test_a_shell_sends_exactly_the_fields_that_the_snippet_stands_for(tmp_path: Path) -> None:
    """Runs the snippet with a curl that prints what it is told to send."""
    names = {"image": "it's a $portrait.png", "left": "speech one.wav", "right": "b.wav"}
    for name in names.values():
        (tmp_path / name).write_bytes(name.encode() * 100)
    fake = tmp_path / "bin" / "curl"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >> arguments\ncase "$*" in *-d*) cat ;; esac\n')
    fake.chmod(0o755)
    fields = {"prompt": HOSTILE, "motion": {"pose": 1.5}, "seed": 7}
    speakers = [{"audio": Path(names[face]), "face": face} for face in ("left", "right")]
    files = {"image": Path(names["image"]), "speakers": speakers}
    snippet = curl(Request(endpoint="abc123", fields=files | fields))

    done = subprocess.run(
        ["/bin/sh", "-c", snippet],
        cwd=tmp_path,
        env={"PATH": f"{fake.parent}:{os.defpath}", "RUNPOD_API_KEY": "KEY"},
        capture_output=True,
        check=True,
    )

    body = json.loads(done.stdout)
    arguments = (tmp_path / "arguments").read_text()
    assert {key: body["input"][key] for key in fields} == fields
    content = job_request.parse({"input": body["input"]}).input
    assert content.image.content == names["image"].encode() * 100
    for speaker in content.voices:
        assert speaker.audio.content == names[str(speaker.face)].encode() * 100
    assert body["policy"]["executionTimeout"] == 3_600_000
    assert "https://api.runpod.ai/v2/abc123/run" in arguments
    assert "Authorization: Bearer KEY" in arguments


def test_the_python_snippet_holds_the_fields_and_no_key() -> None:
    fields = {"prompt": HOSTILE, "motion": {"pose": 1.5}, "seed": 7}
    files = {"image": Path("me.png"), "audio": Path("me.wav")}
    source = python(Request(endpoint="abc123", fields=files | fields))
    call = next(
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "submit"
    )
    assert {word.arg: ast.literal_eval(word.value) for word in call.keywords} == fields
    assert 'os.environ["RUNPOD_API_KEY"]' in source


# History


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "jobs", max_jobs=3)


@pytest.fixture
def add(
    history: History,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
    tmp_path: Path,
) -> Callable[..., Any]:
    """Adds a job to the history."""
    portrait, speech = tmp_path / "me.png", tmp_path / "me.wav"
    portrait.write_bytes(make_portrait())
    speech.write_bytes(make_speech(0.2))

    def add(**changes: Any) -> Record:
        record = history.add(portrait, speech, {"seed": 1}, endpoint="abc", **changes)
        history.save(done := replace(record, status="COMPLETED"))
        return done

    return add


def test_a_job_is_found_after_a_restart_with_its_inputs(
    history: History, add: Callable[..., Any], make_portrait: Callable[..., bytes]
) -> None:
    record = add()
    later = History(history.directory)
    assert later.all() == [record]
    assert later.portrait(record).read_bytes() == make_portrait()
    speech = later.speech(record)
    assert speech is not None
    assert speech.suffix == ".wav"
    assert later.thumbnail(record).read_bytes().startswith(b"\xff\xd8")


def test_the_oldest_jobs_make_room_except_those_that_are_still_followed(
    history: History, add: Callable[..., Any]
) -> None:
    records = [add()]
    records += [add(busy=[records[0].id]) for _ in range(4)]
    kept = {record.id for record in history.all()}
    assert kept == {records[0].id, records[-1].id, records[-2].id, records[-3].id}


def test_the_history_keeps_no_address_of_a_result_and_no_video_in_a_record(
    history: Any, add: Callable[..., Any]
) -> None:
    output = {"seed": 5, "video_url": "https://store/x?X-Amz-Signature=s", "video_base64": "AAAA"}
    record = replace(add(), output=output)
    history.save(record)
    text = (history.directory / record.id / "record.json").read_text()
    assert "Signature" not in text
    assert "AAAA" not in text
    assert history.get(record.id).output == {"seed": 5}


def test_a_portrait_that_is_no_image_has_a_thumbnail_all_the_same(
    history: History, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    record = history.add(bad, bad, {}, endpoint="abc")
    assert history.thumbnail(record).read_bytes().startswith(b"\xff\xd8")


@pytest.mark.parametrize("name", [None, "", "..", "../secret", "a/b", "missing"])
def test_an_id_from_outside_finds_no_other_file(
    history: History, add: Callable[..., Any], name: Any, tmp_path: Path
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "record.json").write_text(
        (history.directory / add().id / "record.json").read_text()
    )
    assert history.get(name) is None


def test_a_damaged_record_is_skipped(history: History, add: Callable[..., Any]) -> None:
    good, bad = add(), add()
    (history.directory / bad.id / "record.json").write_text("{")
    assert history.all() == [good]


# What is said


def record(**changes: Any) -> Record:
    fields = {
        "id": "a",
        "created_at": "2026-01-02T03:04:05+00:00",
        "endpoint": "abc",
        "portrait": "portrait.png",
        "speech": "speech.wav",
        "fields": {},
        "job_id": "j",
        "status": "IN_PROGRESS",
    }
    return Record(**{**fields, **changes})


def test_a_running_job_tells_stage_step_share_and_remaining_time() -> None:
    progress = Progress("denoise", 0.5, "Denoising 10/20", 3, 5, 10, 20, 12.0, 95.0)
    text = views.status(JobState(record(), True, progress, left_seconds=95.0))
    for part in ("Denoising<", "Step 10 of 20", "stage 3 of 5", "1 min 35 s left", "50 %"):
        assert part in text
    assert 'aria-valuenow="50"' in text


def test_a_failure_is_told_in_words_and_as_text_alone() -> None:
    error = {"code": "X", "message": "<b>no</b> face", "field": "image", "retryable": True}
    text = views.status(JobState(record(status="FAILED", error=error), False))
    assert "The portrait &lt;b&gt;no&lt;/b&gt; face. Trying again may help." in text
    assert "<b>" not in text


def test_a_finished_video_tells_what_it_took_and_what_it_cost_if_that_is_known() -> None:
    metrics = {"total_seconds": 452.0, "cost_usd": 0.7006}
    stored = stored_output({"seed": 7, "metrics": metrics})
    known = Record(
        id="1",
        created_at="",
        endpoint="",
        portrait="p",
        speech="s",
        fields={},
        status="COMPLETED",
        output=stored,
    )
    assert "made in 7 min 32 s · $0.701" in views.caption(known)
    stored = stored_output({"seed": 7, "metrics": metrics | {"cost_usd": None}})
    assert "$" not in views.caption(replace(known, output=stored))


def test_a_job_that_nobody_follows_says_how_to_go_on() -> None:
    assert "Connect to its endpoint" in views.status(JobState(record(), False))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")],
)
def test_a_duration_is_said_as_people_say_it(seconds: float, words: str) -> None:
    assert views.duration(seconds) == words


def test_the_studio_beside_its_page_needs_neither_torch_nor_gradio() -> None:
    modules = "fields, history, views, snippets, tracker, endpoint_process, connection"
    code = f"import sys\nfrom studio import {modules}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "gradio", "boto3"} & set(done.stdout.split())
