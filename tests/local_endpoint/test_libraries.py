"""RunPod's own client libraries, unchanged, against the local endpoint: each of their methods."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from local_endpoint import LocalEndpoint, WorkerProcess

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def yielding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEndpoint]:
    """An endpoint whose worker yields the parts of its results."""
    directory = tmp_path_factory.mktemp("yielding") / "w"
    with (
        LocalEndpoint() as endpoint,
        WorkerProcess(endpoint, directory, script=HERE / "yielding_handler.py") as worker,
    ):
        worker.wait_until_polling(timeout_seconds=60)
        yield endpoint


@pytest.mark.packages
def test_every_method_of_the_javascript_library(yielding: LocalEndpoint, javascript: Path) -> None:
    base_url = f"{yielding.origin}/v2"
    done = subprocess.run(
        ["node", "client.mjs", base_url, yielding.api_key, yielding.endpoint_id],
        cwd=javascript,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])

    assert seen["health"]["workers"]["idle"] == 1
    assert (seen["runSync"]["status"], seen["runSync"]["succeeded"]) == ("COMPLETED", True)
    assert [part["part"] for part in seen["runSync"]["output"]] == [0, 1, 2]
    assert (seen["tooLong"]["started"], seen["tooLong"]["completed"]) == (True, False)
    assert seen["run"]["status"] == "IN_QUEUE"
    assert seen["status"]["id"] == seen["run"]["id"]
    assert seen["streamed"] == [0, 1, 2]
    assert seen["statusSync"]["succeeded"]
    assert seen["large"] == [0, 1, 2, 3, 4]  # more than one answer holds
    assert seen["cancel"]["status"] == seen["cancelled"]["status"] == "CANCELLED"
    assert seen["purgeQueue"] == {"removed": 0, "status": "completed"}


@pytest.mark.parametrize("way", ["stream", "async-stream"])
def test_the_python_library_streams_until_the_last_part(yielding: LocalEndpoint, way: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, HERE.parent / "support" / "runpod_client.py", way),
            *(yielding.api_key, yielding.endpoint_id),
        ],
        input=json.dumps({"input": {"parts": 5, "size": 600_000}}),
        env={"PATH": "", "RUNPOD_ENDPOINT_BASE_URL": f"{yielding.origin}/v2"},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, 1, 2, 3, 4]
