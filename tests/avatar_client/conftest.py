"""An endpoint that answers as it is told, the client in both kinds before it, and its wheel."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.avatar_client.client_kinds import KINDS, clients
from tests.support.scripted_server import ScriptedServer

ROOT = Path(__file__).parents[2]
NOT_IN_A_CLONE = (".*", "__pycache__", "*.egg-info", "build", "out", "shared")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture(params=KINDS)
def make_client(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    with clients(request.param) as make:
        yield make


@pytest.fixture
def client(make_client: Callable[..., Any], server: ScriptedServer) -> Any:
    return make_client(f"{server.origin}/v2/local")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this repository, built from a copy of it without the network."""
    copy = tmp_path_factory.mktemp("source") / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_IN_A_CLONE))
    target = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, copy)
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the wheel installs, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def pip(command: str, *arguments: str | Path) -> None:
    """Runs pip of this environment; its output is shown if it fails."""
    words = ["--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
