"""What `pip install .` brings into an empty environment: the client alone."""

import email
import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import avatar_client

MAX_WHEEL_BYTES = 200_000
DEPENDENCIES = ["httpx", "pydantic", "tqdm"]


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the client's dependencies, and theirs, and no other package."""
    directory = tmp_path_factory.mktemp("dependencies")
    wanted, seen = list(DEPENDENCIES), set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            if not (directory / top).exists():
                (directory / top).symlink_to(str(distribution.locate_file(top)))
        requirements = map(Requirement, distribution.requires or [])
        wanted += [
            one.name
            for one in requirements
            if one.marker is None or one.marker.evaluate({"extra": ""})
        ]
    return directory


@pytest.fixture
def run(installed: Path, dependencies: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a script where the client, its dependencies and `tmp_path` are all there is."""

    def run(script: str) -> str:
        path = [str(each) for each in (tmp_path, installed, dependencies)]
        command = [sys.executable, "-I", "-S", "-c", f"import sys\nsys.path[:0] = {path}\n{script}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_the_client_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    version = avatar_client.__version__
    assert tops == {"avatar_client", f"avatar_client-{version}.dist-info"}
    source = Path(avatar_client.__file__).parent
    ours = {path.relative_to(source.parent).as_posix() for path in source.rglob("*.py")}
    assert {name for name in names if name.startswith("avatar_client/")} == ours | {
        "avatar_client/py.typed"
    }


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_the_metadata_names_three_dependencies_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata_name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(metadata_name))
        commands = archive.read(metadata_name.replace("METADATA", "entry_points.txt")).decode()
    assert (metadata["Name"], metadata["Version"]) == ("avatar-client", avatar_client.__version__)
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    assert sorted(one.name for one in needed if one.marker is None) == DEPENDENCIES
    assert commands.split() == ["[console_scripts]", "avatar", "=", "avatar_client.cli:main"]


def test_the_command_runs_where_nothing_else_is_installed(run: Callable[..., str]) -> None:
    script = "from avatar_client.cli import main\nmain(['generate', '--help'])"
    assert run(script).startswith("usage: avatar generate ")


IMPORTED = """
before = list(sys.meta_path)
from avatar_client import *
import avatar_client.cli, avatar_client.upload
assert sys.meta_path == before
print(*sys.modules)
"""
STRANGERS = {"torch", "torchvision", "transformers", "worker", "builder", "studio", "boto3"}


def test_an_import_arms_no_hook_and_brings_no_stranger(run: Callable[..., str]) -> None:
    modules = set(run(IMPORTED).split())
    assert "httpx" in modules
    assert not modules & STRANGERS


def test_a_broken_torchvision_beside_it_is_none_of_its_business(
    run: Callable[..., str], tmp_path: Path
) -> None:
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    for name, code in {"torchvision": broken, "transformers": "", "worker": "x = 1"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    modules = set(run("import transformers\n" + IMPORTED).split())
    assert "torchvision" not in modules
    # a module of the user's own that has the name of one of ours
    assert run("import avatar_client, worker\nprint(worker.x)") == "1\n"
