"""The command `avatar` as a person in front of a terminal meets it."""

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from avatar_client.cli import main
from avatar_client.contract import preview
from tests.avatar_client.answers import PROGRESS
from tests.avatar_client.client_kinds import KEY
from tests.support.pictures import jpeg
from tests.support.scripted_server import Answer, ScriptedServer

ROOT = Path(__file__).parents[2]
RUN, STATUS = "POST /v2/local/run", "GET /v2/local/status/job-1"
CANCEL = "POST /v2/local/cancel/job-1"
INPUTS = ["--image", "https://example.com/a.png", "--audio", "https://example.com/b.wav"]
VIDEO = b"a video"
RESULT = {
    "video_url": None,
    "video_base64": "YSB2aWRlbw==",
    "size_bytes": len(VIDEO),
    "sha256": hashlib.sha256(VIDEO).hexdigest(),
    "warnings": ["no face was found"],
}


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        server.on(RUN, {"id": "job-1", "status": "IN_QUEUE"})
        server.on(STATUS, {"id": "job-1", "status": "COMPLETED", "output": RESULT})
        yield server


@pytest.fixture
def run(
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Any]:
    """Runs a command in an empty directory: its exit code, what it printed, what it told."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", f"{server.origin}/v2/local")

    def run(*arguments: Any) -> tuple[Any, ...]:
        try:
            code: object = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_a_video_is_made_and_its_path_is_all_that_is_printed(run: Callable[..., Any]) -> None:
    code, printed, told = run("generate", *INPUTS)
    assert (code, printed) == (0, "avatar.mp4\n")
    assert Path("avatar.mp4").read_bytes() == VIDEO
    assert "job job-1" in told
    assert "warning: no face was found" in told


def test_a_result_that_is_not_signed_is_refused_where_there_is_a_key_for_it(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESULT_SIGNING_KEY", "0123456789abcdef" * 2)
    code, printed, told = run("download", "job-1")
    assert (code, printed) == (1, "")
    assert "the result is not signed" in told
    monkeypatch.setenv("RESULT_SIGNING_KEY", "short")
    code, _, told = run("download", "job-1")
    assert code == 2
    assert "RESULT_SIGNING_KEY" in told


def test_every_field_of_a_request_is_an_option(
    run: Callable[..., Any], server: ScriptedServer
) -> None:
    run(
        *("generate", *INPUTS, "--prompt", "50 %", "--resolution", 512, "--preset", "draft"),
        *("--num-inference-steps", 8, "--guidance-scale", 1.5, "--flow-shift", 3, "--seed", 7),
        *("--fps", 12.5, "--motion-pose", 10, "--face-box", 1, 2, 30.5, 40, "--max-seconds", 2),
        *("--output-delivery", "inline", "--output-thumbnail", "--user-data", '{"order": 5}'),
        *("--negative-prompt", "dark", "--audio-start-seconds", 0.5, "--motion-expression", 20),
        *("--output-key", "a.mp4", "--output-prefix", "b", "--output-url-expires-seconds", 60),
        *("--dry-run", "--execution-timeout-seconds", 60, "--webhook", "https://example.com/"),
    )
    (sent,) = server.asked(RUN)
    assert sent.json == {
        "input": {
            "image": INPUTS[1],
            "audio": INPUTS[3],
            "prompt": "50 %",
            "negative_prompt": "dark",
            "resolution": 512,
            "preset": "draft",
            "num_inference_steps": 8,
            "guidance_scale": 1.5,
            "flow_shift": 3,
            "seed": 7,
            "fps": 12.5,
            "motion": {"pose": 10, "expression": 20},
            "face_box": [1, 2, 30.5, 40],
            "audio_start_seconds": 0.5,
            "max_seconds": 2,
            "output": {
                "delivery": "inline",
                "key": "a.mp4",
                "prefix": "b",
                "url_expires_seconds": 60,
                "thumbnail": True,
            },
            "user_data": {"order": 5},
            "dry_run": True,
        },
        "policy": {"executionTimeout": 60_000},
        "webhook": "https://example.com/",
    }


def test_the_newest_preview_lies_beside_the_video_until_that_is_there(
    run: Callable[..., Any], server: ScriptedServer
) -> None:
    picture = jpeg()
    running = {"id": "job-1", "status": "IN_PROGRESS"}
    shown = {**PROGRESS, "preview": preview.to_data_url(picture)}
    failed = {"id": "job-1", "status": "FAILED", "error": "GENERATION_FAILED: no"}
    server.on(STATUS, {**running, "output": shown}, {**running, "output": PROGRESS}, failed)
    assert run("generate", *INPUTS, "--preview", "--output", "a.mp4")[0] == 1
    assert server.asked(RUN)[0].json["input"]["preview"] is True
    assert Path("a.preview.jpg").read_bytes() == picture

    server.on(STATUS, {"id": "job-1", "status": "COMPLETED", "output": RESULT})
    assert run("download", "job-1", "--output", "a.mp4")[0] == 0
    assert [path.name for path in Path().iterdir()] == ["a.mp4"]


def test_a_field_that_is_not_given_is_left_to_the_worker(
    run: Callable[..., Any], server: ScriptedServer
) -> None:
    run("generate", *INPUTS)
    assert server.asked(RUN)[0].json["input"] == {"image": INPUTS[1], "audio": INPUTS[3]}


def test_each_speaker_is_an_option_with_a_face_a_start_and_a_recording(
    run: Callable[..., Any], server: ScriptedServer
) -> None:
    address = INPUTS[3]
    Path("c.wav").write_bytes(b"sound")
    run(
        *("generate", *INPUTS[:2], "--speaker", f"left={address}", "--speaker", "2@1.5=c.wav"),
        *("--speaker", f"10,20,30.5,40={address}?a=b@c", "--speaker", f"={address}"),
        *("--order", "in_turn", "--pause-seconds", 0.5, "--trim-silence"),
    )
    assert server.asked(RUN)[0].json["input"] == {
        "image": INPUTS[1],
        "speakers": [
            {"face": "left", "audio": address},
            {"face": "2", "start_seconds": 1.5, "audio": base64.b64encode(b"sound").decode()},
            {"face_box": [10, 20, 30.5, 40], "audio": f"{address}?a=b@c"},
            {"audio": address},
        ],
        "order": "in_turn",
        "pause_seconds": 0.5,
        "trim_silence": True,
    }


@pytest.mark.parametrize("order", ["gift", "5", "[1]"])
def test_user_data_is_json_or_else_text(
    run: Callable[..., Any], server: ScriptedServer, order: str
) -> None:
    run("generate", *INPUTS, "--user-data", order)
    expected = {"gift": "gift", "5": 5, "[1]": [1]}[order]
    assert server.asked(RUN)[0].json["input"]["user_data"] == expected


def test_the_help_names_limits_and_no_secret(run: Callable[..., Any]) -> None:
    code, printed, _ = run("generate", "--help")
    assert code == 0
    words = " ".join(printed.split())
    assert (
        "Denoising steps. The preset says how many of them run in full. 1 to 100. Default: 50"
        in words
    )
    assert "Also the first frame as a jpeg." in words
    assert "secret" not in printed.lower()


def test_a_plan_is_printed_instead_of_a_video(
    run: Callable[..., Any], server: ScriptedServer
) -> None:
    plan = {"dry_run": True, "plan": {"num_frames": 25}}
    server.on(STATUS, {"id": "job-1", "status": "COMPLETED", "output": plan})
    code, printed, _ = run("generate", *INPUTS, "--dry-run")
    assert (code, json.loads(printed)) == (0, plan)
    assert not Path("avatar.mp4").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["generate", *INPUTS, "--resolution", "500"], "--resolution"),
        (["generate", *INPUTS, "--seed", "x"], "'x' is no number"),
        (["generate", *INPUTS, "--seed", "-1"], "seed: must be greater than or equal to 0"),
        (["generate", *INPUTS, "--motion-pose", "nan"], "motion.pose: "),
        (["generate", "--image", "nowhere.png", "--audio", "b.wav"], "image: nowhere.png cannot"),
        (["generate", "--image", "HTTPS://x/a", "--audio", "ftp://x/b"], "audio: only https URLs"),
        (["generate", *INPUTS[:2]], "audio: field required, or speakers"),
        (["generate", *INPUTS, "--speaker", "left=https://x/a"], "speakers: are in the place of"),
        (["generate", *INPUTS[:2], "--speaker", "a.wav"], "is not FACE[@SECONDS]=FILE|URL"),
        (["generate", *INPUTS[:2], "--speaker", "left@x=https://x/a"], "'x' is no number"),
        (["generate", *INPUTS[:2], "--speaker", "up=https://x/a"], "speakers.0.face: must be"),
        (["generate", *INPUTS, "--output", "nowhere/a.mp4"], "there is no directory nowhere"),
        (["generate", *INPUTS, "--output", "a.webm"], "--output: ends with .webm"),
        (["generate", *INPUTS, "--output-codec", "vp9"], "output.codec: mp4 holds"),
        (["generate", *INPUTS, "--endpoint", "a b"], "an endpoint is an id"),
        (["generate", *INPUTS, "--execution-timeout-seconds", "1"], "policy.executionTimeout"),
        (["generate", *INPUTS, "--prom", "x"], "--prom"),
        (["status", "../health"], "not the id of a job"),
        ([], "COMMAND"),
    ],
)
def test_bad_arguments_end_with_2_before_anything_is_sent(
    run: Callable[..., Any], server: ScriptedServer, arguments: list[Any], text: str
) -> None:
    code, printed, told = run(*arguments)
    assert (code, printed) == (2, "")
    assert text in told
    assert server.requests == []


@pytest.mark.parametrize("name", ["RUNPOD_API_KEY", "RUNPOD_ENDPOINT_ID"])
def test_what_is_missing_in_the_environment_is_named(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(name)
    code, _, told = run("status", "job-1")
    assert code == 2
    assert name in told


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"id": "job-1", "status": "FAILED", "error": "ENCODE_FAILED: no"}, "ENCODE_FAILED: no"),
        ({"id": "job-1", "status": "CANCELLED"}, "job job-1 was cancelled"),
        ({"id": "job-1", "status": "TIMED_OUT"}, "raise execution_timeout_seconds"),
        ({"id": "job-1", "status": "COMPLETED"}, "holds no video"),
        (Answer(401), "API key"),
        (Answer(404), "30 minutes"),
    ],
)
def test_a_failure_ends_with_1_in_plain_words(
    run: Callable[..., Any], server: ScriptedServer, answer: Answer | dict[str, str], text: str
) -> None:
    server.on(STATUS, answer)
    code, printed, told = run("generate", *INPUTS)
    assert (code, printed) == (1, "")
    assert text in told
    assert "Traceback" not in told
    assert KEY not in told


def test_an_earlier_job_is_looked_at_fetched_and_cancelled(
    run: Callable[..., Any], server: ScriptedServer
) -> None:
    running = {"progress": 0.42, "stage": "denoise", "message": "Denoising 21/50"}
    server.on(STATUS, {"id": "job-1", "status": "IN_PROGRESS", "output": running})
    assert run("status", "job-1")[:2] == (0, "IN_PROGRESS  42 %: Denoising 21/50\n")

    failed = {"id": "job-1", "status": "FAILED", "error": "INTERNAL: no"}
    server.on(STATUS, failed)
    assert run("status", "job-1")[:2] == (0, "FAILED  INTERNAL: no\n")

    server.on(CANCEL, {"id": "job-1", "status": "CANCELLED"})
    assert run("cancel", "job-1")[:2] == (0, "CANCELLED\n")

    server.on(STATUS, {"id": "job-1", "status": "COMPLETED", "output": RESULT})
    assert run("download", "job-1", "--output", "mine.mp4")[:2] == (0, "mine.mp4\n")
    webm = {**RESULT, "content_type": "video/webm"}
    server.on(STATUS, {"id": "job-1", "status": "COMPLETED", "output": webm})
    assert run("download", "job-1")[:2] == (0, "avatar.webm\n")
    assert Path("mine.mp4").read_bytes() == VIDEO


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"id": "job-1", "status": "CANCELLED"}, "job job-1 is CANCELLED"),
        (Answer(404), "job job-1 could not be cancelled: "),
    ],
)
def test_an_interrupt_cancels_the_job(
    server: ScriptedServer, tmp_path: Path, answer: Answer | dict[str, str], told: str
) -> None:
    server.on(STATUS, {"id": "job-1", "status": "IN_PROGRESS"})
    server.on(CANCEL, answer)
    process = subprocess.Popen(
        [sys.executable, "-m", "avatar_client", "generate", *INPUTS],
        cwd=tmp_path,
        env={
            "PATH": os.defpath,
            "PYTHONPATH": str(ROOT),
            "RUNPOD_API_KEY": KEY,
            "RUNPOD_ENDPOINT_ID": f"{server.origin}/v2/local",
        },
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job inherits that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        assert process.stderr is not None
        assert process.stderr.readline() == "job job-1\n"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 130
    assert told in rest
    assert "Traceback" not in rest
    assert len(server.asked(CANCEL)) == 1
    assert list(tmp_path.iterdir()) == []
