"""The package as it is imported: its names, and what comes with them."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import avatar_client
from avatar_client import contract, webhook_token_matches

ROOT = Path(__file__).parents[2]


def modules_after(statement: str) -> set[str]:
    """What a fresh interpreter has imported after the statement."""
    command = [sys.executable, "-c", f"{statement}\nimport sys; print(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("package", [avatar_client, contract], ids=lambda one: one.__name__)
def test_every_name_of_a_package_is_there_and_no_module_hides_behind_one(
    package: ModuleType,
) -> None:
    assert len(package.__all__) == len(set(package.__all__))
    for name in package.__all__:
        value = getattr(package, name)
        assert not isinstance(value, type(sys)), name
        assert f"{package.__name__}.{name}" not in sys.modules


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    name = "AvatarEndpiont"
    with pytest.raises(AttributeError, match=f"'avatar_client' has no attribute '{name}'"):
        getattr(avatar_client, name)
    with pytest.raises(ImportError):
        exec(f"from avatar_client import {name}")


def test_the_client_imports_nothing_heavy_and_nothing_of_the_worker() -> None:
    modules = modules_after("from avatar_client import *\nimport avatar_client.cli")
    assert "httpx" in modules
    strangers = {"torch", "transformers", "boto3", "botocore", "runpod", "numpy", "PIL", "fastapi"}
    ours = {"worker", "builder", "studio", "local_endpoint", "training", "demo", "handler"}
    assert not (strangers | ours) & modules


def test_the_contract_needs_no_http_client() -> None:
    modules = modules_after("import avatar_client.contract, avatar_client.environment")
    assert "pydantic" in modules
    assert not {"httpx", "tqdm", "avatar_client.endpoint"} & modules


def test_a_token_matches_itself_and_nothing_else() -> None:
    assert webhook_token_matches("geheim-ü", "geheim-ü")
    for given in ("geheim", "geheim-ü ", "", None):
        assert not webhook_token_matches("geheim-ü", given)
    assert not webhook_token_matches("", "")
