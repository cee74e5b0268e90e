"""A request with an id of its own is made once, however often and to however many it comes."""

import base64
import contextlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from avatar_client import AvatarEndpoint, JobStatus, SignatureError
from local_endpoint import JobRecord, LocalEndpoint, WorkerProcess
from tests.conftest import BucketServer
from tests.support.scripted_server import Answer, ScriptedServer
from tests.support.waiting import wait_until

SCRIPT = Path(__file__).with_name("once_worker.py")
NUM_CLIENTS = 20
NUM_TIMES = 5
LEASE_SECONDS = 10.0  # far more than a busy machine keeps a worker from renewing its claim
SIGNING_KEY = "a-key-of-the-operators-that-no-log-has"
JOB_SECONDS = 240.0  # far more than a job takes


class Site:
    """An endpoint with two workers and a bucket, and the list of videos that were begun."""

    def __init__(
        self,
        endpoint: LocalEndpoint,
        workers: list[WorkerProcess],
        store: BucketServer,
        begun: Path,
    ) -> None:
        self.endpoint = endpoint
        self.workers = workers
        self.store = store
        self.hold = begun.with_name("hold")
        self._begun = begun

    def begun(self, prompt: str = "") -> list[str]:
        """The processes that have begun a video, of this prompt if there is one."""
        lines = self._begun.read_text().splitlines() if self._begun.exists() else []
        parts = [line.split(" ", 1) for line in lines]
        return [process for process, begun in parts if begun.startswith(prompt)]

    def objects(self) -> set[str]:
        return set(filter(re.compile("once/").match, self.store.keys()))


@pytest.fixture(scope="module")
def site(object_store: BucketServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("once")
    begun = directory / "begun"
    environment = {
        "PYTHONPATH": str(SCRIPT.parents[2]),
        "BEGUN": str(begun),
        "LEASE_SECONDS": str(LEASE_SECONDS),
        "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
        **object_store.environment,
        "BUCKET_PREFIX": "once",
        "RESULT_SIGNING_KEY": SIGNING_KEY,
        "RUNPOD_LOG_CAPTURE": "all",
    }
    with contextlib.ExitStack() as ending:
        endpoint = ending.enter_context(LocalEndpoint(hold_seconds=1.0, lost_after_seconds=3600.0))
        workers = [
            ending.enter_context(
                WorkerProcess(endpoint, directory / name, script=SCRIPT, environment=environment)
            )
            for name in "ab"
        ]
        for worker in workers:
            worker.wait_until_polling(120)
        yield Site(endpoint, workers, object_store, begun)


@pytest.fixture(scope="module")
def make_input(smallest_input: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The `input` of a small job; arguments replace its fields."""
    return lambda **changes: smallest_input | changes


def run(site: Site, job: dict[str, Any]) -> JobRecord:
    return site.endpoint.wait(site.endpoint.submit({"input": job}), JOB_SECONDS)


def same(job: JobRecord) -> tuple[Any, ...]:
    assert job.status == "COMPLETED", job
    return tuple(job.output[name] for name in ("request_id", "key", "sha256", "seed"))


def test_each_of_many_requests_is_made_once_by_two_workers_and_answered_each_time(
    site: Site, make_input: Callable[..., dict[str, Any]]
) -> None:
    def client(number: int) -> list[dict[str, Any]]:
        media = make_input()
        image, audio = (base64.b64decode(media.pop(name)) for name in ("image", "audio"))
        with AvatarEndpoint(
            site.endpoint.url, site.endpoint.api_key, poll_seconds=0.3, signing_key=SIGNING_KEY
        ) as endpoint:
            request = media | {"request_id": f"order-{number}", "prompt": f"client {number}."}
            jobs = [endpoint.submit(image, audio, **request) for _ in range(NUM_TIMES)]
            return [job.wait(timeout_seconds=JOB_SECONDS).output or {} for job in jobs]

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        answers = list(clients.map(client, range(NUM_CLIENTS)))

    assert len(site.begun("client")) == NUM_CLIENTS
    assert len(set(site.begun("client"))) == 2  # both have made some
    assert sum(map(len, answers)) == NUM_CLIENTS * NUM_TIMES
    for number, own in enumerate(answers):
        assert {answer["key"] for answer in own} == {f"once/requests/order-{number}.mp4"}
        assert len({answer["sha256"] for answer in own}) == 1
        assert sum("reused" not in answer for answer in own) == 1
        assert {answer["request_id"] for answer in own} == {f"order-{number}"}
    assert len({own[0]["sha256"] for own in answers}) > 1
    assert not [key for key in site.objects() if not key.endswith(".mp4")]  # no claim is left


def test_the_same_request_has_one_video_whatever_addresses_its_inputs_have(
    site: Site, make_input: Callable[..., dict[str, Any]]
) -> None:
    media = make_input()
    site.store.client.put_object(
        Bucket=site.store.bucket, Key="portrait", Body=base64.b64decode(media["image"])
    )
    signed = [
        site.store.client.generate_presigned_url(
            "get_object",
            Params={"Bucket": site.store.bucket, "Key": "portrait"},
            ExpiresIn=seconds,
        )
        for seconds in (600, 601)
    ]
    jobs = [
        run(site, media | {"image": image, "request_id": "addresses", "prompt": "addresses"})
        for image in (*signed, media["image"])
    ]
    assert len({same(job) for job in jobs}) == 1
    assert len(site.begun("addresses")) == 1
    urls = {job.output["video_url"] for job in jobs}
    assert all(requests.get(url, timeout=10).ok for url in urls)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "another"},
        {"seed": 8},
        {"resolution": 384},
        {"output": {"thumbnail": True}},
        {"output": {"prefix": "elsewhere"}},
        {"output": {"key": "elsewhere.mp4"}},
        {"audio_start_seconds": 0.01},
    ],
    ids=str,
)
def test_another_request_of_the_same_id_is_refused_by_its_field(
    site: Site, make_input: Callable[..., dict[str, Any]], changes: dict[str, Any]
) -> None:
    first = make_input(request_id="refused", prompt="refused", seed=7)
    made = run(site, first)

    job = run(site, first | changes)

    assert job.status == "FAILED"
    assert job.output["error_info"]["code"] == "INVALID_INPUT"
    assert job.output["error_info"]["field"] == "request_id"
    assert same(run(site, first | {"user_data": 1, "output": {"url_expires_seconds": 60}})) == same(
        made
    )


def test_a_request_whose_key_is_chosen_is_remembered_as_well(
    site: Site, make_input: Callable[..., dict[str, Any]]
) -> None:
    first = make_input(request_id="chosen-key", prompt="chosen", output={"key": "its/own.mp4"})
    assert same(run(site, first)) == same(run(site, first))
    assert len(site.begun("chosen")) == 1
    for output in ({}, {"key": "its/other.mp4"}):
        refused = run(site, first | {"output": output})
        assert refused.output["error_info"]["field"] == "request_id"


def test_a_job_that_is_stopped_gives_its_request_up(
    site: Site, make_input: Callable[..., dict[str, Any]]
) -> None:
    site.hold.touch()
    job_id = site.endpoint.submit({"input": make_input(request_id="stopped", prompt="hold")})
    site.endpoint.wait_until(job_id, lambda job: bool(site.begun("hold")), JOB_SECONDS)
    waiting = site.endpoint.submit({"input": make_input(request_id="stopped", prompt="hold")})
    site.endpoint.cancel(job_id)
    site.hold.unlink()
    assert site.endpoint.wait(waiting, JOB_SECONDS).status == "COMPLETED"
    assert "once/requests/stopped.claim" not in site.objects()


def test_a_webhook_brings_a_signed_result_of_its_own_job(
    site: Site, make_input: Callable[..., dict[str, Any]]
) -> None:
    with ScriptedServer() as receiver:
        job = {"webhook": receiver.on("POST /done", Answer())}
        ids = [
            site.endpoint.submit(job | {"input": make_input(prompt="signed", user_data=n)})
            for n in range(2)
        ]
        for job_id in ids:
            site.endpoint.wait(job_id, JOB_SECONDS)
        wait_until(lambda: len(receiver.asked("POST /done")) == 2)
        bodies = [asked.json for asked in receiver.asked("POST /done")]

    for body, other in (bodies, bodies[::-1]):
        told = JobStatus.parse(body, signing_key=SIGNING_KEY)
        assert told.output == site.endpoint.state(told.id).output
        replayed = body | {"output": other["output"]}
        with pytest.raises(SignatureError):
            JobStatus.parse(replayed, signing_key=SIGNING_KEY)
    assert not any(SIGNING_KEY in worker.log for worker in site.workers)


def test_a_request_that_could_not_be_remembered_is_refused(
    site: Site, make_input: Callable[..., dict[str, Any]]
) -> None:
    refused = run(site, make_input(request_id="inline", output={"delivery": "inline"}))
    assert refused.output["error_info"]["field"] == "request_id"


@pytest.mark.slow
def test_a_worker_that_is_killed_with_the_claim_in_hand_is_followed_by_another_and_no_third(
    site: Site, make_input: Callable[..., dict[str, Any]]
) -> None:
    """The last of the module: it leaves one worker."""
    before = len(site.begun("hold"))
    site.hold.touch()
    job = make_input(request_id="killed", prompt="hold")
    first = site.endpoint.submit({"input": job})
    holder = site.endpoint.wait_until(
        first, lambda job: len(site.begun("hold")) > before, JOB_SECONDS
    )
    second = site.endpoint.submit({"input": job})
    site.endpoint.wait_until(
        second, lambda job: any("Waiting" in one["message"] for one in job.progress), JOB_SECONDS
    )
    [killed] = [worker for worker in site.workers if worker.worker_id == holder.worker_id]

    killed.kill()
    site.hold.unlink()

    made = site.endpoint.wait(second, JOB_SECONDS)
    again = run(site, job)
    assert same(made) == same(again)
    assert len(site.begun("hold")) == before + 2
    assert "once/requests/killed.claim" not in site.objects()
