"""The local endpoint against the SDK's own loop, with a handler that only does as it is told."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest

from local_endpoint import LocalEndpoint, WorkerProcess
from tests.support.waiting import wait_until

HANDLER = Path(__file__).with_name("told_handler.py")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[LocalEndpoint]:
    with LocalEndpoint(hold_seconds=5.0) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def worker(
    endpoint: LocalEndpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    directory = tmp_path_factory.mktemp("worker")
    with WorkerProcess(endpoint, directory / "run", script=HANDLER) as worker:
        worker.wait_until_polling(timeout_seconds=300)
        yield worker


def request(
    endpoint: Any, path: Any, *, body: Any = None, key: Any = None, timeout_seconds: float = 5.0
) -> tuple[Any, Any]:
    key = key or endpoint.worker_environment("any", Path("/"))["RUNPOD_AI_API_KEY"]
    asked = Request(f"{endpoint.url}/{path}", data=body, headers={"Authorization": key})
    with urlopen(asked, timeout=timeout_seconds) as answer:
        return answer.status, answer.read()


def test_a_job_reaches_the_handler_whole_and_its_output_comes_back(
    endpoint: LocalEndpoint, worker: WorkerProcess
) -> None:
    job = {"input": {"text": "ünï"}, "s3Config": {"bucketName": "b"}, "policy": {"ttl": 60_000}}

    job_id = endpoint.submit(job)
    ended = endpoint.wait(job_id, timeout_seconds=60)

    assert ended.status == "COMPLETED"
    assert ended.output["echo"] == {"id": job_id, **job}
    assert ended.worker_id == worker.worker_id
    assert len(ended.results) == 1


def test_a_handler_that_raises_fails_its_job(
    endpoint: LocalEndpoint, worker: WorkerProcess
) -> None:
    ended = endpoint.wait(endpoint.submit({"input": {"raise": True}}), timeout_seconds=60)

    assert ended.status == "FAILED"
    assert ended.error is not None
    assert "as told" in ended.error


def test_an_error_beside_other_output_fails_the_job_and_keeps_the_output(
    endpoint: LocalEndpoint, worker: WorkerProcess
) -> None:
    told = {"return": {"error": "E: why", "detail": 1, "refresh_worker": True}}

    ended = endpoint.wait(endpoint.submit({"input": told}), timeout_seconds=60)

    assert (ended.status, ended.error, ended.stop_pod) == ("FAILED", "E: why", True)
    assert ended.output["detail"] == 1


def test_progress_is_the_output_while_the_job_runs(
    endpoint: LocalEndpoint, worker: WorkerProcess, tmp_path: Path
) -> None:
    door = tmp_path / "door"
    job_id = endpoint.submit({"input": {"progress": 30, "until": str(door)}})

    running = endpoint.wait_until(job_id, lambda job: len(job.progress) == 3, timeout_seconds=60)
    door.touch()
    ended = endpoint.wait(job_id, timeout_seconds=60)

    assert running.status == "IN_PROGRESS"
    assert running.output == running.progress[-1]
    assert sorted(step["percent"] for step in ended.progress) == [0, 10, 20]
    assert "echo" in ended.output


def test_heartbeats_name_the_job_while_it_runs(
    endpoint: LocalEndpoint, worker: WorkerProcess, tmp_path: Path
) -> None:
    door = tmp_path / "door"
    job_id = endpoint.submit({"input": {"until": str(door)}})

    wait_until(lambda: (worker.worker_id, (job_id,)) in beaters(endpoint))

    door.touch()
    endpoint.wait(job_id, timeout_seconds=60)


def beaters(endpoint: LocalEndpoint) -> set[tuple[str, tuple[str, ...]]]:
    return {(beat.worker_id, beat.job_ids) for beat in endpoint.heartbeats}


def test_a_running_job_that_is_cancelled_posts_nothing_and_the_next_one_runs(
    endpoint: LocalEndpoint, worker: WorkerProcess
) -> None:
    cancelled_id = endpoint.submit({"input": {"sleep": 30}})
    next_id = endpoint.submit({"input": {}})
    endpoint.wait_until(cancelled_id, lambda job: job.status == "IN_PROGRESS", timeout_seconds=60)
    time.sleep(0.5)  # the SDK drops a stop that comes before it has begun the job

    endpoint.cancel(cancelled_id)

    assert endpoint.wait(next_id, timeout_seconds=60).status == "COMPLETED"
    assert endpoint.state(cancelled_id).status == "CANCELLED"
    assert endpoint.state(cancelled_id).posts == ()


def test_a_waiting_job_that_is_cancelled_is_never_handed_out(
    endpoint: LocalEndpoint, worker: WorkerProcess
) -> None:
    running_id = endpoint.submit({"input": {"sleep": 0.5}})
    waiting_id = endpoint.submit({"input": {}})

    endpoint.cancel(waiting_id)
    endpoint.wait(running_id, timeout_seconds=60)
    endpoint.wait(endpoint.submit({"input": {}}), timeout_seconds=60)

    assert endpoint.state(waiting_id).status == "CANCELLED"
    assert endpoint.state(waiting_id).num_claims == 0


@pytest.mark.parametrize("status", [400, None], ids=["refused", "connection cut"])
def test_a_job_whose_result_was_lost_is_handed_out_again(
    endpoint: LocalEndpoint, worker: WorkerProcess, status: Any
) -> None:
    endpoint.lose_results(status=status)

    ended = endpoint.wait(endpoint.submit({"input": {}}), timeout_seconds=60)

    assert ended.status == "COMPLETED"
    assert [post.accepted for post in ended.results] == [False, True]
    assert ended.num_claims == 2


def test_a_job_whose_result_is_lost_each_time_is_given_up(
    endpoint: LocalEndpoint, worker: WorkerProcess
) -> None:
    endpoint.lose_results(3, status=400)

    ended = endpoint.wait(endpoint.submit({"input": {}}), timeout_seconds=60)

    assert (ended.status, ended.num_claims) == ("FAILED", 3)
    assert ended.error == "lost by 3 workers in a row"


def test_a_result_that_meets_a_server_error_is_posted_again(
    endpoint: LocalEndpoint, worker: WorkerProcess
) -> None:
    endpoint.lose_results(status=503)

    ended = endpoint.wait(endpoint.submit({"input": {}}), timeout_seconds=60)

    assert [post.accepted for post in ended.results] == [False, True]
    assert ended.num_claims == 1


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"return": {"value": float("nan")}}, "the worker's result is not JSON: NaN"),
        ({"size": 10_000_001}, "the worker's result is over the limit of 10000000 bytes"),
    ],
    ids=["not JSON", "too large"],
)
def test_a_result_that_cannot_be_kept_fails_its_job_and_says_why(
    endpoint: LocalEndpoint, worker: WorkerProcess, told: dict[str, Any], reason: str
) -> None:
    ended = endpoint.wait(endpoint.submit({"input": told}), timeout_seconds=60)

    assert (ended.status, ended.output) == ("FAILED", None)
    assert ended.error is not None
    assert ended.error.startswith(reason)


def test_a_slow_platform_still_gets_the_result(endpoint: Any, worker: WorkerProcess) -> None:
    endpoint.delay_answers(0.5)
    first_id, second_id = endpoint.submit({"input": {}}), endpoint.submit({"input": {}})

    second = endpoint.wait(second_id, timeout_seconds=60)
    endpoint.delay_answers(0.0)

    assert second.claimed_at_seconds - endpoint.state(first_id).ended_at_seconds > 0.4


def test_an_empty_poll_is_held_and_then_answered_with_no_content() -> None:
    with LocalEndpoint(hold_seconds=0.3) as endpoint:
        started = time.monotonic()
        status, body = request(endpoint, "job-take/other?gpu=local")

    assert (status, body) == (204, b"")
    assert time.monotonic() - started >= 0.3


def test_a_worker_that_hangs_up_takes_no_job_with_it() -> None:
    with LocalEndpoint() as endpoint:
        with pytest.raises(TimeoutError):
            request(endpoint, "job-take/gone?gpu=local", timeout_seconds=0.3)
        time.sleep(2.0)  # until the server has seen that
        job_id = endpoint.submit({"input": {}})

        _, body = request(endpoint, "job-take/present?gpu=local")

    assert json.loads(body)["id"] == job_id


def test_a_wrong_key_is_refused(endpoint: Any) -> None:
    with pytest.raises(HTTPError, match="401") as refusal:
        request(endpoint, "job-take/other?gpu=local", key="wrong")
    refusal.value.close()


def test_an_unfit_worker_is_recorded_with_its_reason(endpoint: Any) -> None:
    request(endpoint, "ping/unfit?status=unhealthy&check=weights&reason=not+there")

    assert endpoint.heartbeats[-1].failed_check == "weights: not there"


def test_streamed_items_are_kept() -> None:
    with LocalEndpoint() as endpoint:
        job_id = endpoint.submit({"input": {}})
        request(endpoint, "job-take/any?job_in_progress=0")

        request(endpoint, f"job-stream/any/{job_id}?isStream=false", body=b'{"output": "part"}')

        assert endpoint.state(job_id).stream == ("part",)


def test_a_worker_that_ends_before_its_first_poll_is_reported_with_its_log(
    endpoint: LocalEndpoint, tmp_path: Path
) -> None:
    script = tmp_path / "handler.py"
    script.write_text("raise SystemExit('no weights')")

    with (
        WorkerProcess(endpoint, tmp_path / "run", script=script) as worker,
        pytest.raises(RuntimeError, match="no weights"),
    ):
        worker.wait_until_polling(timeout_seconds=300)


def test_killing_a_worker_ends_its_heartbeats(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    with WorkerProcess(endpoint, tmp_path / "run", script=HANDLER) as worker:
        worker.wait_until_polling(timeout_seconds=300)
        assert worker.rss_bytes() > 10 * 2**20
        assert worker.open_files() > 3
        # its own process begins later than the worker does
        wait_until(lambda: any(b.worker_id == worker.worker_id for b in endpoint.heartbeats))
        family = psutil.Process(worker.pid).children(recursive=True)

    assert family
    wait_until(lambda: not any(map(is_running, family)))


def is_running(process: psutil.Process) -> bool:
    """Whether it still does anything; where nobody collects it, it stays as a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_worker_sees_nothing_of_this_environment(
    endpoint: LocalEndpoint, worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BUCKET_NAME", "mine")
    script = tmp_path / "handler.py"
    script.write_text("import os; raise SystemExit(str(sorted(os.environ)))")

    with (
        WorkerProcess(endpoint, tmp_path / "run", script=script) as other,
        pytest.raises(RuntimeError) as failure,
    ):
        other.wait_until_polling(timeout_seconds=60)

    assert "BUCKET_NAME" not in str(failure.value)
    assert "RUNPOD_POD_ID" in str(failure.value)
