"""The attention kernels of the image: compiled without a GPU, and never in a build's way."""

import importlib.util
import logging
import subprocess
import sys

import pytest
import torch

from builder import kernels


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
