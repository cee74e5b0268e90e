"""A short soak: what the long one shows, in half a minute."""

import pytest

from benchmarks.soak import Soak, table
from local_endpoint import job_queue


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_queue, "MAX_CLAIMS", job_queue.MAX_CLAIMS)  # which the soak raises
    soak = Soak(30.0, "drawing", num_workers=2, seed=3)
    soak.run()
    tally = soak.tally
    assert tally.is_well, table(tally)
    assert tally.fates["COMPLETED"] > 0  # a busy machine gets through few
    assert min(tally.kills, tally.vanished) > 0
    assert sum(tally.fates.values()) == sum(tally.sent.values())
