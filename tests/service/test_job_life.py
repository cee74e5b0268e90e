"""`handler.py` as it runs on the platform: the SDK's real loop, over HTTP, in a process of its own.

The model is the demo's, the jobs are as small as the request allows: one second of speech at 256.
"""

import base64
import contextlib
import hashlib
import io
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import av
import pytest

from local_endpoint import JobRecord, LocalEndpoint, WorkerProcess
from tests.conftest import BucketServer, MediaServer
from tests.support.scripted_server import Answer, ScriptedServer
from tests.support.waiting import wait_until

JOB_SECONDS = 300.0  # far more than a small job takes
MANY_STEPS = 100  # for a job that has to be met while it runs


@pytest.fixture(scope="session")
def make_job(
    make_portrait: Callable[..., bytes], make_speech: Callable[..., bytes]
) -> Callable[..., Any]:
    """A small job's payload; arguments replace fields of its input."""
    portrait = base64.b64encode(make_portrait()).decode()
    speech = base64.b64encode(make_speech(seconds=1.0)).decode()

    def make(**changes: Any) -> dict[str, dict[str, Any]]:
        small = {"resolution": 256, "num_inference_steps": 1, "image": portrait, "audio": speech}
        return {"input": small | changes}

    return make


def started_at(job: JobRecord) -> float:
    assert job.claimed_at_seconds is not None
    return job.claimed_at_seconds


def ended_at(job: JobRecord) -> float:
    assert job.ended_at_seconds is not None
    return job.ended_at_seconds


def run(endpoint: LocalEndpoint, job: dict[str, Any]) -> JobRecord:
    return endpoint.wait(endpoint.submit(job), JOB_SECONDS)


def is_denoising(job: JobRecord) -> bool:
    return any(payload["step"] for payload in job.progress)


def code(job: JobRecord) -> str:
    return (job.error or "").partition(":")[0]


@pytest.fixture(scope="session")
def finished(
    endpoint: LocalEndpoint, shared_worker: WorkerProcess, make_job: Callable[..., Any]
) -> JobRecord:
    """A job that has been generated, and is looked at from several sides."""
    return run(endpoint, make_job(seed=7, num_inference_steps=4, user_data={"order": 1}))


def test_a_job_becomes_a_video_behind_the_url_that_it_answers(finished: JobRecord) -> None:
    assert (finished.status, finished.error) == ("COMPLETED", None)
    assert finished.output["seed"] == 7
    assert finished.output["user_data"] == {"order": 1}
    with urlopen(finished.output["video_url"], timeout=10) as answer:
        assert answer.headers["Content-Type"] == "video/mp4"
        video = answer.read()
    assert hashlib.sha256(video).hexdigest() == finished.output["sha256"]
    with av.open(io.BytesIO(video), "r") as container:
        assert [stream.codec.name for stream in container.streams] == ["h264", "aac"]
        assert container.duration is not None
        assert container.duration / av.time_base == pytest.approx(1.0, abs=0.04)


def require_ordered_progress(job: JobRecord) -> None:
    assert len(job.progress) >= 3
    for before, after in pairwise(job.progress):
        assert before["progress"] <= after["progress"] <= 1.0
        assert before["stage_index"] <= after["stage_index"] <= after["stage_count"]
        assert before["elapsed_seconds"] <= after["elapsed_seconds"]
    steps = [payload["step"] for payload in job.progress if payload["step"] is not None]
    assert steps == sorted(steps)
    assert [post.is_progress for post in job.posts] == [True] * len(job.progress) + [False]


def test_progress_comes_in_order_and_before_the_result(finished: JobRecord) -> None:
    require_ordered_progress(finished)


def test_progress_comes_in_order_when_the_platform_is_slow(
    endpoint: LocalEndpoint, shared_worker: WorkerProcess, make_job: Callable[..., Any]
) -> None:
    endpoint.delay_answers(0.7)
    try:
        job = run(endpoint, make_job(num_inference_steps=2))
    finally:
        endpoint.delay_answers(0.0)

    assert job.status == "COMPLETED"
    require_ordered_progress(job)


def test_the_worker_pings_throughout_a_job(endpoint: LocalEndpoint, finished: JobRecord) -> None:
    beats = [beat for beat in endpoint.heartbeats if finished.id in beat.job_ids]

    # one a second, where nothing else keeps the machine busy
    assert len(beats) > (ended_at(finished) - started_at(finished)) / 3


def test_a_cancelled_job_stops_at_its_next_step_posts_nothing_and_the_next_job_runs(
    endpoint: LocalEndpoint,
    shared_worker: WorkerProcess,
    make_job: Callable[..., Any],
    finished: JobRecord,
) -> None:
    cancelled_id = endpoint.submit(make_job(num_inference_steps=MANY_STEPS))
    next_id = endpoint.submit(make_job(seed=7, num_inference_steps=4))
    running = endpoint.wait_until(cancelled_id, is_denoising, JOB_SECONDS)

    endpoint.cancel(cancelled_id)

    following = endpoint.wait(next_id, JOB_SECONDS)
    cancelled = endpoint.state(cancelled_id)
    newest = running.output
    waited_seconds = started_at(following) - ended_at(cancelled)
    assert waited_seconds < newest["eta_seconds"] / 4  # of a hundred steps, it made few
    assert cancelled.status == "CANCELLED"
    assert cancelled.results == []
    # one may have been on its way when the cancel came, but none is sent once the job has stopped
    late = [post for post in cancelled.posts if post.at_seconds > started_at(following)]
    assert late == []
    assert following.status == "COMPLETED"
    assert following.output["sha256"] == finished.output["sha256"]  # the seed alone decides
    assert list(shared_worker.temporary_directory.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "expected_code", "told"),
    [
        ({"guidance": 3.0}, "INVALID_INPUT", "guidance_scale"),
        ({"resolution": 300}, "INVALID_INPUT", "resolution"),
        ({"image": "file:///etc/passwd"}, "INPUT_URL_BLOCKED", "image"),
        ({"audio": base64.b64encode(b"no sound").decode()}, "UNSUPPORTED_MEDIA", "audio"),
        ({"image": base64.b64encode(b"no picture").decode()}, "UNSUPPORTED_MEDIA", "image"),
    ],
)
def test_a_bad_job_is_refused_at_once_with_its_code_and_its_field(
    endpoint: LocalEndpoint,
    shared_worker: WorkerProcess,
    make_job: Callable[..., Any],
    changes: dict[str, Any],
    expected_code: str,
    told: str,
) -> None:
    job = run(endpoint, make_job(**changes))

    assert (job.status, code(job)) == ("FAILED", expected_code)
    assert told in (job.error or "")
    assert job.output["error_info"]["code"] == expected_code
    assert job.output["error_info"]["retryable"] is False
    assert not job.stop_pod
    assert "Traceback" not in str(job.posts)
    assert not is_denoising(job)


def test_a_job_whose_input_is_no_object_is_refused(
    endpoint: LocalEndpoint, shared_worker: WorkerProcess
) -> None:
    job = run(endpoint, {"input": ["not", "an", "object"]})

    assert (job.status, code(job)) == ("FAILED", "INVALID_INPUT")


def test_an_input_that_the_server_does_not_have_may_be_tried_again(
    endpoint: LocalEndpoint,
    shared_worker: WorkerProcess,
    make_job: Callable[..., Any],
    media_server: MediaServer,
) -> None:
    job = run(endpoint, make_job(image=media_server.url + "/missing.png"))

    assert (job.status, code(job)) == ("FAILED", "INPUT_DOWNLOAD_FAILED")
    assert job.output["error_info"]["retryable"] is True


def test_a_result_that_is_not_taken_is_sent_again_and_nothing_is_made_twice(
    endpoint: LocalEndpoint,
    shared_worker: WorkerProcess,
    make_job: Callable[..., Any],
    object_store: BucketServer,
) -> None:
    endpoint.lose_results(status=413)
    endpoint.lose_results(status=None)
    endpoint.lose_results(status=502)

    job = run(endpoint, make_job(seed=None))

    assert job.status == "COMPLETED"
    assert [post.accepted for post in job.results] == [False, False, False, True]
    told, *again = (post.body["output"] for post in job.results)
    assert again == [told] * 3
    assert "reused" not in told
    assert told["key"] in set(object_store.keys())
    # what was kept of the result is removed once it was taken
    wait_until(lambda: f"{told['key']}.json" not in set(object_store.keys()))
    with urlopen(job.output["video_url"], timeout=10) as answer:
        assert hashlib.sha256(answer.read()).hexdigest() == told["sha256"]


@pytest.mark.parametrize("hangs", ["a byte a second", "never an answer"])
def test_a_cancel_frees_the_worker_from_a_store_that_hangs(
    endpoint: LocalEndpoint, shared_worker: WorkerProcess, make_job: Callable[..., Any], hangs: str
) -> None:
    slow = Answer(body=b"<" * 600, byte_seconds=1.0)
    if hangs == "never an answer":
        slow = Answer(delay_seconds=600.0)
    with ScriptedServer() as store:
        job = make_job()
        job["s3Config"] = {
            "endpointUrl": store.origin,
            "accessId": "a",
            "accessSecret": "b",
            "bucketName": "own",
        }
        job_id = endpoint.submit(job)
        store.on(f"GET /own/{job_id}.mp4", slow)
        wait_until(lambda: store.requests)
        begun = time.monotonic()
        endpoint.cancel(job_id)
        done = endpoint.wait(endpoint.submit(make_job(dry_run=True)), JOB_SECONDS)

        assert done.status == "COMPLETED"
        assert time.monotonic() - begun < 120.0  # it would hang for ten minutes
    assert endpoint.state(job_id).status == "CANCELLED"


def test_a_job_that_is_delivered_twice_gets_the_same_answer(
    endpoint: LocalEndpoint, shared_worker: WorkerProcess, finished: JobRecord
) -> None:
    endpoint.requeue(finished.id)

    second = endpoint.wait(finished.id, JOB_SECONDS)

    assert second.status == "COMPLETED"
    assert second.output["sha256"] == finished.output["sha256"]
    assert second.output["seed"] == finished.output["seed"]
    assert second.output["reused"]


def test_another_request_under_an_earlier_id_is_not_answered_with_the_earlier_video(
    endpoint: LocalEndpoint,
    shared_worker: WorkerProcess,
    make_job: Callable[..., Any],
    finished: JobRecord,
) -> None:
    other = run(endpoint, {"id": finished.id, **make_job(seed=8)})

    assert other.output["seed"] == 8
    assert other.output["sha256"] != finished.output["sha256"]


def test_sigterm_lets_the_running_job_finish(
    own_endpoint: LocalEndpoint, own_worker: WorkerProcess, make_job: Callable[..., Any]
) -> None:
    job_id = own_endpoint.submit(make_job(num_inference_steps=4))
    waiting_id = own_endpoint.submit(make_job())
    own_endpoint.wait_until(job_id, is_denoising, JOB_SECONDS)

    own_worker.terminate()

    job = own_endpoint.wait(job_id, JOB_SECONDS)
    assert job.status == "COMPLETED"
    assert own_worker.wait(JOB_SECONDS) == 0
    assert own_endpoint.state(waiting_id).status == "IN_QUEUE"
    assert list(own_worker.temporary_directory.iterdir()) == []


def test_sigterm_ends_an_idle_worker_promptly(
    own_endpoint: LocalEndpoint, own_worker: WorkerProcess, make_job: Callable[..., Any]
) -> None:
    own_worker.terminate()

    assert own_worker.wait(timeout_seconds=20.0) == 0  # the poll is held for 30 s
    job_id = own_endpoint.submit(make_job())
    time.sleep(0.2)
    assert own_endpoint.state(job_id).status == "IN_QUEUE"


def test_a_job_that_is_handed_out_after_sigterm_is_run(
    own_endpoint: LocalEndpoint, own_worker: WorkerProcess, make_job: Callable[..., Any]
) -> None:
    own_worker.terminate()

    job = run(own_endpoint, make_job())

    assert job.status == "COMPLETED"
    assert own_worker.wait(JOB_SECONDS) == 0


def test_a_worker_whose_disk_is_full_says_so_and_ends(
    own_endpoint: LocalEndpoint,
    worker_environment: Mapping[str, str],
    make_job: Callable[..., Any],
    media_server: MediaServer,
    tmp_path: Path,
) -> None:
    with contextlib.ExitStack() as ending:
        worker = WorkerProcess(own_endpoint, tmp_path / "worker", environment=worker_environment)
        left = worker.temporary_directory / "avatar-job-of-a-killed-worker"
        left.mkdir()
        (left / ".lock").touch()
        ending.enter_context(worker)
        worker.wait_until_polling(JOB_SECONDS)
        assert not left.exists()
        # no file of it grows beyond this: its log is smaller
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
        url = media_server.add("/face.png", bytes(300_000))

        job = run(own_endpoint, make_job(image=url))

        assert (job.status, code(job)) == ("FAILED", "WORKER_FAILED")
        assert job.output["error_info"]["retryable"] is True
        assert job.stop_pod
        assert worker.wait(JOB_SECONDS) == 0
        assert list(worker.temporary_directory.iterdir()) == []


def test_ten_jobs_each_end_as_they_should_and_leave_nothing_behind(
    endpoint: LocalEndpoint,
    shared_worker: WorkerProcess,
    make_job: Callable[..., Any],
    media_server: MediaServer,
    make_portrait: Callable[..., bytes],
) -> None:
    worker = shared_worker
    picture_url = media_server.add("/face.jpg", make_portrait(format="JPEG"))
    jobs = [
        (make_job(), "COMPLETED"),
        (make_job(image=picture_url, output={"thumbnail": True}), "COMPLETED"),
        (make_job(output={"delivery": "inline"}), "COMPLETED"),
        (make_job(nonsense=1), "FAILED"),
        (make_job(num_inference_steps=MANY_STEPS), "CANCELLED"),
        (make_job(fps=12.5), "COMPLETED"),
        (make_job(audio=base64.b64encode(b"no sound").decode()), "FAILED"),
        (make_job(image=media_server.url + "/missing"), "FAILED"),
        (make_job(dry_run=True), "COMPLETED"),
        (make_job(num_inference_steps=2), "COMPLETED"),
    ]
    rss_bytes, open_files = [], []

    for job, expected in jobs:
        job_id = endpoint.submit(job)
        if expected == "CANCELLED":
            endpoint.wait_until(job_id, is_denoising, JOB_SECONDS)
            endpoint.cancel(job_id)
            probe = run(endpoint, make_job(nonsense=1))  # ends once the worker is free again
            assert probe.status == "FAILED"
        ended = endpoint.wait(job_id, JOB_SECONDS)
        assert (ended.status, len(ended.results)) == (expected, expected != "CANCELLED")
        shares = [payload["progress"] for payload in ended.progress]
        assert shares == sorted(shares)
        assert list(worker.temporary_directory.iterdir()) == []
        rss_bytes.append(worker.rss_bytes())
        open_files.append(worker.open_files())

    assert max(rss_bytes[3:]) < max(rss_bytes[:3]) + 48 * 2**20
    assert max(open_files[3:]) <= max(open_files[:3]) + 2  # a poll is just opened or just closed


@pytest.fixture(scope="module")
def talkative(
    worker_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LocalEndpoint, WorkerProcess]]:
    """A worker that logs all it can and gives a result up after a second, and its endpoint."""
    environment = {
        **worker_environment,
        "RUNPOD_LOG_LEVEL": "DEBUG",
        "RESULT_RETRY_SECONDS": "1",
    }
    directory = tmp_path_factory.mktemp("talkative") / "w"
    with (
        LocalEndpoint() as endpoint,
        WorkerProcess(endpoint, directory, environment=environment) as worker,
    ):
        worker.wait_until_polling(JOB_SECONDS)
        yield endpoint, worker


def test_the_log_names_each_job_and_never_what_it_sent_or_got(
    talkative: tuple[LocalEndpoint, WorkerProcess],
    worker_environment: Mapping[str, str],
    make_job: Callable[..., Any],
) -> None:
    endpoint, worker = talkative
    secret_job = make_job(image="https://user:pass-word@127.0.0.1/a?X-Amz-Signature=sig-nature")
    jobs = [run(endpoint, job) for job in (make_job(), secret_job)]

    assert [job.status for job in jobs] == ["COMPLETED", "FAILED"]
    for job in jobs:
        assert f"job {job.id}: " in worker.log
    signature = jobs[0].output["video_url"].partition("X-Amz-Signature=")[2]
    secrets = [signature, "pass-word", "sig-nature", worker_environment["BUCKET_SECRET_ACCESS_KEY"]]
    assert not [secret for secret in secrets if secret in worker.log]
    assert make_job()["input"]["image"][:200] not in worker.log


def test_a_result_that_is_never_taken_lies_beside_its_video(
    talkative: tuple[LocalEndpoint, WorkerProcess],
    make_job: Callable[..., Any],
    object_store: BucketServer,
) -> None:
    endpoint, worker = talkative
    endpoint.lose_results(100, status=None)
    lost = endpoint.submit(make_job())
    wait_until(lambda: "the result was given up" in worker.log)

    key = f"avatar/{lost}.mp4.json"
    assert f"it is in the bucket {object_store.bucket} under {key}" in worker.log
    kept = object_store.client.get_object(Bucket=object_store.bucket, Key=key)["Body"].read()
    output = json.loads(kept)["output"]
    with urlopen(output["video_url"], timeout=10) as answer:
        assert hashlib.sha256(answer.read()).hexdigest() == output["sha256"]


def test_a_worker_without_weights_says_so_and_takes_no_job(
    own_endpoint: LocalEndpoint, tmp_path: Path
) -> None:
    environment = {"MODEL_DIR": str(tmp_path / "nothing")}
    with (
        WorkerProcess(own_endpoint, tmp_path / "worker", environment=environment) as worker,
        pytest.raises(RuntimeError, match="the worker ended"),
    ):
        worker.wait_until_polling(JOB_SECONDS)

    failed = [beat.failed_check for beat in own_endpoint.heartbeats if beat.failed_check]
    assert len(failed) == 1
    assert "the model could not be loaded" in worker.log
