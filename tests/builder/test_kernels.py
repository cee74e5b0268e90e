"""The attention kernels of the image: compiled without a GPU, and never in a build's way."""

import ctypes
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from builder import kernels
from worker.model import flash_attention_4

# A start that has the libraries: it is right over all keys and chosen blocks, and has not imported
# the compiler.
START = """
import sys, torch
from worker.model import flash_attention_4
from worker.model.attention import LARGEST_ERROR, kernel_error
from worker.model.sparse_attention import sparse_attention_works
device = torch.device("cuda")
assert flash_attention_4.why_not() is None
assert kernel_error(flash_attention_4.attend, device) < LARGEST_ERROR
assert sparse_attention_works(device)
assert "cutlass" not in sys.modules
"""


def test_an_environment_without_a_gpu_needs_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    kernels.main()
    if torch.version.cuda is None:
        assert "computes on no GPU" in caplog.text


def test_what_cannot_be_compiled_is_said_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    seen = []

    def run(command: list[str], env: dict[str, str], **_: object) -> object:
        seen.append(env["CUTE_DSL_ARCH"])
        failed = env["CUTE_DSL_ARCH"] == "sm_89"
        code = "raise SystemExit('no compiler')" if failed else ""
        return real([sys.executable, "-c", code], capture_output=True, text=True)

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    kernels.main()
    assert tuple(seen) == kernels.ARCHITECTURES
    assert "sm_89: no compiler" in caplog.text
    assert "sm_90a: compiled" in caplog.text


def test_an_architecture_is_a_compute_capability() -> None:
    found = {kernels.capability_of(each) for each in kernels.ARCHITECTURES}
    assert found == {(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)}


@pytest.mark.skipif(shutil.which("ld") is None, reason="there is no linker")
def test_an_object_file_becomes_a_library(tmp_path: Path) -> None:
    (tmp_path / "words").write_bytes(b"spoken")
    compiled, library = tmp_path / "words.o", tmp_path / "a" / "words.so"
    command = ["ld", "-r", "-b", "binary", "-o", str(compiled), "words"]
    subprocess.run(command, cwd=tmp_path, check=True)

    kernels.link(compiled, library)

    held = (ctypes.c_char * 6).in_dll(ctypes.CDLL(str(library)), "_binary_words_start")
    assert held.raw == b"spoken"
    assert [path.name for path in library.parent.iterdir()] == ["words.so"]


def test_without_a_linker_there_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="binutils"):
        kernels.link(tmp_path / "words.o", tmp_path / "words.so")


@pytest.mark.gpu
def test_a_start_that_has_the_libraries_imports_no_compiler(tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    architecture = f"sm_{major}{minor}" + ("a" if major == 9 else "")
    environment = kernels.environment(architecture) | {flash_attention_4.CACHE_DIR: str(tmp_path)}
    code = "from builder.kernels import compile_all; compile_all()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    environment = os.environ | {flash_attention_4.CACHE_DIR: str(tmp_path)}
    subprocess.run([sys.executable, "-c", START], env=environment, check=True)
