"""Who makes a request that several workers have been given: one of them, against a real store."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from avatar_client.contract.job_errors import InvalidInputError, UploadError
from tests.conftest import BucketServer
from tests.support.store_proxy import Proxy, bucket_at
from tests.support.waiting import wait_until
from worker.media import claim as claims
from worker.media import store_proof
from worker.media.claim import Claim
from worker.media.store_client import NO_PATIENCE, Patience, StoreClient

PATIENCE = Patience(20.0)
SOON = 30.0  # far more than anything here takes


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims that are renewed often and lost soon."""
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(claims, "LEASE_SECONDS", 1.0)


@pytest.fixture
def make_claim(object_store: BucketServer, quick: None) -> Iterator[Callable[..., Claim]]:
    """A worker's claim; all are given up in the end."""
    made: list[Claim] = []

    def make(
        key: str, fingerprint: str = "f", url: str = object_store.endpoint_url, **options: Any
    ) -> Claim:
        client = StoreClient(bucket_at(url, name=object_store.bucket))
        made.append(Claim(client, f"claims/{key}", fingerprint, **options))
        return made[-1]

    yield make
    for claim in made:
        claim.release()


def etag(store: BucketServer, key: str) -> str:
    return str(store.client.head_object(Bucket=store.bucket, Key=f"claims/{key}")["ETag"])


def exists(store: BucketServer, key: str) -> bool:
    return f"claims/{key}" in set(store.keys())


def die(claim: Claim) -> None:
    """As where the process is killed: nothing is renewed and nothing is given up."""
    vars(claim)["_give_up"] = lambda: None
    claim.release()


def test_of_many_workers_at_once_one_has_the_claim(make_claim: Callable[..., Claim]) -> None:
    workers = [make_claim("many") for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda worker: worker.take(PATIENCE), workers))
    assert taken.count(True) == 1


def test_a_claim_is_nobody_elses_as_long_as_its_worker_lives_and_gone_afterwards(
    make_claim: Callable[..., Claim], object_store: BucketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "LEASE_SECONDS", 6.0)  # a busy machine may renew it late
    holder, other = make_claim("alive"), make_claim("alive")
    assert holder.take(PATIENCE)
    first = etag(object_store, "alive")
    end = time.monotonic() + 1.2 * claims.LEASE_SECONDS
    while time.monotonic() < end:
        assert not other.take(PATIENCE)
        time.sleep(0.1)
    assert etag(object_store, "alive") != first

    holder.release()

    assert not exists(object_store, "alive")
    assert other.take(PATIENCE)


def test_a_dead_workers_claim_is_taken_by_one_worker_once_its_lease_is_over(
    make_claim: Callable[..., Claim],
) -> None:
    dead = make_claim("dead")
    assert dead.take(PATIENCE)
    die(dead)
    workers = [make_claim("dead") for _ in range(3)]
    begun = time.monotonic()

    taken: list[Claim] = []
    while not taken:
        taken = [worker for worker in workers if worker.take(PATIENCE)]
        assert time.monotonic() < begun + SOON

    assert time.monotonic() - begun > claims.LEASE_SECONDS
    [holder] = taken
    assert not any(worker.take(PATIENCE) for worker in workers if worker is not holder)


def test_a_worker_that_was_away_for_too_long_learns_that_another_makes_the_request(
    make_claim: Callable[..., Claim], object_store: BucketServer
) -> None:
    away = make_claim("away")
    assert away.take(PATIENCE)
    away.require_held()
    other = make_claim("away")
    vars(other)["_is_abandoned"] = lambda *_: True  # as one that has seen nothing for long
    wait_until(lambda: other.take(PATIENCE))

    wait_until(lambda: away.is_lost)

    with pytest.raises(UploadError, match="another worker makes this request") as caught:
        away.require_held()
    assert (caught.value.field, caught.value.retryable) == ("request_id", True)
    away.release()
    assert exists(object_store, "away")  # the other's


def test_a_claim_that_somebody_has_removed_is_written_again(
    make_claim: Callable[..., Claim], object_store: BucketServer
) -> None:
    holder = make_claim("removed")
    assert holder.take(PATIENCE)
    object_store.client.delete_object(Bucket=object_store.bucket, Key="claims/removed")
    wait_until(lambda: exists(object_store, "removed"))
    assert not holder.is_lost


def test_another_request_of_the_same_id_is_refused_by_its_field(
    make_claim: Callable[..., Claim],
) -> None:
    assert make_claim("other", "f").take(PATIENCE)
    with pytest.raises(InvalidInputError, match="another request has this id") as caught:
        make_claim("other", "g").take(PATIENCE)
    assert caught.value.field == "request_id"


def test_a_claim_that_is_kept_remembers_its_request_and_is_free(
    make_claim: Callable[..., Claim], object_store: BucketServer
) -> None:
    holder = make_claim("kept", is_kept=True)
    assert holder.take(PATIENCE)
    holder.is_done = True
    holder.release()

    with pytest.raises(InvalidInputError):
        make_claim("kept", "g").take(PATIENCE)
    assert make_claim("kept").take(PATIENCE)  # at once: its video is gone, or it would not be asked


def test_a_claim_whose_object_is_none_of_ours_is_taken_after_a_lease(
    make_claim: Callable[..., Claim], object_store: BucketServer
) -> None:
    object_store.client.put_object(Bucket=object_store.bucket, Key="claims/foreign", Body=b"x")
    claim = make_claim("foreign")
    assert not claim.take(PATIENCE)
    wait_until(lambda: claim.take(PATIENCE))


def test_a_claim_that_is_given_up_while_it_is_taken_does_not_stay(
    make_claim: Callable[..., Claim], object_store: BucketServer
) -> None:
    claim = make_claim("late")
    claim.release()  # the job was stopped, and its thread has left the call behind
    claim.take(PATIENCE)
    wait_until(lambda: not exists(object_store, "late"))


@pytest.mark.parametrize("status", [500, 503])
def test_a_store_that_stumbles_costs_no_claim(
    make_claim: Callable[..., Claim], proxy: Proxy, status: int
) -> None:
    proxy.failures = [(status, "SlowDown")] * 2
    claim = make_claim(f"stumbles-{status}", url=proxy.url)
    assert claim.take(PATIENCE)
    seen = len(proxy.seen)
    proxy.failures = [(status, "SlowDown")] * 3
    wait_until(lambda: len(proxy.seen) > seen + 6)
    claim.require_held()
    claim.release()  # while the store is still there


# What a store can do


@pytest.fixture
def unknown_stores() -> Iterator[None]:
    store_proof.conditional_stores.clear()
    yield
    store_proof.conditional_stores.clear()


def test_a_store_with_conditional_writes_is_recognised_once_and_nothing_is_left(
    proxy: Proxy, object_store: BucketServer, unknown_stores: None
) -> None:
    client = StoreClient(bucket_at(proxy.url, name="avatars"))
    before = object_store.keys()
    assert store_proof.honours_conditions(client, "requests/1.claim", NO_PATIENCE)
    assert object_store.keys() == before
    seen = len(proxy.seen)
    assert store_proof.honours_conditions(client, "requests/2.claim", NO_PATIENCE)
    assert len(proxy.seen) == seen


def test_a_store_that_writes_whatever_is_there_is_recognised(
    proxy: Proxy, unknown_stores: None, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.left_out = ("if-none-match", "if-match")
    client = StoreClient(bucket_at(proxy.url, name="avatars"))
    assert not store_proof.honours_conditions(client, "requests/1.claim", NO_PATIENCE)
    assert "no conditional writes" in caplog.text


def test_a_store_that_knows_one_condition_alone_is_recognised(
    proxy: Proxy, unknown_stores: None
) -> None:
    proxy.left_out = ("if-match",)
    client = StoreClient(bucket_at(proxy.url, name="avatars"))
    assert not store_proof.honours_conditions(client, "requests/1.claim", NO_PATIENCE)


def test_a_store_that_refuses_the_condition_is_recognised(
    proxy: Proxy, unknown_stores: None
) -> None:
    client = StoreClient(bucket_at(proxy.url, name="avatars"))
    proxy.failures = [(404, "NoSuchBucketConfiguration"), (501, "NotImplemented")]
    assert not store_proof.honours_conditions(client, "requests/1.claim", NO_PATIENCE)


def test_a_store_that_does_not_answer_is_not_judged(proxy: Proxy, unknown_stores: None) -> None:
    client = StoreClient(bucket_at(proxy.url, name="avatars"))
    proxy.failures = [(503, "SlowDown")] * 2
    with pytest.raises(UploadError):
        store_proof.honours_conditions(client, "requests/1.claim", NO_PATIENCE)
    assert not store_proof.conditional_stores


def test_a_store_that_stumbles_at_the_end_keeps_no_claim(
    make_claim: Callable[..., Claim],
    proxy: Proxy,
    object_store: BucketServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(claims, "RENEW_SECONDS", SOON)  # so that the failures meet the end alone
    claim = make_claim("last", url=proxy.url)
    assert claim.take(PATIENCE)
    claim.is_done = True
    proxy.failures = [(503, "SlowDown")] * 2
    claim.release()
    assert not exists(object_store, "last")
