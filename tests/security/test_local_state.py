"""What the local endpoint keeps on disk: for its user alone, and secrets while they are used."""

import stat
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from local_endpoint import LocalEndpoint, private_files
from local_endpoint.job_queue import JobQueue

MARK = "m4rked-s3cret-of-a-client"
S3 = {"endpointUrl": "https://s3.example.com", "accessId": "id", "accessSecret": MARK}


def others_may_read(directory: Path) -> list[str]:
    """What users beside this one can open, the directory itself or a file in it."""
    return [
        str(path)
        for path in (directory, *directory.rglob("*"))
        if stat.S_IMODE(path.lstat().st_mode) & 0o077 and not path.is_symlink()
    ]


def stored_in(directory: Path, text: str) -> list[str]:
    return [
        path.name
        for path in directory.rglob("*")
        if path.is_file() and text.encode() in path.read_bytes()
    ]


def test_nobody_else_reads_the_state(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    with LocalEndpoint(directory) as endpoint:
        endpoint.submit({"input": {"prompt": "x"}})
        assert others_may_read(directory) == []


def test_a_state_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    with LocalEndpoint(directory):
        pass
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)

    with LocalEndpoint(directory):
        assert others_may_read(directory) == []


def test_a_directory_of_somebody_else_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    tmp_path.chmod(0o755)
    private_files.make_directory(tmp_path, own_files=("api-key",))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


@pytest.mark.parametrize("content", ["", "\n", "  \n"])
def test_an_empty_key_file_lets_nobody_in(tmp_path: Path, content: str) -> None:
    (tmp_path / "api-key").write_text(content)
    with LocalEndpoint(tmp_path) as endpoint:
        assert len(endpoint.api_key) > 20
        for headers in ({}, {"Authorization": ""}, {"Authorization": "Bearer"}):
            assert httpx.get(f"{endpoint.url}/health", headers=headers).status_code == 401
        allowed = {"Authorization": f"Bearer {endpoint.api_key}"}
        assert httpx.get(f"{endpoint.url}/health", headers=allowed).status_code == 200


@pytest.mark.parametrize("ending", ["completed", "cancelled", "deleted", "purged"])
def test_a_clients_bucket_is_forgotten_with_its_job(tmp_path: Path, ending: str) -> None:
    queue = JobQueue(tmp_path / "queue")
    policy = {"ttl": 1} if ending == "deleted" else {}
    job: dict[str, Any] = {"input": {"s3Config": S3}, "s3Config": S3, "policy": policy}
    queue.add(job, job_id="job")
    assert stored_in(tmp_path, MARK)

    if ending == "completed":
        queue.claim("worker")
        queue.post("job", "worker", {"output": {}}, lost=False)
    elif ending == "cancelled":
        queue.cancel("job")
    elif ending == "purged":
        queue.purge()
    else:
        time.sleep(0.01)
    queue.sweep()

    assert stored_in(tmp_path, MARK) == []
    queue.close()


def test_a_job_that_failed_keeps_its_bucket_for_another_try(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "queue")
    queue.add({"input": {}, "s3Config": S3}, job_id="job")
    queue.claim("worker")
    queue.post("job", "worker", {"error": "E: why"}, lost=False)

    assert queue.retry("job")
    again = queue.claim("worker")
    assert again is not None
    assert again["s3Config"] == S3
    queue.close()
