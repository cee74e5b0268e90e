"""The shape of the code: which module may import which, and what must stay light."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "worker"

# What each module of worker/ may import of worker/; the lower ones stand first. The import guard
# and the version in worker/__init__.py are below everything.
VALUES = {"errors", "settings", "schema", "shapes"}
MAY_IMPORT: dict[str, set[str]] = {
    "import_guard": set(),
    "errors": set(),
    "settings": set(),
    "shapes": set(),
    "logs": set(),
    "schema": {"errors", "settings", "shapes"},
    "estimate": {"shapes"},
    "progress": set(),
    "ahead": set(),
    "manifest": set(),
    "weights": {"manifest", "settings"},
    "network": {"errors"},
    "inputs": {"network", "shapes"} | VALUES,
    "video": {"errors"},
    "storage": {"network"} | VALUES,
    "delivery": {"storage", "video"} | VALUES,
    "model": {"shapes"},
    "audio": {"shapes"},
    "image": {"shapes"},
    "text": {"shapes"},
    "face": {"shapes"},
    "sampling": {"shapes", "model"},
    "placement": {"shapes"},
    "parallel": set(),
    "team": {"parallel", "logs"} | VALUES,
    "pipeline": {"audio", "image", "text", "face", "sampling", "model", "placement", "parallel"}
    | {"shapes"},
    "demo": set(),
    "disk": set(),
    "loading": {"pipeline", "placement", "model", "face", "weights", "disk"},
    "engine": {"pipeline", "demo", "weights", "loading", "placement", "model", "ahead"}
    | {"sampling", "parallel", "team"}
    | VALUES,
    "follower": {"engine", "parallel", "team", "logs"} | VALUES,
    "jobs": {"engine", "inputs", "video", "delivery", "progress", "estimate", "logs"}
    | {"import_guard"}
    | VALUES,
    "fitness": {"jobs", "engine", "storage", "video", "import_guard"} | VALUES,
    "serve": {"jobs", "fitness", "progress", "logs"},
    "doctor": {"import_guard", "model", "pipeline", "engine", "weights", "video", "storage", "disk"}
    | VALUES,
    "client": {"storage", "logs", "errors", "settings", "schema"},
    "local": {"settings"},
    "__main__": {"doctor"},
    "__init__": {"import_guard"},
}
NETWORK_LIBRARIES = {"requests", "httpx", "aiohttp", "urllib.request", "http.client", "socket"}
TORCH_FREE = ["schema", "shapes", "weights", "inputs", "video", "storage", "delivery", "jobs"]
TORCH_FREE += ["progress"]


def _imports(path: Path) -> set[str]:
    """Every module that the file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _layer(path: Path) -> str:
    return path.relative_to(WORKER).parts[0].removesuffix(".py")


SOURCES = sorted(WORKER.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(WORKER)))
def test_a_module_imports_only_what_lies_below_it(path: Path):
    layer = _layer(path)
    used = {name.split(".")[1] for name in _imports(path) if name.startswith("worker.")}
    known = {_layer(source) for source in SOURCES}
    assert (used & known) - {layer} <= MAY_IMPORT[layer]


def test_nothing_imports_the_handler_or_the_builder():
    for path in SOURCES:
        assert not {name.split(".")[0] for name in _imports(path)} & {"handler", "builder"}, path


def test_only_the_network_module_fetches_and_only_the_storage_module_uploads():
    for path in SOURCES:
        if _layer(path) in ("network", "client", "local"):
            continue
        assert not _imports(path) & NETWORK_LIBRARIES, path
        assert "boto3" not in _imports(path) or _layer(path) == "storage", path


def test_only_what_places_the_model_or_brings_kernels_speaks_to_a_gpu():
    speaking = {
        "engine.py",
        "loading.py",
        "placement.py",
        "doctor.py",
        "kernels.py",
        "attention.py",
    }
    for path in SOURCES:
        if path.name not in speaking:
            assert "torch.cuda." not in path.read_text(), path


def test_the_process_of_a_further_gpu_knows_nothing_of_the_platform():
    reached, new = set(), {"follower"}
    while new:
        reached |= new
        new = set().union(*(MAY_IMPORT[layer] for layer in new)) - reached
    users = {_layer(path) for path in SOURCES if "runpod" in _imports(path)}
    assert users
    assert not reached & users


def _seconds_and_modules(code: str) -> tuple[float, set[str]]:
    """Wall time of a fresh interpreter that runs the code, and what it has imported."""
    begun = time.perf_counter()
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return time.perf_counter() - begun, set(done.stdout.split())


def test_the_handler_and_a_refused_job_need_neither_torch_nor_the_sdk():
    code = """
import asyncio, handler
answer = asyncio.run(handler.handler({"id": "a", "input": {"image": "x"}}))
assert answer["error"].startswith("INVALID_INPUT: "), answer
"""
    _, modules = _seconds_and_modules(code)
    assert not {"torch", "transformers", "diffusers", "runpod"} & modules


@pytest.mark.parametrize("name", TORCH_FREE)
def test_a_module_of_the_jobs_edge_imports_without_torch(name: str):
    _, modules = _seconds_and_modules(f"import worker.{name}")
    assert "torch" not in modules
