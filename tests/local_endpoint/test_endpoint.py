"""The endpoint as clients meet it: RunPod's own library, limits, webhooks, hostile bodies."""

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from local_endpoint import LocalEndpoint, WorkerProcess, client_api, job_queue
from local_endpoint.job_queue import Webhook
from local_endpoint.webhooks import call
from tests.support.waiting import wait_until

HERE = Path(__file__).parent


class Receiver:
    """A webhook's receiver that answers as it is told, then with 200."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.statuses: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.calls.append((self.path, json.loads(body)))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def wait_for(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        wait_until(lambda: len(self.calls) >= count, lambda: self.calls)
        return self.calls

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEndpoint]:
    """An endpoint with one worker that does as its jobs tell it."""
    with (
        LocalEndpoint(webhook_retry_seconds=0.5) as endpoint,
        WorkerProcess(
            endpoint, tmp_path_factory.mktemp("told") / "w", script=HERE / "told_handler.py"
        ) as worker,
    ):
        worker.wait_until_polling(timeout_seconds=300)
        yield endpoint


@pytest.fixture
def alone() -> Iterator[LocalEndpoint]:
    """An endpoint without workers."""
    with LocalEndpoint() as endpoint:
        yield endpoint


def client_of(endpoint: Any) -> httpx.Client:
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    return httpx.Client(base_url=endpoint.url, headers=headers, timeout=30)


@pytest.fixture
def client(told: LocalEndpoint) -> Iterator[httpx.Client]:
    with client_of(told) as client:
        yield client


@pytest.fixture
def lone_client(alone: LocalEndpoint) -> Iterator[httpx.Client]:
    with client_of(alone) as client:
        yield client


def wait_for_status(client: Any, job_id: str, *statuses: str) -> Any:
    def state() -> Any:
        return client.get(f"/status/{job_id}").json()

    wait_until(lambda: state()["status"] in statuses, state)
    return state()


# RunPod's own client library


def run_library(way: str, endpoint: Any, job: dict[str, Any]) -> Any:
    done = subprocess.run(
        [
            sys.executable,
            HERE.parent / "support" / "runpod_client.py",
            way,
            endpoint.api_key,
            endpoint.endpoint_id,
        ],
        input=json.dumps(job),
        env={"PATH": "", "RUNPOD_ENDPOINT_BASE_URL": f"{endpoint.origin}/v2"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def demo_job(
    make_portrait: Callable[..., bytes], make_speech: Callable[..., bytes]
) -> dict[str, dict[str, Any]]:
    media = {"image": make_portrait(), "audio": make_speech(seconds=1.0)}
    encoded = {name: b64encode(content).decode() for name, content in media.items()}
    return {"input": {"resolution": 256, "num_inference_steps": 6, "seed": 1, **encoded}}


def test_runpods_library_completes_the_whole_story(
    endpoint: LocalEndpoint,
    shared_worker: WorkerProcess,
    demo_job: dict[str, dict[str, Any]],
    receiver: Receiver,
) -> None:
    job = {**demo_job, "webhook": f"{receiver.url}/done?token=secret"}

    seen = run_library("sync", endpoint, job)

    assert seen["health"]["workers"]["idle"] == 1
    assert [status for status in seen["statuses"] if status == "IN_PROGRESS"]
    assert seen["statuses"][-1] == "COMPLETED"
    assert len(set(seen["progress"])) > 2
    assert seen["progress"] == sorted(seen["progress"])
    assert seen["output"]["num_frames"] == 25
    assert seen["run_sync"]["parameters"]["num_inference_steps"] == 1
    assert seen["cancel"]["status"] == seen["after_cancel"] == "CANCELLED"
    assert seen["purge"] == {"removed": 0, "status": "completed"}
    [(path, body)] = receiver.wait_for(1)
    assert path == "/done?token=secret"
    assert body["id"] == seen["id"]
    assert (body["status"], body["webhook"]) == ("COMPLETED", job["webhook"])
    assert body["output"] == seen["output"]
    assert body["input"] == demo_job["input"]
    assert body["executionTime"] > 0


def test_runpods_library_works_for_asyncio_too(
    endpoint: LocalEndpoint, shared_worker: WorkerProcess, demo_job: dict[str, dict[str, Any]]
) -> None:
    seen = run_library("async", endpoint, demo_job)

    assert seen["status"] == "COMPLETED"
    assert seen["output"]["num_frames"] == 25
    assert seen["cancel"]["status"] == "CANCELLED"
    assert seen["health"]["jobs"]["completed"] > 0


# States


def test_runsync_answers_with_the_result(client: httpx.Client) -> None:
    answer = client.post("/runsync", json={"input": {"sleep": 0.2}})

    assert answer.status_code == 200
    assert answer.json()["status"] == "COMPLETED"
    assert answer.json()["id"].startswith("sync-")
    assert answer.json()["executionTime"] >= 200


def test_runsync_that_takes_too_long_answers_how_far_it_is_and_the_job_goes_on(
    client: httpx.Client,
) -> None:
    begun = client.post("/runsync?wait=1000", json={"input": {"sleep": 2}}).json()

    assert begun["status"] == "IN_PROGRESS"
    assert (
        wait_for_status(client, begun["id"], "COMPLETED")["output"]["echo"]["input"]["sleep"] == 2
    )


def test_a_job_over_its_execution_timeout_is_ended_stopped_and_can_be_retried(
    client: httpx.Client, told: LocalEndpoint
) -> None:
    policy = {"executionTimeout": 5000}
    late_id = client.post("/run", json={"input": {"sleep": 60}, "policy": policy}).json()["id"]

    late = wait_for_status(client, late_id, "TIMED_OUT")
    following = client.post("/runsync", json={"input": {}}).json()
    retried = client.post(f"/retry/{late_id}").json()

    assert late["executionTime"] >= 5000
    assert following["status"] == "COMPLETED"  # so the worker is free again
    assert retried == {"id": late_id, "status": "IN_QUEUE"}
    wait_for_status(client, late_id, "IN_PROGRESS")
    assert client.post(f"/cancel/{late_id}").json()["status"] == "CANCELLED"


def test_a_job_over_its_time_to_live_is_gone_even_while_it_runs(
    client: httpx.Client, told: LocalEndpoint
) -> None:
    job_id = told.submit({"input": {"sleep": 60}, "policy": {"ttl": 4000}})
    told.wait_until(job_id, lambda job: job.claimed_at_seconds is not None, 60)

    following = client.post("/runsync", json={"input": {}}).json()

    assert client.get(f"/status/{job_id}").status_code == 404
    assert following["status"] == "COMPLETED"


@pytest.mark.parametrize(("prefix", "is_sync"), [("run", False), ("runsync", True)])
def test_a_result_is_kept_for_the_documented_time(
    client: httpx.Client,
    told: LocalEndpoint,
    monkeypatch: pytest.MonkeyPatch,
    prefix: str,
    is_sync: bool,
) -> None:
    monkeypatch.setitem(job_queue.KEPT_SECONDS, prefix, 5.0)
    job_id = told.submit({"input": {}}, is_sync=is_sync)
    wait_for_status(client, job_id, "COMPLETED")

    wait_until(lambda: client.get(f"/status/{job_id}").status_code == 404)


def test_a_completed_job_is_neither_cancelled_nor_retried(client: httpx.Client) -> None:
    job_id = client.post("/runsync", json={"input": {}}).json()["id"]

    assert client.post(f"/cancel/{job_id}").json()["status"] == "COMPLETED"
    assert client.post(f"/retry/{job_id}").status_code == 400


def test_purging_removes_what_waits_and_leaves_what_runs(
    client: httpx.Client, tmp_path: Path
) -> None:
    door = tmp_path / "door"
    running_id = client.post("/run", json={"input": {"until": str(door)}}).json()["id"]
    wait_for_status(client, running_id, "IN_PROGRESS")
    waiting_ids = [client.post("/run", json={"input": {}}).json()["id"] for _ in range(3)]

    assert client.post("/purge-queue").json() == {"removed": 3, "status": "completed"}

    assert {client.get(f"/status/{job_id}").status_code for job_id in waiting_ids} == {404}
    door.touch()
    assert wait_for_status(client, running_id, "COMPLETED")


def test_what_a_handler_yields_is_streamed_once(
    alone: LocalEndpoint, lone_client: httpx.Client
) -> None:
    job_id = lone_client.post("/run", json={"input": {}}).json()["id"]
    key = alone.worker_environment("w", Path("/"))["RUNPOD_AI_API_KEY"]
    with httpx.Client(base_url=alone.url, headers={"Authorization": key}) as worker:
        worker.get("/job-take/w?job_in_progress=0")
        for item in ("a", {"b": 1}):
            worker.post(f"/job-stream/w/{job_id}", json={"output": item})

    first = lone_client.get(f"/stream/{job_id}").json()

    assert first == {"status": "IN_PROGRESS", "stream": [{"output": "a"}, {"output": {"b": 1}}]}
    assert lone_client.get(f"/stream/{job_id}").json()["stream"] == []


# Webhooks


def test_a_webhook_that_is_not_taken_is_called_twice_more(
    client: httpx.Client, receiver: Receiver
) -> None:
    receiver.statuses = [500, 302]
    told = {"return": {"error": "E: why"}}

    client.post("/run", json={"input": told, "webhook": receiver.url + "/w"})

    calls = receiver.wait_for(3)
    time.sleep(1.5)
    assert [path for path, _ in calls] == ["/w"] * 3  # a redirect is not followed
    assert {(body["status"], body["error"]) for _, body in calls} == {("FAILED", "E: why")}


def test_a_webhook_that_is_never_taken_is_given_up_after_three_calls(
    client: httpx.Client, receiver: Receiver
) -> None:
    receiver.statuses = [500] * 9

    client.post("/run", json={"input": {}, "webhook": receiver.url})

    receiver.wait_for(3)
    time.sleep(2.0)
    assert len(receiver.calls) == 3


def test_a_cancelled_job_calls_its_webhook(lone_client: httpx.Client, receiver: Receiver) -> None:
    job = {"input": {}, "webhook": receiver.url}
    job_id = lone_client.post("/run", json=job).json()["id"]

    lone_client.post(f"/cancel/{job_id}")

    assert receiver.wait_for(1)[0][1]["status"] == "CANCELLED"


def test_a_webhook_outlives_the_endpoint(tmp_path: Path, receiver: Receiver) -> None:
    url = receiver.url
    receiver.statuses = [500]
    with (
        LocalEndpoint(tmp_path, webhook_retry_seconds=1.5) as endpoint,
        client_of(endpoint) as client,
    ):
        job_id = client.post("/run", json={"input": {}, "webhook": url}).json()["id"]
        client.post(f"/cancel/{job_id}")
        receiver.wait_for(1)

    with LocalEndpoint(tmp_path):
        calls = receiver.wait_for(2)

    assert {body["id"] for _, body in calls} == {job_id}


@pytest.mark.parametrize("host", ["169.254.169.254", "10.0.0.1", "[fe80::1]", "[::ffff:10.0.0.1]"])
def test_a_webhook_into_a_private_network_is_not_called(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not asyncio.run(call(Webhook("job", f"http://{host}/", {})))

    assert caplog.messages == ["webhook of job job: PermissionError"]  # refused, not unreachable


# What is refused


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("", "required"),
        ("[]", "valid dictionary"),
        ("{", "JSON"),
        ("{}", "input: "),
        ('{"input": 1}', "input: "),
        ('{"input": {"a": NaN}}', "JSON"),
        ('{"input": {"a": ' + "9" * 5000 + "}}", "JSON"),
        ("[" * 100_000, "JSON"),
        ('{"input": {}, "policy": {"executionTimeout": 1}}', "policy.executionTimeout: "),
        ('{"input": {}, "policy": {"ttl": true}}', "policy.ttl: "),
        ('{"input": {}, "webhook": "file:///etc/passwd"}', "webhook: "),
        ('{"input": {}, "webhook": "http://a b"}', "webhook: "),
        ('{"input": {}, "webhook": "http://\\ud800"}', "webhook: "),
    ],
)
def test_a_body_that_is_no_job_is_refused_with_its_place(
    lone_client: httpx.Client, body: str, told: LocalEndpoint
) -> None:
    answer = lone_client.post("/run", content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400
    assert told in answer.json()["error"]
    assert lone_client.get("/health").json()["jobs"]["inQueue"] == 0


@pytest.mark.parametrize(("operation", "limit"), [("run", 10_000_000), ("runsync", 20_000_000)])
def test_a_body_over_the_limit_is_refused(
    lone_client: httpx.Client, operation: str, limit: int
) -> None:
    job = {"input": {"image": "x" * limit}}

    answer = lone_client.post(f"/{operation}", json=job)

    assert answer.status_code == 413
    assert str(limit) in answer.json()["error"]


def test_a_body_without_an_end_is_cut(alone: LocalEndpoint) -> None:
    def body() -> Iterator[bytes]:
        while True:
            yield b"x" * 1_000_000

    with client_of(alone) as client:
        try:
            answer = client.post("/run", content=body(), headers={"Content-Type": "text/json"})
        except httpx.TransportError:
            return  # cut while it was still sending
        assert answer.status_code == 413


@pytest.mark.parametrize("key", ["", "wrong", "Bearer", "Bearer wrong", "Basic x", "Bearer ünï"])
def test_a_wrong_key_is_refused_everywhere(alone: LocalEndpoint, key: str) -> None:
    calls = [("POST", "/run"), ("POST", "/runsync"), ("GET", "/health"), ("GET", "/status/a")]
    calls += [("POST", "/cancel/a"), ("POST", "/retry/a"), ("POST", "/purge-queue")]
    calls += [("GET", "/stream/a"), ("GET", "/job-take/w"), ("GET", "/ping/w")]
    calls += [("POST", "/job-done/w/a"), ("GET", "/job-stop/w")]
    for method, path in calls:
        headers = {b"Authorization": key.encode()}
        answer = httpx.request(method, alone.url + path, headers=headers, timeout=5)
        assert answer.status_code == 401, path


def test_the_clients_key_does_not_open_the_workers_side(
    alone: LocalEndpoint, lone_client: httpx.Client
) -> None:
    assert lone_client.get("/job-take/w").status_code == 401


def test_more_waiting_jobs_than_the_limit_are_put_off(
    lone_client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_api, "MAX_WAITING_JOBS", 2)
    answers = [lone_client.post("/run", json={"input": {}}) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].headers["Retry-After"]


def test_a_result_for_a_job_that_is_not_known_is_refused(alone: LocalEndpoint) -> None:
    key = alone.worker_environment("w", Path("/"))["RUNPOD_AI_API_KEY"]
    headers = {"Authorization": key}

    answer = httpx.post(f"{alone.url}/job-done/w/nothing", json={"output": 1}, headers=headers)

    assert answer.status_code == 404


def test_the_keys_are_kept_for_this_user_alone(tmp_path: Path) -> None:
    with LocalEndpoint(tmp_path) as first:
        key = first.api_key
    with LocalEndpoint(tmp_path, with_object_store=True) as second:
        assert second.api_key == key
        for name in ("api-key", "worker-key", "bucket-key", "bucket.json"):
            assert (tmp_path / name).stat().st_mode & 0o077 == 0


def test_two_endpoints_never_share_a_directory(tmp_path: Path) -> None:
    with LocalEndpoint(tmp_path), pytest.raises(OSError, match="another endpoint uses"):
        LocalEndpoint(tmp_path).start()


@pytest.fixture
def eager_worker(alone: LocalEndpoint) -> Iterator[None]:
    """Takes each job at once, by the worker's protocol, and answers what it was given."""
    over = threading.Event()

    def work() -> None:
        key = alone.worker_environment("w", Path("/"))["RUNPOD_AI_API_KEY"]
        with httpx.Client(base_url=alone.url, headers={"Authorization": key}, timeout=60) as worker:
            while not over.is_set():
                answer = worker.get("/job-take/w?job_in_progress=0")
                if answer.status_code == 200:
                    job = answer.json()
                    worker.post(f"/job-done/w/{job['id']}", json={"output": job["input"]})

    thread = threading.Thread(target=work)
    thread.start()
    yield
    over.set()
    alone.submit({"input": {}})  # ends its poll
    thread.join()


@pytest.mark.slow
def test_schemathesis_finds_no_fault(alone: LocalEndpoint, eager_worker: None) -> None:
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("run", f"{alone.origin}/openapi.json"),
        *("--header", f"Authorization: Bearer {alone.api_key}"),
        *("--seed", "1", "--max-examples", "25", "--suppress-health-check", "all", "--no-color"),
        *("--exclude-checks", "positive_data_acceptance"),
    ]
    environment = {"PATH": "/usr/bin", "HOME": str(alone.directory)}
    done = subprocess.run(
        command, env=environment, cwd=alone.directory, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout[-6000:]


# Many clients


@pytest.mark.slow
def test_many_jobs_of_many_clients_all_end_in_order_of_arrival(tmp_path: Path) -> None:
    with LocalEndpoint() as endpoint:
        workers = [
            WorkerProcess(endpoint, tmp_path / name, script=HERE / "told_handler.py")
            for name in "ab"
        ]
        with workers[0], workers[1], client_of(endpoint) as client:
            for worker in workers:
                worker.wait_until_polling(timeout_seconds=300)

            def submit(number: int) -> list[Any]:
                return [
                    client.post("/run", json={"input": {"number": number}}).json()["id"]
                    for _ in range(2)
                ]

            with ThreadPoolExecutor(20) as clients:
                job_ids = [job_id for ids in clients.map(submit, range(20)) for job_id in ids]
            ended = [endpoint.wait(job_id, timeout_seconds=300) for job_id in job_ids]

    assert {job.status for job in ended} == {"COMPLETED"}
    assert {job.num_claims for job in ended} == {1}
    assert {job.worker_id for job in ended} == {worker.worker_id for worker in workers}
    by_arrival = sorted(ended, key=lambda job: job.created_at_seconds)
    claimed = [job.claimed_at_seconds or 0 for job in by_arrival]
    assert claimed == sorted(claimed)
