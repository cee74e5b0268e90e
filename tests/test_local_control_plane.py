"""The control plane against the SDK's own loop, with a handler that only does as it is told."""

import json
import time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from worker.local import ControlPlane, WorkerProcess

HANDLER = """
import asyncio
import runpod

async def handler(job):
    do = job["input"]
    for percent in range(0, do.get("progress", 0), 10):
        runpod.serverless.progress_update(job, {"percent": percent})
        await asyncio.sleep(0.1)
    await asyncio.sleep(do.get("sleep", 0))
    if do.get("raise"):
        raise RuntimeError("as told")
    return {"echo": job, **do.get("return", {})}

if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
"""


@pytest.fixture(scope="module")
def plane():
    with ControlPlane(hold_seconds=5.0) as control_plane:
        yield control_plane


@pytest.fixture(scope="module")
def worker(plane, tmp_path_factory):
    directory = tmp_path_factory.mktemp("worker")
    script = directory / "handler.py"
    script.write_text(HANDLER)
    with WorkerProcess(plane, directory / "run", script=script) as worker:
        worker.wait_until_polling(timeout_seconds=30)
        yield worker


def request(plane, path, *, body=None, key=ControlPlane.api_key):
    address = f"{plane.url}/v2/local/{path}"
    with urlopen(Request(address, data=body, headers={"Authorization": key}), timeout=5) as answer:
        return answer.status, answer.read()


def test_a_job_reaches_the_handler_whole_and_its_output_comes_back(plane, worker):
    job = {"input": {"text": "ünï"}, "s3Config": {"bucketName": "b"}, "policy": {"ttl": 1}}

    job_id = plane.submit(job)
    ended = plane.wait(job_id, timeout_seconds=10)

    assert ended.status == "COMPLETED"
    assert ended.output["echo"] == {"id": job_id, **job}
    assert ended.worker_id == worker.worker_id
    assert len(ended.results) == 1


def test_a_handler_that_raises_fails_its_job(plane, worker):
    ended = plane.wait(plane.submit({"input": {"raise": True}}), timeout_seconds=10)

    assert ended.status == "FAILED"
    assert "as told" in ended.error


def test_an_error_beside_other_output_fails_the_job_and_keeps_the_output(plane, worker):
    told = {"return": {"error": "E: why", "detail": 1, "refresh_worker": True}}

    ended = plane.wait(plane.submit({"input": told}), timeout_seconds=10)

    assert (ended.status, ended.error, ended.stop_pod) == ("FAILED", "E: why", True)
    assert ended.output["detail"] == 1


def test_progress_is_the_output_while_the_job_runs(plane, worker):
    job_id = plane.submit({"input": {"progress": 30, "sleep": 0.5}})

    running = plane.wait_until(job_id, lambda job: len(job.progress) == 3, timeout_seconds=10)
    ended = plane.wait(job_id, timeout_seconds=10)

    assert running.status == "IN_PROGRESS"
    assert running.output == running.progress[-1]
    assert sorted(step["percent"] for step in ended.progress) == [0, 10, 20]
    assert "echo" in ended.output


def test_heartbeats_name_the_job_while_it_runs(plane, worker):
    job_id = plane.submit({"input": {"sleep": 1.5}})

    ended = plane.wait(job_id, timeout_seconds=10)

    during = [beat for beat in plane.heartbeats if beat.at_seconds > ended.taken_at_seconds[0]]
    assert {beat.worker_id for beat in during} == {worker.worker_id}
    assert (job_id,) in {beat.job_ids for beat in during}


def test_a_running_job_that_is_cancelled_posts_nothing_and_the_next_one_runs(plane, worker):
    cancelled_id = plane.submit({"input": {"sleep": 30}})
    next_id = plane.submit({"input": {}})
    plane.wait_until(cancelled_id, lambda job: job.status == "IN_PROGRESS", timeout_seconds=10)
    time.sleep(0.5)  # the SDK drops a stop that comes before it has begun the job

    plane.cancel(cancelled_id)

    assert plane.wait(next_id, timeout_seconds=10).status == "COMPLETED"
    assert plane.state(cancelled_id).status == "CANCELLED"
    assert plane.state(cancelled_id).posts == []


def test_a_waiting_job_that_is_cancelled_is_never_handed_out(plane, worker):
    running_id = plane.submit({"input": {"sleep": 0.5}})
    waiting_id = plane.submit({"input": {}})

    plane.cancel(waiting_id)
    plane.wait(running_id, timeout_seconds=10)
    plane.wait(plane.submit({"input": {}}), timeout_seconds=10)

    assert plane.state(waiting_id).status == "CANCELLED"
    assert plane.state(waiting_id).taken_at_seconds == []


@pytest.mark.parametrize("status", [400, None], ids=["refused", "connection cut"])
def test_a_lost_result_leaves_the_job_running_until_it_is_handed_out_again(plane, worker, status):
    plane.lose_results(status=status)
    job_id = plane.submit({"input": {}})

    lost = plane.wait_until(job_id, lambda job: bool(job.results), timeout_seconds=10)
    plane.requeue(job_id)
    ended = plane.wait(job_id, timeout_seconds=10)

    assert (lost.status, lost.output) == ("IN_PROGRESS", None)
    assert ended.status == "COMPLETED"
    assert [post.accepted for post in ended.results] == [False, True]
    assert len(ended.taken_at_seconds) == 2


def test_a_result_that_meets_a_server_error_is_posted_again(plane, worker):
    plane.lose_results(status=503)

    ended = plane.wait(plane.submit({"input": {}}), timeout_seconds=10)

    assert [post.accepted for post in ended.results] == [False, True]
    assert len(ended.taken_at_seconds) == 1


def test_a_result_that_is_no_json_is_refused(plane, worker):
    job_id = plane.submit({"input": {"return": {"value": float("nan")}}})

    with pytest.raises(TimeoutError, match="IN_PROGRESS"):
        plane.wait(job_id, timeout_seconds=1.0)

    plane.cancel(job_id)


def test_a_slow_platform_still_gets_the_result(plane, worker):
    plane.answer_delay_seconds = 0.5
    first_id, second_id = plane.submit({"input": {}}), plane.submit({"input": {}})

    second = plane.wait(second_id, timeout_seconds=10)
    plane.answer_delay_seconds = 0.0

    assert second.taken_at_seconds[0] - plane.state(first_id).ended_at_seconds > 0.4


def test_an_empty_poll_is_held_and_then_answered_with_no_content():
    with ControlPlane(hold_seconds=0.3) as plane:
        started = time.monotonic()
        status, body = request(plane, "job-take/other?gpu=local")

    assert (status, body) == (204, b"")
    assert time.monotonic() - started >= 0.3


def test_a_worker_that_hangs_up_takes_no_job_with_it():
    with ControlPlane() as plane:
        with pytest.raises(TimeoutError):
            urlopen(
                Request(
                    f"{plane.url}/v2/local/job-take/gone?gpu=local",
                    headers={"Authorization": plane.api_key},
                ),
                timeout=0.3,
            )
        job_id = plane.submit({"input": {}})

        _, body = request(plane, "job-take/present?gpu=local")

    assert json.loads(body)["id"] == job_id


def test_a_wrong_key_is_refused(plane):
    with pytest.raises(HTTPError, match="401") as refusal:
        request(plane, "job-take/other?gpu=local", key="wrong")
    refusal.value.close()


def test_an_unfit_worker_is_recorded_with_its_reason(plane):
    request(plane, "ping/unfit?status=unhealthy&check=weights&reason=not+there")

    assert plane.heartbeats[-1].failed_check == "weights: not there"


def test_streamed_items_are_kept(plane):
    job_id = plane.submit({"input": {}})

    request(plane, f"job-stream/any/{job_id}?isStream=false", body=b'{"output": "part"}')

    assert plane.state(job_id).stream == ["part"]


def test_a_worker_that_ends_before_its_first_poll_is_reported_with_its_log(plane, tmp_path):
    script = tmp_path / "handler.py"
    script.write_text("raise SystemExit('no weights')")

    with (
        WorkerProcess(plane, tmp_path / "run", script=script) as worker,
        pytest.raises(RuntimeError, match="no weights"),
    ):
        worker.wait_until_polling(timeout_seconds=30)


def test_killing_a_worker_ends_its_heartbeats(plane, tmp_path):
    script = tmp_path / "handler.py"
    script.write_text(HANDLER)
    with WorkerProcess(plane, tmp_path / "run", script=script) as worker:
        worker.wait_until_polling(timeout_seconds=30)
        assert worker.rss_bytes() > 10 * 2**20
        assert worker.open_files() > 3
    killed_at_seconds = time.monotonic()

    time.sleep(1.5)

    beats = [beat for beat in plane.heartbeats if beat.worker_id == worker.worker_id]
    assert beats
    assert all(beat.at_seconds < killed_at_seconds + 0.1 for beat in beats)


def test_a_worker_sees_nothing_of_this_environment(plane, worker, monkeypatch, tmp_path):
    monkeypatch.setenv("BUCKET_NAME", "mine")
    script = tmp_path / "handler.py"
    script.write_text("import os; raise SystemExit(str(sorted(os.environ)))")

    with (
        WorkerProcess(plane, tmp_path / "run", script=script) as other,
        pytest.raises(RuntimeError) as failure,
    ):
        other.wait_until_polling(timeout_seconds=10)

    assert "BUCKET_NAME" not in str(failure.value)
    assert "RUNPOD_POD_ID" in str(failure.value)
