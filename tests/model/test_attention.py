"""Which attention kernel serves: the fastest of those that are installed and right."""

import logging
import math

import pytest
import torch
from torch import Tensor

from worker.model import attention, flash_attention_4
from worker.model.attention import (
    LARGEST_ERROR,
    Trial,
    backend_error,
    fastest_backend,
    kernel_error,
)
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

CPU = torch.device("cpu")
RIGHT, WRONG, MISSING = 2e-3, 0.3, math.inf


def choose(monkeypatch: pytest.MonkeyPatch, **trials: Trial) -> str:
    """The backend where the kernels show this of themselves."""
    monkeypatch.setattr(attention, "KERNELS", {name: name for name in trials})
    monkeypatch.setattr(attention, "CANDIDATES", tuple(trials))
    monkeypatch.setattr(attention, "try_kernel", lambda kernel, device: trials[kernel])
    return fastest_backend(CPU)


@pytest.mark.parametrize(
    ("flash_attn_4", "chosen"),
    [
        (Trial(RIGHT, 0.002), "flash_attn_4"),
        (Trial(RIGHT, 0.004), "_native_cudnn"),
        (Trial(WRONG, math.inf), "_native_cudnn"),
        (Trial(MISSING, math.inf), "_native_cudnn"),
    ],
    ids=["fastest", "slower", "wrong", "missing"],
)
def test_the_fastest_kernel_that_is_right_serves(
    flash_attn_4: Trial,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    cudnn, native = Trial(RIGHT, 0.003), Trial(RIGHT, 0.006)
    trials = {"flash_attn_4": flash_attn_4, "_native_cudnn": cudnn, "native": native}
    assert choose(monkeypatch, **trials) == chosen
    times = native.seconds / trials[chosen].seconds
    assert f"attention by {chosen}" in caplog.text
    assert f"native {times:.2f} times as long" in caplog.text


def test_a_gpu_on_which_no_kernel_is_right_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="no attention kernel is right"):
        choose(monkeypatch, native=Trial(WRONG, math.inf), flash_attn_4=Trial(MISSING, math.inf))


def test_a_kernel_is_proved_against_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PROVED_TOKENS", 300)
    right = attention.KERNELS["native"]

    def without_the_last_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return right(query, key[:, :-40], value[:, :-40])

    def broken(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise OSError("a library is missing")

    assert kernel_error(right, CPU) < LARGEST_ERROR
    assert kernel_error(without_the_last_keys, CPU) > LARGEST_ERROR
    assert kernel_error(broken, CPU) == math.inf


def test_without_the_package_its_kernel_does_not_serve() -> None:
    if flash_attention_4.why_not() is None:
        pytest.skip("flash-attn-4 is installed")
    assert kernel_error(flash_attention_4.attend, CPU) == math.inf


def test_a_transformer_takes_the_packages_name() -> None:
    model = HunyuanVideoAvatarTransformer3DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=1
    )
    model.set_attention_backend(flash_attention_4.NAME)
    blocks = (*model.transformer_blocks, *model.single_transformer_blocks)
    assert {block.attn.processor._attention_backend for block in blocks} == {"flash_attn_4"}
    model.set_attention_backend("_native_math")
    assert {str(block.attn.processor._attention_backend.value) for block in blocks} == {
        "_native_math"
    }


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of the packages that are looked for
def test_the_attention_kernel_of_this_gpu_is_right() -> None:
    device = torch.device("cuda")
    assert backend_error(fastest_backend(device), device) < LARGEST_ERROR
    assert backend_error("_native_flash", device) < LARGEST_ERROR
