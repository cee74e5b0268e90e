"""The shape of the code: which part may import which, and what must stay light.

The contracts themselves are import-linter's, in pyproject.toml.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "root_packages"
]
TORCH_FREE = [
    "avatar_client.contract.request",
    "worker.shapes",
    "worker.loading.model_directory",
    "worker.media.inputs",
    "worker.media.storage",
    "worker.media.video",
    "worker.service.delivery",
    "worker.service.progress",
    "worker.service.worker",
]
# What must not be imported where: each breaks one contract or more.
WRONG_IMPORTS = [
    ("worker/loading/layout.py", "worker.generation.pipeline"),
    ("worker/model/attention.py", "worker.settings"),
    ("worker/loading/loader.py", "worker.multi_gpu.controller"),
    ("worker/generation/sampling.py", "worker.media.video"),
    ("worker/media/video.py", "worker.service.delivery"),
    ("worker/service/worker.py", "worker.doctor"),
    ("worker/service/delivery.py", "boto3"),
    ("worker/service/progress.py", "avatar_client.endpoint"),
    ("worker/multi_gpu/controller.py", "runpod"),
    ("worker/shapes.py", "worker.logs"),
    ("worker/doctor.py", "handler"),
    ("worker/logs.py", "httpx"),
    ("avatar_client/protocol.py", "worker.settings"),
    ("avatar_client/download.py", "torch"),
    ("local_endpoint/fleet.py", "worker.service.worker"),
    ("studio/page.py", "local_endpoint"),
    ("training/world.py", "builder.convert"),
]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """import-linter's run on the tree at `root`."""
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "1000"},
        capture_output=True,
        text=True,
    )


def test_import_linter_finds_every_wrong_import(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        for source in (ROOT / package).rglob("*.py"):
            copy = tmp_path / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    as_it_is = lint_imports(tmp_path)
    assert as_it_is.returncode == 0, as_it_is.stdout

    for path, name in WRONG_IMPORTS:
        with (tmp_path / path).open("a") as file:
            file.write(f"\nimport {name}\n")
    found = lint_imports(tmp_path)

    assert found.returncode == 1
    for path, name in WRONG_IMPORTS:
        importer = path.removesuffix(".py").replace("/", ".")
        assert re.search(rf"^- +{importer} -> {name} \(l", found.stdout, re.MULTILINE), importer


def _is_foreign(name: str, own: str) -> bool:
    """Whether a name, with its module before it, is a private one of another package than `own`."""
    module, _, last = name.rpartition(".")
    package = module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]
    is_private = last.startswith("_") and not last.startswith("__")
    return is_private and package != own and name.split(".")[0] in PACKAGES


def _private_names(source: str, own: str) -> set[str]:
    """Private names of other packages of ours that a module of `own` imports or reads."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    read = {
        f"{imported[node.value.id]}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in imported
        and (ROOT / f"{imported[node.value.id].replace('.', '/')}.py").exists()
    }
    return {name for name in read | set(imported.values()) if _is_foreign(name, own)}


def test_a_private_name_of_another_package_is_found_and_one_of_its_own_is_not() -> None:
    source = """
from torch import _C
from worker import import_guard
from worker.generation.engine import Engine, _load
import_guard._examine(_load, Engine._private, import_guard.__name__)
"""
    assert _private_names(source, "worker.service") == {
        "worker.generation.engine._load",
        "worker.import_guard._examine",
    }
    assert _private_names(source, "worker.generation") == {"worker.import_guard._examine"}


@pytest.mark.parametrize("folder", [*PACKAGES, "tests"])
def test_no_module_takes_a_private_name_of_another_package(folder: str) -> None:
    taken = {
        str(path.relative_to(ROOT)): _private_names(
            path.read_text(), ".".join(path.relative_to(ROOT).parts[:-1])
        )
        for path in (ROOT / folder).rglob("*.py")
    }
    assert not {path: names for path, names in taken.items() if names}


def test_only_what_places_the_model_or_brings_kernels_speaks_to_a_gpu() -> None:
    speaking = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "worker").rglob("*.py")
        if "torch.cuda." in path.read_text()
    }
    assert speaking <= {
        "worker/doctor.py",
        "worker/generation/engine.py",
        "worker/generation/pipeline_loading.py",
        "worker/loading/host_memory.py",
        "worker/loading/offload.py",
        "worker/loading/transfer.py",
        "worker/model/attention.py",
        "worker/model/flash_attention_4.py",
        "worker/model/kernels.py",
        "worker/model/peer_memory.py",
        "worker/model/sparse_attention.py",
    }


def _imported_by(code: str) -> set[str]:
    """What a fresh interpreter that runs the code has imported."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_handler_and_a_refused_job_need_neither_torch_nor_the_sdk() -> None:
    code = """
import asyncio, handler
answer = asyncio.run(handler.handler({"id": "a", "input": {"image": "x"}}))
assert answer["error"].startswith("INVALID_INPUT: "), answer
"""
    assert not {"torch", "transformers", "diffusers", "runpod"} & _imported_by(code)


@pytest.mark.parametrize("name", TORCH_FREE)
def test_a_module_of_the_jobs_edge_imports_without_torch(name: str) -> None:
    assert "torch" not in _imported_by(f"import {name}")
