"""The studio's jobs at a real local endpoint with the demo worker, without a page."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from avatar_client import AuthenticationError, EndpointUnavailableError
from avatar_client.contract.job_errors import InvalidInputError
from local_endpoint import LocalEndpoint
from studio import snippets
from studio.connection import Connection
from studio.endpoint_process import LocalEndpointError, LocalEndpointProcess
from studio.history import History
from studio.snippets import Request
from studio.tracker import JobState, JobTracker

ROOT = Path(__file__).parents[2]
SHORT = {"resolution": 256, "num_inference_steps": 1, "seed": 1}
LONG = {"resolution": 256, "num_inference_steps": 100}
JOB_SECONDS = 300

pytestmark = pytest.mark.usefixtures("shared_worker")


@pytest.fixture
def connection(endpoint: LocalEndpoint) -> Connection:
    return Connection(name="local", url=endpoint.url, api_key=SecretStr(endpoint.api_key))


@pytest.fixture
def tracker(tmp_path: Path) -> JobTracker:
    return JobTracker(History(tmp_path / "jobs"))


@pytest.fixture
def portrait(tmp_path: Path, make_portrait: Callable[..., bytes]) -> Path:
    path = tmp_path / "portrait.png"
    path.write_bytes(make_portrait())
    return path


@pytest.fixture
def speech(tmp_path: Path, make_speech: Callable[..., bytes]) -> Path:
    path = tmp_path / "speech.wav"
    path.write_bytes(make_speech(0.4))
    return path


def known(tracker: JobTracker, record_id: str) -> JobState:
    state = tracker.state(record_id)
    assert state is not None
    return state


async def until(tracker: JobTracker, record_id: str, holds: Callable[[JobState], bool]) -> JobState:
    """The job once `holds` is true of it."""
    async with asyncio.timeout(JOB_SECONDS):
        while not holds(state := known(tracker, record_id)):
            await asyncio.sleep(0.05)
    return state


def is_over(state: JobState) -> bool:
    return state.record.is_over


def test_a_job_leaves_its_verified_video_in_the_history(
    tracker: JobTracker, connection: Connection, portrait: Path, speech: Path
) -> None:
    async def story() -> JobState:
        record = await tracker.start(connection, portrait, speech, SHORT)
        return await until(tracker, record.id, is_over)

    record = asyncio.run(story()).record

    assert record.status == "COMPLETED"
    assert record.output["seed"] == 1
    assert tracker.history.video(record).stat().st_size == record.output["size_bytes"]
    assert History(tracker.history.directory).all() == [record]
    texts = [path.read_bytes() for path in tracker.history.directory.rglob("*.json")]
    assert not any(connection.api_key.get_secret_value().encode() in text for text in texts)


def test_a_job_is_tracked_again_after_a_restart(
    tracker: JobTracker, connection: Connection, portrait: Path, speech: Path
) -> None:
    async def begin() -> str:
        record = await tracker.start(connection, portrait, speech, SHORT)
        await tracker.close()
        return record.id

    async def go_on(record_id: str) -> JobState:
        later = JobTracker(History(tracker.history.directory))
        assert not known(later, record_id).is_tracked
        later.resume(connection)
        return await until(later, record_id, is_over)

    assert asyncio.run(go_on(asyncio.run(begin()))).record.status == "COMPLETED"


def test_a_job_of_another_endpoint_is_not_asked_for(
    tracker: JobTracker, connection: Connection, portrait: Path, speech: Path
) -> None:
    async def story() -> bool:
        record = await tracker.start(connection, portrait, speech, SHORT)
        await tracker.close()
        later = JobTracker(History(tracker.history.directory))
        other = Connection(name="other", url=connection.url, api_key=connection.api_key)
        later.resume(other)
        return known(later, record.id).is_tracked

    assert not asyncio.run(story())


def test_a_job_shows_a_preview_and_once_cancelled_ends_at_the_endpoint_too(
    tracker: JobTracker,
    connection: Connection,
    endpoint: Any,
    portrait: Path,
    speech: Path,
) -> None:
    async def story() -> JobState:
        record = await tracker.start(connection, portrait, speech, LONG)
        # a tenth of the way; what the end of a short job shows no client has to see
        await until(tracker, record.id, lambda state: state.preview is not None or is_over(state))
        await tracker.cancel(record.id)
        return await until(tracker, record.id, is_over)

    record = asyncio.run(story()).record

    assert record.status == "CANCELLED"
    assert endpoint.state(record.job_id).status == "CANCELLED"


def test_a_failure_keeps_the_field_that_it_concerns(
    tracker: JobTracker, connection: Connection, tmp_path: Path, speech: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image at all")

    async def story() -> JobState:
        record = await tracker.start(connection, bad, speech, SHORT)
        return await until(tracker, record.id, is_over)

    record = asyncio.run(story()).record

    assert record.status == "FAILED"
    assert record.error is not None
    assert (record.error["code"], record.error["field"]) == ("UNSUPPORTED_MEDIA", "image")


@pytest.mark.parametrize(
    ("fields", "change", "error"),
    [
        ({"seed": -1}, {}, InvalidInputError),
        ({}, {"api_key": SecretStr("wrong")}, AuthenticationError),
        ({}, {"url": "http://127.0.0.1:9/v2/x"}, EndpointUnavailableError),
    ],
)
def test_a_job_that_was_not_sent_is_not_in_the_history(
    tracker: JobTracker,
    connection: Connection,
    portrait: Path,
    speech: Path,
    fields: dict[str, Any],
    change: dict[str, Any],
    error: type[Exception],
) -> None:
    values = {"name": "x", "url": connection.url, "api_key": connection.api_key, **change}
    with pytest.raises(error):
        asyncio.run(tracker.start(Connection(**values), portrait, speech, fields))
    assert tracker.history.all() == []


def test_inputs_that_are_too_large_are_refused_in_words(
    tracker: JobTracker, connection: Connection, portrait: Path, tmp_path: Path
) -> None:
    recording = tmp_path / "long.wav"
    recording.write_bytes(bytes(8_000_000))
    with pytest.raises(InvalidInputError, match=r"8\.0 MB") as caught:
        asyncio.run(tracker.start(connection, portrait, recording, {}))
    assert caught.value.field == "audio"


@pytest.mark.parametrize("goes_while", ["the files are copied", "they are sent"])
def test_a_page_that_goes_away_stops_nothing(
    tracker: JobTracker,
    connection: Connection,
    portrait: Path,
    speech: Path,
    goes_while: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = threading.Event()
    copied = tracker.history.add

    def slowly(*arguments: Any, **options: Any) -> Any:
        record = copied(*arguments, **options)
        gone.wait(60)
        return record

    def has_begun() -> bool:
        if goes_while == "the files are copied":
            return bool(tracker.history.all())
        return any(state.is_tracked for state in tracker.states())

    async def story() -> JobState:
        if goes_while == "the files are copied":
            monkeypatch.setattr(tracker.history, "add", slowly)
        page = asyncio.create_task(tracker.start(connection, portrait, speech, SHORT))
        while not has_begun():
            await asyncio.sleep(0.01)
        page.cancel()
        await asyncio.wait({page})
        gone.set()
        return await until(tracker, tracker.history.all()[0].id, is_over)

    assert asyncio.run(story()).record.status == "COMPLETED"


# The studio's own endpoint


@pytest.mark.slow
def test_a_large_recording_goes_through_the_bucket_of_the_studios_own_endpoint(
    tracker: JobTracker,
    portrait: Path,
    make_speech: Callable[..., bytes],
    tmp_path: Path,
    random_model: Path,
) -> None:
    recording = tmp_path / "long.wav"
    recording.write_bytes(make_speech(240.0, 24_000))
    assert recording.stat().st_size > 10e6

    with LocalEndpointProcess(tmp_path / "local", Path(sys.executable), random_model) as local:

        async def story() -> JobState:
            fields = {**SHORT, "max_seconds": 0.4}
            record = await tracker.start(local.connection(), portrait, recording, fields)
            return await until(tracker, record.id, is_over)

        record = asyncio.run(story()).record
        url = local.connection().url

    assert record.status == "COMPLETED", record.error
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_an_environment_without_the_worker_is_told_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(LocalEndpointError, match="--worker-python"),
        LocalEndpointProcess(tmp_path, tmp_path / "python"),
    ):
        pass


# The snippets, run as they are


@pytest.fixture
def environment(endpoint: LocalEndpoint) -> dict[str, Any]:
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
        "RUNPOD_API_KEY": endpoint.api_key,
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def request_of_a_page(endpoint: LocalEndpoint, portrait: Path, speech: Path) -> Request:
    fields = {**SHORT, "prompt": 'It\'s "5 $" `x` \\ 日本', "motion": {"pose": 10}}
    files = {"image": Path(portrait.name), "audio": Path(speech.name)}
    return snippets.Request(endpoint=endpoint.url, fields=files | fields)


def run(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=JOB_SECONDS, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_curl_snippet_makes_a_video(
    endpoint: LocalEndpoint, request_of_a_page: Request, environment: dict[str, Any], tmp_path: Path
) -> None:
    submit, _, status = snippets.curl(request_of_a_page).partition("\n\n")
    options = {"cwd": tmp_path, "env": environment}
    job_id = json.loads(run(["sh", "-c", f"{submit}\n"], **options))["id"]

    endpoint.wait(job_id, JOB_SECONDS)

    answer = json.loads(run(["sh", "-c", status.replace("JOB_ID", job_id)], **options))
    assert answer["status"] == "COMPLETED"
    assert answer["output"]["seed"] == SHORT["seed"]
    assert answer["output"]["parameters"]["motion"] == {"pose": 10, "expression": 30}


def test_the_python_snippet_makes_a_video(
    request_of_a_page: Request, environment: dict[str, Any], tmp_path: Path
) -> None:
    run([sys.executable, "-c", snippets.python(request_of_a_page)], cwd=tmp_path, env=environment)
    assert (tmp_path / "avatar.mp4").read_bytes()[4:8] == b"ftyp"
