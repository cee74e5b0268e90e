"""States in a bucket: stores that stumble, and what is too large."""

import pytest

from avatar_client.contract.job_errors import UploadError
from tests.conftest import BucketServer
from tests.support.store_proxy import Proxy, bucket_at
from worker.media.state_store import BucketStore

NAME = "0a1b"
SLOW_DOWN = (503, "SlowDown")


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
