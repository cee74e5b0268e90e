"""What keeps a worker from taking jobs."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from avatar_client.contract.job_errors import UploadError
from tests.conftest import BucketServer
from worker.service import fitness
from worker.service.worker import Worker
from worker.settings import Settings


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_worker_starts_only_if_the_platforms_variable_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [gpu] = [check for check in fitness.checks(Worker(Settings())) if check.__name__ == "gpu"]
    with pytest.raises(RuntimeError, match="no CUDA device is visible"):
        gpu()
    monkeypatch.setenv("RUNPOD_SKIP_GPU_CHECK", "true")
    gpu()


@pytest.mark.parametrize(
    ("settings", "needed_gib"),
    [(Settings(), 2.0), (Settings(max_input_bytes=4 * 2**30), 8.6)],
)
def test_a_worker_starts_only_with_room_for_the_largest_job_that_it_allows(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, needed_gib: float
) -> None:
    [disk] = [check for check in fitness.checks(Worker(settings)) if check.__name__ == "disk"]
    free_gib = needed_gib + 0.1
    monkeypatch.setattr(psutil, "disk_usage", lambda _: SimpleNamespace(free=int(free_gib * 2**30)))
    disk()
    free_gib = needed_gib - 0.1
    with pytest.raises(RuntimeError, match="of disk are free, and the largest job"):
        disk()


def run(name: str, settings: Settings) -> None:
    [check] = [check for check in fitness.checks(Worker(settings)) if check.__name__ == name]
    check()


def test_a_misspelt_variable_of_the_bucket_keeps_the_worker_from_starting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAX_AUDIO_SECOND", "5")
    run("variables", Settings())
    assert "did you mean MAX_AUDIO_SECONDS?" in caplog.text
    monkeypatch.setenv("BUCKET_ENDPOINT", "https://s3.example.com")
    with pytest.raises(RuntimeError, match=r"BUCKET_ENDPOINT is not read.*BUCKET_ENDPOINT_URL"):
        run("variables", Settings())


def test_a_certificate_without_its_key_keeps_the_worker_from_starting() -> None:
    with pytest.raises(RuntimeError, match="C2PA_PRIVATE_KEY is missing"):
        run("provenance", Settings(c2pa_certificate="x"))


def test_half_a_bucket_keeps_the_worker_from_starting_and_names_the_rest() -> None:
    with pytest.raises(RuntimeError, match="BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY"):
        run("storage", Settings(bucket_endpoint_url="https://s3.example.com"))


def test_a_proxy_of_a_kind_that_is_not_spoken_to_keeps_the_worker_from_starting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://user:hush-hush@proxy.example.com:1080")
    with pytest.raises(ValueError, match="HTTPS_PROXY") as caught:
        run("variables", Settings())
    assert "hush-hush" not in str(caught.value)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.com:3128")
    run("variables", Settings())


def test_a_bucket_that_takes_nothing_keeps_the_worker_from_starting(
    object_store: BucketServer,
) -> None:
    bucket = {
        f"bucket_{name}": value
        for name, value in dict(object_store.settings).items()
        if name in ("endpoint_url", "access_key_id", "secret_access_key")
    }
    with pytest.raises(UploadError, match="NoSuchBucket"):
        run("storage", Settings(**bucket, bucket_name="not-there", store_retry_seconds=0))
    run("storage", Settings(**bucket, bucket_name=object_store.bucket))
