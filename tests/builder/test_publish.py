"""A model directory goes into a repository of the operator's, by the hub's own protocol."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripted_server import Answer, ScriptedServer

ROOT = Path(__file__).parents[2]
PUBLISH = """
import logging, sys
from pathlib import Path
from builder.download import BuildError
from builder.publish import publish
logging.basicConfig(level=logging.INFO, format="%(message)s")
try:
    publish(Path(sys.argv[1]), "me/model", "hf_secret")
except BuildError as error:
    print(error)
    sys.exit(error.exit_code)
"""
FILES = {"model_index.json": b"{}", "vae/model.safetensors": b"weights", "manifest.json": b"{1}"}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "model"


@pytest.fixture
def hub() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in FILES]
        server.on("POST /api/repos/create", {"url": f"{server.origin}/me/model"})
        server.on("POST /api/models/me/model/preupload/main", {"files": modes})
        done = {"success": True, "commitOid": "1" * 40, "commitUrl": f"{server.origin}/me/model"}
        server.on("POST /api/models/me/model/commit/main", done)
        server.on("GET /api/models/me/model", {"id": "me/model", "sha": "1" * 40})
        yield server


def run(hub: ScriptedServer, model_dir: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "HF_ENDPOINT": hub.origin,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HOME": str(model_dir.parent),
    }
    return subprocess.run(
        [sys.executable, "-c", PUBLISH, str(model_dir)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def committed(hub: ScriptedServer) -> list[dict[str, bytes]]:
    """The files of each commit."""
    commits = []
    for asked in hub.asked("POST /api/models/me/model/commit/main"):
        lines: list[dict[str, Any]] = [json.loads(line) for line in asked.body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
    return commits


def test_the_repository_is_private_and_the_manifest_comes_last(
    hub: ScriptedServer, model_dir: Path
) -> None:
    done = run(hub, model_dir)

    assert done.returncode == 0, done.stdout + done.stderr
    [created] = hub.asked("POST /api/repos/create")
    assert created.json["visibility"] == "private"
    assert created.headers["authorization"] == "Bearer hf_secret"
    weights, manifest = committed(hub)
    assert weights | manifest == FILES
    assert list(manifest) == ["manifest.json"]
    assert "MODEL_REPOSITORY=me/model" in done.stderr


@pytest.mark.parametrize(("status", "exit_code"), [(401, 3), (403, 3), (400, 1)])
def test_a_hub_that_refuses_is_named_and_no_token_is_told(
    hub: ScriptedServer, model_dir: Path, status: int, exit_code: int
) -> None:
    hub.on("POST /api/models/me/model/preupload/main", Answer(status=status, body={"error": "no"}))

    failed = run(hub, model_dir)

    assert failed.returncode == exit_code, failed.stdout + failed.stderr
    assert "me/model" in failed.stdout
    assert "hf_secret" not in failed.stdout + failed.stderr
    assert committed(hub) == []
