"""Where states lie: in a directory, and in a bucket, whose store may stumble."""

from pathlib import Path

import pytest

from avatar_client.contract.job_errors import UploadError
from tests.conftest import BucketServer
from tests.support.store_proxy import Proxy, bucket_at
from worker.media.state_store import SUFFIX, BucketStore, DirectoryStore, StateStore

NAME = "0a1b"
SLOW_DOWN = (503, "SlowDown")


@pytest.mark.parametrize("place", ["directory", "bucket"])
def test_a_store_gives_back_what_it_got_and_forgets_what_is_old(
    place: str, tmp_path: Path, object_store: BucketServer
) -> None:
    store: StateStore = DirectoryStore(tmp_path / "new" / "states")
    if place == "bucket":
        store = BucketStore(object_store.settings.model_copy(update={"prefix": "resume"}))

    def get() -> bytes | None:
        return store.get(NAME, 100, lambda: None)

    assert get() is None
    assert store.sweep(0.0) == 0
    store.put(NAME, lambda path: path.write_bytes(b"first"), 5)
    store.put(NAME, lambda path: path.write_bytes(b"second"), 6)
    assert get() == b"second"
    with pytest.raises((OSError, UploadError)):
        store.get(NAME, 5, lambda: None)
    assert store.sweep(3600.0) == 0
    assert store.sweep(-10.0) == 1  # the store's clock counts in seconds
    assert get() is None
    store.delete(NAME)


def test_a_state_for_the_bucket_leaves_the_job_its_disk(object_store: BucketServer) -> None:
    store = BucketStore(object_store.settings)
    with pytest.raises(OSError, match="the job itself needs"):
        store.put(NAME, lambda path: path.write_bytes(b""), num_bytes=2**60)


def test_parts_of_killed_workers_go_by_their_age(tmp_path: Path) -> None:
    part = tmp_path / f"{NAME}{SUFFIX}.0a1b.part"
    part.write_bytes(b"half of a state")
    (tmp_path / "another's file").touch()
    assert DirectoryStore(tmp_path).sweep(-1.0) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["another's file"]


@pytest.mark.usefixtures("hasty")
def test_states_go_though_the_store_stumbles(proxy: Proxy, object_store: BucketServer) -> None:
    store = BucketStore(bucket_at(proxy.url, name=object_store.bucket, prefix="stumbling"))

    def put() -> None:
        store.put(NAME, lambda path: path.write_bytes(b"state"), 5)

    put()
    proxy.failures = [SLOW_DOWN] * 2
    store.delete(NAME)
    assert store.get(NAME, 100, lambda: None) is None

    put()
    proxy.failures = [0, *[SLOW_DOWN] * 2]  # the list is there
    assert store.sweep(-10.0) == 1  # the store's clock counts in seconds
    assert store.get(NAME, 100, lambda: None) is None


def test_a_state_that_is_too_large_is_asked_for_once(
    proxy: Proxy, object_store: BucketServer
) -> None:
    store = BucketStore(bucket_at(proxy.url, name=object_store.bucket, prefix="large"))
    store.put(NAME, lambda path: path.write_bytes(b"state"), 5)
    proxy.seen.clear()
    with pytest.raises(UploadError, match="more than 4 bytes"):
        store.get(NAME, 4, lambda: None)
    assert len(proxy.seen) == 1
