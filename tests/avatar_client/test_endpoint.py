"""The client against an endpoint that answers as it is told, blocking and for asyncio alike."""

import asyncio
import base64
import os
import subprocess
import sys
import termios
import time
from pathlib import Path
from urllib.request import urlopen

import httpx
import pytest

from avatar_client import (
    AsyncAvatarEndpoint,
    AuthenticationError,
    AvatarEndpoint,
    DownloadError,
    EndpointError,
    EndpointUnavailableError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    JobStatus,
    JobTimedOutError,
    RequestRefusedError,
    WaitTimeoutError,
    protocol,
    request_body,
    webhook_token_matches,
)
from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import InputUrlBlockedError, InvalidInputError
from avatar_client.responses import JobError
from tests.avatar_client.client_kinds import KEY, KINDS, clients
from tests.support.scripted_server import CLOSED, Answer, ScriptedServer

IMAGE, AUDIO = "https://example.com/portrait.png", "https://example.com/speech.wav"
QUEUED = {"id": "job-1", "status": "IN_QUEUE"}
RUNNING = {
    "id": "job-1",
    "status": "IN_PROGRESS",
    "delayTime": 1500,
    "output": {
        "stage": "denoise",
        "stage_index": 3,
        "stage_count": 5,
        "progress": 0.42,
        "step": 21,
        "total_steps": 50,
        "elapsed_seconds": 171.2,
        "eta_seconds": 236.0,
        "message": "Denoising 21/50",
    },
}
DONE = {"id": "job-1", "status": "COMPLETED", "executionTime": 2500, "output": {"seed": 7}}
RUN, STATUS, CANCEL = (
    "POST /v2/local/run",
    "GET /v2/local/status/job-1",
    "POST /v2/local/cancel/job-1",
)
SECRET_URL = "https://store.example.com/a.mp4?X-Amz-Signature=0123secret"
CODES = {"IN_QUEUE": False, "IN_PROGRESS": False} | dict.fromkeys(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"), True
)


@pytest.fixture
def server():
    with ScriptedServer() as server:
        yield server


@pytest.fixture(params=KINDS)
def make_client(request):
    with clients(request.param) as make:
        yield make


@pytest.fixture
def client(make_client, server):
    return make_client(f"{server.origin}/v2/local")


# The request


def test_files_travel_in_the_request_and_addresses_as_they_are(client, tmp_path):
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


def test_the_platform_is_told_how_long_the_job_may_take(client):
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
def test_a_wrong_value_is_named_before_anything_is_sent(client, server, options, field):
    with pytest.raises(InvalidInputError) as caught:
        client.submit(**{"image": IMAGE, "audio": AUDIO, **options})
    assert caught.value.field == field
    assert server.requests == []


def test_an_address_of_another_scheme_is_refused_before_anything_is_sent(client, server):
    with pytest.raises(InputUrlBlockedError):
        client.submit("ftp://example.com/a.png", AUDIO)
    assert server.requests == []


def test_a_file_that_does_not_fit_needs_a_bucket(client, server):
    with pytest.raises(InvalidInputError, match=r"8000000 bytes .* URL, or .* bucket") as caught:
        client.submit(b"p" * 1000, b"s" * 8_000_000)
    assert caught.value.field == "audio"
    assert server.requests == []


def test_the_larger_file_goes_to_the_bucket_if_both_do_not_fit(make_client, server, object_store):
    server.on(RUN, QUEUED)
    bucket = BucketSettings(
        endpoint_url=object_store.endpoint_url,
        access_key_id=object_store.access_key_id,
        secret_access_key=object_store.secret_access_key,
        name=object_store.bucket,
        prefix="from-here",
    )
    client = make_client(f"{server.origin}/v2/local", uploads=bucket)
    speech = bytes(range(256)) * 24_000

    client.submit(b"p" * 3_000_000, speech)

    sent = server.asked(RUN)[0]
    assert len(sent.body) < 10_000_000
    assert sent.json["input"]["image"] == base64.b64encode(b"p" * 3_000_000).decode()
    address = sent.json["input"]["audio"]
    assert f"/{object_store.bucket}/from-here/inputs/" in address
    with urlopen(address) as answer:
        assert answer.read() == speech


def test_the_largest_request_that_is_built_fits_the_platform(client):
    room_bytes = request_body.MAX_BODY_BYTES - 300
    body = client.request(b"p" * (room_bytes // 8 * 3), b"s" * (room_bytes // 8 * 3))
    assert 9_900_000 < len(request_body.encode(body)) <= 10_000_000


# The endpoint


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("abc123", "https://api.runpod.ai/v2/abc123"),
        ("https://api.runpod.ai/v2/abc123/", "https://api.runpod.ai/v2/abc123"),
        ("https://api.runpod.ai/v2/abc123/run", "https://api.runpod.ai/v2/abc123"),
        ("http://127.0.0.1:8000/v2/local", "http://127.0.0.1:8000/v2/local"),
    ],
)
def test_an_endpoint_is_named_by_its_id_or_its_address(make_client, given, url):
    assert make_client(given).url == url


@pytest.mark.parametrize(
    "given", ["", "a b", "ftp://x/v2/a", "https://", "https://u:p@x/v2/a", "https://x/v2/a?b=c"]
)
def test_what_cannot_be_an_endpoint_is_refused(make_client, given):
    with pytest.raises(ValueError, match="an endpoint is an id"):
        make_client(given)


@pytest.mark.parametrize("key", ["", "a b", "k\n", "schlüssel"])
@pytest.mark.parametrize("kind", [AvatarEndpoint, AsyncAvatarEndpoint])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(kind, key):
    with pytest.raises(ValueError, match="API key") as caught:
        kind("abc", key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize("kind", [AvatarEndpoint, AsyncAvatarEndpoint])
def test_the_key_stands_in_no_text_of_the_objects(kind):
    endpoint = kind("abc", KEY)
    assert KEY not in f"{endpoint!r} {endpoint} {endpoint.job('x')!r} {vars(endpoint)}"


def test_health_is_what_the_endpoint_says(client, server):
    server.on("GET /v2/local/health", {"jobs": {"inQueue": 1}, "workers": {"idle": 2}})
    assert client.health() == {"jobs": {"inQueue": 1}, "workers": {"idle": 2}}


# Submitting


def test_a_job_is_submitted_once_with_the_key(client, server):
    server.on(RUN, QUEUED)
    job = client.submit(IMAGE, AUDIO, prompt="Grüße 🙂")
    (sent,) = server.requests
    assert job.id == "job-1"
    assert sent.headers["Authorization"] == f"Bearer {KEY}"
    assert sent.headers["Content-Type"] == "application/json"
    assert sent.json["input"]["prompt"] == "Grüße 🙂"


@pytest.mark.parametrize("answer", [CLOSED, Answer(500), Answer(503, {"error": "busy"})])
def test_a_job_that_may_have_arrived_is_not_sent_again(client, server, answer):
    server.on(RUN, answer)
    with pytest.raises(EndpointUnavailableError, match="not known whether the job was queued"):
        client.submit(IMAGE, AUDIO)
    assert len(server.requests) == 1


def test_a_job_that_was_turned_away_is_sent_again_after_the_time_named(client, server):
    server.on(RUN, Answer(429, headers={"Retry-After": "1"}), QUEUED)
    begun = time.monotonic()
    assert client.submit(IMAGE, AUDIO).id == "job-1"
    assert time.monotonic() - begun >= 1.0
    assert len(server.requests) == 2


def test_an_endpoint_that_is_not_there_is_said_to_be_so(make_client):
    with ScriptedServer() as server:
        address = f"{server.origin}/v2/local"  # closed when the client protocol
    client = make_client(address)
    with pytest.raises(EndpointUnavailableError) as caught:
        client.submit(IMAGE, AUDIO)
    assert "could not be reached" in str(caught.value)
    assert "not known" not in str(caught.value)


@pytest.mark.parametrize("failure", [httpx.ConnectError("x"), httpx.ConnectTimeout("x")])
def test_a_submit_is_repeated_if_there_was_no_connection(failure):
    call = protocol.submit({})
    assert protocol.read(call, failure, 1, 1.0) == protocol.Pause(1.0)
    assert protocol.read(call, failure, 4, 1.0) == protocol.Pause(8.0)
    with pytest.raises(EndpointUnavailableError):
        protocol.read(call, failure, protocol.ATTEMPTS, 1.0)


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (Answer(401, {"error": f"Bearer {KEY} is wrong"}), AuthenticationError, "API key"),
        (Answer(403), AuthenticationError, "API key"),
        (Answer(404), RequestRefusedError, "no such endpoint"),
        (Answer(413, {"error": "over 10 MB"}), RequestRefusedError, "HTTP 413: over 10 MB"),
        (Answer(400, {"detail": "bad\x1b[31m\nbody"}), RequestRefusedError, "400: bad.* body"),
        (Answer(400, {"error": SECRET_URL}), RequestRefusedError, "example.com/a.mp4"),
        (Answer(400, ["odd"]), RequestRefusedError, "HTTP 400$"),
        (Answer(200, b"<html>"), EndpointUnavailableError, "no JSON object"),
        (
            Answer(200, {"id": "../x", "status": "IN_QUEUE"}),
            EndpointUnavailableError,
            "about a job",
        ),
        (Answer(200, {}), EndpointUnavailableError, "about a job"),
    ],
)
def test_a_refusal_says_why_and_shows_no_secret(client, server, answer, kind, text):
    server.on(RUN, answer)
    with pytest.raises(kind, match=text) as caught:
        client.submit(IMAGE, AUDIO)
    assert isinstance(caught.value, EndpointError)
    for secret in (KEY, "0123secret", "\x1b", "\n"):
        assert secret not in str(caught.value)
    assert len(server.requests) == 1


def test_the_key_follows_no_redirect(client, server):
    elsewhere = server.on("POST /elsewhere", QUEUED)
    server.on(RUN, Answer(307, headers={"Location": elsewhere}))
    with pytest.raises(EndpointUnavailableError, match="redirects"):
        client.submit(IMAGE, AUDIO)
    assert server.asked("POST /elsewhere") == []


# Following


def test_a_status_carries_the_progress_of_a_running_job(client, server):
    server.on(STATUS, RUNNING)
    status = client.job("job-1").status()
    assert (status.status, status.is_over, status.output) == ("IN_PROGRESS", False, None)
    assert status.delay_seconds == 1.5
    assert status.progress is not None
    assert (status.progress.progress, status.progress.step) == (0.42, 21)
    assert (status.progress.eta_seconds, status.progress.message) == (236.0, "Denoising 21/50")


def test_a_message_of_a_worker_steers_no_terminal():
    output = {**RUNNING["output"], "message": "\x1b[2J\nDenoising"}
    progress = JobStatus.parse({**RUNNING, "output": output}).progress
    assert progress is not None
    assert progress.message == "[2J Denoising"


@pytest.mark.parametrize(
    "output", [None, "text", [], {"percent": 3}, {**RUNNING["output"], "progress": 42}]
)
def test_an_odd_progress_is_no_progress(output):
    assert JobStatus.parse({**RUNNING, "output": output}).progress is None


@pytest.mark.parametrize("status", list(CODES))
def test_a_job_is_over_when_nothing_changes_any_more(status):
    assert JobStatus.parse({"id": "a", "status": status}).is_over is CODES[status]


def test_a_wait_ends_with_the_result_and_tells_each_status(client, server):
    server.on(STATUS, QUEUED, RUNNING, DONE)
    seen = []
    result = client.job("job-1").wait(on_status=seen.append)
    assert [status.status for status in seen] == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    assert result == seen[-1]
    assert (result.output, result.execution_seconds) == ({"seed": 7}, 2.5)


def test_a_callback_may_be_a_coroutine(server):
    server.on(STATUS, RUNNING, DONE)
    seen = []

    async def note(status):
        await asyncio.sleep(0)
        seen.append(status.status)

    async def wait():
        url = f"{server.origin}/v2/local"
        async with AsyncAvatarEndpoint(url, KEY, poll_seconds=0.005) as endpoint:
            await endpoint.job("job-1").wait(on_status=note)

    asyncio.run(wait())
    assert seen == ["IN_PROGRESS", "COMPLETED"]


def test_updates_come_one_by_one(client, server):
    server.on(STATUS, QUEUED, RUNNING, DONE)
    statuses = [status.status for status in client.job("job-1").updates()]
    assert statuses == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]


@pytest.mark.parametrize("fault", [CLOSED, Answer(500), Answer(502), Answer(429)])
def test_a_wait_survives_a_few_faults_in_a_row(client, server, fault):
    server.on(STATUS, RUNNING, fault, fault, fault, fault, DONE)
    assert client.job("job-1").wait().status == "COMPLETED"


@pytest.mark.parametrize("fault", [CLOSED, Answer(500)])
def test_a_wait_ends_when_the_faults_do_not(client, server, fault):
    server.on(STATUS, fault)
    with pytest.raises(EndpointUnavailableError):
        client.job("job-1").wait()
    assert len(server.requests) == protocol.ATTEMPTS


def test_a_wait_ends_at_the_limit_of_the_caller_and_the_job_goes_on(client, server):
    server.on(STATUS, RUNNING)
    with pytest.raises(WaitTimeoutError, match=r"IN_PROGRESS after 0\.05 s; it goes on") as caught:
        client.job("job-1").wait(timeout_seconds=0.05)
    assert isinstance(caught.value, TimeoutError)
    assert {asked.method for asked in server.requests} == {"GET"}


def test_the_pauses_of_a_wait_grow_to_five_times_the_first():
    pace = protocol.Pace(1.0, None)
    pauses = [pace.pause_after(JobStatus("a", "IN_QUEUE")) for _ in range(8)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (1.0, 5.0)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"status": "FAILED", "error": "INTERNAL: x"}, JobFailedError),
        ({"status": "CANCELLED"}, JobCancelledError),
        ({"status": "TIMED_OUT"}, JobTimedOutError),
    ],
)
def test_a_wait_for_a_job_without_a_result_says_which_end_it_had(client, server, body, kind):
    server.on(STATUS, {"id": "job-1", **body})
    with pytest.raises(kind, match="job-1"):
        client.job("job-1").wait()
    with pytest.raises(kind):
        client.job("job-1").download("never.mp4")


def test_a_failed_job_says_what_the_worker_said(client, server):
    error = "INPUT_DOWNLOAD_FAILED: audio: the server answered HTTP 404"
    server.on(STATUS, {"id": "job-1", "status": "FAILED", "error": error})
    with pytest.raises(JobFailedError, match=error) as caught:
        client.job("job-1").wait()
    assert caught.value.code == "INPUT_DOWNLOAD_FAILED"
    assert caught.value.field == "audio"
    assert caught.value.message == "the server answered HTTP 404"
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("error", "output", "expected"),
    [
        (
            "INVALID_INPUT: motion.pose: must be at most 100",
            None,
            JobError("INVALID_INPUT", "must be at most 100", "motion.pose"),
        ),
        (
            "GENERATION_FAILED: the GPU said: no",
            None,
            JobError("GENERATION_FAILED", "the GPU said: no", retryable=True),
        ),
        (
            "text",
            {
                "error_info": {
                    "code": "ENCODE_FAILED",
                    "message": "no room",
                    "field": None,
                    "retryable": True,
                }
            },
            JobError("ENCODE_FAILED", "no room", retryable=True),
        ),
        (
            '{"error_type": "<class \'KeyError\'>", "error_message": "no such key",'
            ' "error_traceback": "File /app/handler.py", "hostname": "h"}',
            None,
            JobError("UNKNOWN", "no such key"),
        ),
        (
            "job timed out after 1 retries",
            None,
            JobError("UNKNOWN", "job timed out after 1 retries"),
        ),
        (None, None, JobError("UNKNOWN", "the endpoint gives no reason")),
        (
            f"failed at\n{SECRET_URL}",
            None,
            JobError("UNKNOWN", "failed at https://store.example.com/a.mp4?..."),
        ),
    ],
)
def test_the_reason_of_a_failure_is_read_from_each_of_its_forms(error, output, expected):
    assert JobError.parse(error, output) == expected


def test_a_job_that_is_forgotten_is_said_to_be_so(client, server):
    server.on(STATUS, Answer(404, {"error": "no"}))
    with pytest.raises(JobNotFoundError, match="no job job-1: a result is kept for 30 minutes"):
        client.job("job-1").status()


@pytest.mark.parametrize(
    "job_id", ["", "../health", "a/b", "a?b", "a%2fb", "a b", "a\n", "x" * 129]
)
def test_what_cannot_be_the_id_of_a_job_never_reaches_a_path(client, server, job_id):
    with pytest.raises(JobNotFoundError, match="not the id of a job"):
        client.job(job_id)
    assert server.requests == []


def test_a_job_is_cancelled(client, server):
    server.on(CANCEL, CLOSED, {"id": "job-1", "status": "CANCELLED"})
    assert client.job("job-1").cancel().status == "CANCELLED"


def test_a_status_shows_no_signed_address():
    status = JobStatus.parse({**DONE, "output": {"video_url": SECRET_URL}})
    assert "0123secret" not in repr(status)


def test_a_job_that_is_not_over_has_no_video(client, server, tmp_path):
    server.on(STATUS, RUNNING)
    with pytest.raises(DownloadError, match="no video yet: it is IN_PROGRESS"):
        client.job("job-1").download(tmp_path / "video.mp4")


# Beside it


def test_a_progress_bar_follows_the_job_on_a_terminal(tmp_path):
    script = tmp_path / "bar.py"
    script.write_text(
        "from avatar_client import JobStatus, progress_bar\n"
        "with progress_bar() as show:\n"
        f"    for body in {[QUEUED, RUNNING, DONE]}:\n"
        "        show(JobStatus.parse(body))\n"
    )
    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (24, 120))
    subprocess.run([sys.executable, script], stderr=end, check=True)
    os.close(end)
    with os.fdopen(terminal, "rb") as screen:
        lines = screen.read1(100_000).decode().split("\r")

    shown = [line.strip() for line in lines if line.strip()]
    assert any(line.startswith("Waiting in the queue ") and " 0 %" in line for line in shown)
    assert any("Denoising 21/50" in line and "42 %" in line for line in shown)
    assert any("236 s left" in line for line in shown)
    assert shown[-1].startswith("Completed ")
    assert "100 %" in shown[-1]
    assert "left" not in shown[-1]


def test_a_token_matches_itself_and_nothing_else():
    assert webhook_token_matches("geheim-ü", "geheim-ü")
    for given in ("geheim", "geheim-ü ", "", None):
        assert not webhook_token_matches("geheim-ü", given)
    assert not webhook_token_matches("", "")


def test_the_client_imports_nothing_heavy():
    script = "import sys, avatar_client, avatar_client.cli; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"torch", "boto3", "botocore", "runpod", "numpy", "PIL"} & set(done.stdout.split())
