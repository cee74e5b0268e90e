"""What a load says of itself."""

import dataclasses

import pytest

from worker.loading.report import ComponentLoad, LoadReport

REPORT = LoadReport(
    components=(ComponentLoad("vae", 2_000_000_000, 1.5), ComponentLoad("transformer", 10**9, 3.0)),
    num_bytes=3_000_000_000,
    cached_bytes=1_500_000_000,
    seconds=3.0,
    disk_bytes_per_second=2e9,
)


def test_a_load_is_told_beside_the_disk() -> None:
    assert REPORT.bytes_per_second == 1e9
    assert REPORT.disk_ratio == pytest.approx(0.5)
    assert str(REPORT) == (
        "3.00 GB in 3.0 s, 1.00 GB/s, 0.50 of the disk's 2.00 GB/s, 50% from the page cache; "
        "ready: vae 1.5 s, transformer 3.0 s"
    )


def test_where_the_disk_was_not_measured_nothing_is_said_of_it() -> None:
    report = dataclasses.replace(REPORT, disk_bytes_per_second=None)
    assert report.disk_ratio is None
    assert str(report).startswith("3.00 GB in 3.0 s, 1.00 GB/s, 50% from the page cache; ")
