"""Attention over all tokens, without a mask: which kernel serves, and whether it is right.

The kernels that are installed and run on this GPU are proved and timed at the start, and the
fastest right one serves. diffusers' `set_attention_backend` chooses among PyTorch's; the
transformer's own takes the kernels of this module too. They work on the tensors as they lie, where
diffusers copies them.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from worker.model import flash_attention_4
from worker.model.sparse_attention import LayerSparsity

logger = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # 3 x (B, N, h, D/h) -> (B, N, h, D/h)

LARGEST_ERROR = 1e-2  # relative norm, in bfloat16; kernels that are right come to 3e-3
PROVED_TOKENS = 4243  # that no tile divides
TIMED_TOKENS = 12_289
TIMED_CALLS = 5


def _native(backend: SDPBackend | None) -> Kernel:
    """PyTorch's attention, by one of its kernels or by its own choice."""

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            return scaled_dot_product_attention(query, key, value).transpose(1, 2)

    return attended


KERNELS: dict[str, Kernel] = {
    flash_attention_4.NAME: flash_attention_4.attend,
    "_native_cudnn": _native(SDPBackend.CUDNN_ATTENTION),
    "_native_flash": _native(SDPBackend.FLASH_ATTENTION),
    "_native_efficient": _native(SDPBackend.EFFICIENT_ATTENTION),
    "_native_math": _native(SDPBackend.MATH),
    "native": _native(None),
}
CANDIDATES = (flash_attention_4.NAME, "_native_cudnn", "native")


class Trial(NamedTuple):
    """What a kernel showed on this GPU."""

    error: float  # relative norm, against float32; infinite: it does not run
    seconds: float  # of one call on `TIMED_TOKENS` tokens; infinite where it is not right


def attend(
    query: Tensor,  # (B, N, h, D/h), as are key and value
    key: Tensor,
    value: Tensor,
    processor: Any,
    sparsity: LayerSparsity | None = None,
) -> Tensor:  # (B, N, h, D/h)
    """Softmax attention by the backend that the processor was given.

    With `sparsity`, which takes one sample, within its tolerance of that.
    """
    kernel = _kernel(processor._attention_backend)
    if query.shape[2] == 0:  # there are more ranks than heads
        return query
    return (
        kernel(query, key, value)
        if sparsity is None
        else sparsity.attend(query, key, value, kernel)
    )


def _kernel(backend: str | AttentionBackendName | None) -> Kernel:
    """What attends by that backend; None is diffusers' default."""
    name = backend.value if isinstance(backend, AttentionBackendName) else backend or "native"
    return KERNELS.get(name) or partial(_dispatched, name)


def _dispatched(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """By one of diffusers' backends that is none of ours."""
    attended: Tensor = dispatch_attention_fn(query, key, value, backend=name)
    return attended.to(query.dtype)


def fastest_backend(device: torch.device) -> str:
    """The backend for this GPU: the fastest of those that have shown here that they are right.

    Raises:
        RuntimeError: not even PyTorch's own choice is right.
    """
    trials = {name: try_kernel(KERNELS[name], device) for name in CANDIDATES}
    name = min(trials, key=lambda name: trials[name].seconds)
    if not trials[name].error < LARGEST_ERROR:
        raise RuntimeError(f"no attention kernel is right on this GPU: {trials}")
    fastest = trials.pop(name).seconds
    others = ", ".join(_beside(fastest, other, trial) for other, trial in trials.items())
    logger.info("attention by %s, %.2f ms; %s", name, fastest * 1e3, others)
    return name


def _beside(fastest: float, name: str, trial: Trial) -> str:
    """What a kernel showed beside the fastest one, for the log."""
    if trial.error < LARGEST_ERROR:
        return f"{name} {trial.seconds / fastest:.2f} times as long"
    reason = flash_attention_4.why_not() if name == flash_attention_4.NAME else None
    return f"{name} does not serve ({reason or f'its error is {trial.error:.3g}'})"


def try_kernel(kernel: Kernel, device: torch.device) -> Trial:
    """Proves the kernel on this GPU, and times it if it is right."""
    error = kernel_error(kernel, device)
    if not error < LARGEST_ERROR:
        return Trial(error, float("inf"))
    tensors = torch.randn(3, 1, TIMED_TOKENS, 24, 128, device=device, dtype=torch.bfloat16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    kernel(*tensors)
    start.record()
    for _ in range(TIMED_CALLS):
        kernel(*tensors)
    end.record()
    end.synchronize()
    return Trial(error, start.elapsed_time(end) / 1e3 / TIMED_CALLS)


def kernel_error(kernel: Kernel, device: torch.device) -> float:
    """How far the kernel is from float32."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, PROVED_TOKENS, 24, 128)
    tensors = torch.randn(shape, generator=generator, device=device).bfloat16()
    try:
        found = kernel(*tensors).float()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a package that does not fit this GPU raises
        logger.info("an attention kernel does not run here: %s", error)
        return float("inf")
    query, key, value = (x.float().transpose(1, 2) for x in tensors)
    with sdpa_kernel(SDPBackend.MATH):
        exact = scaled_dot_product_attention(query[:, :, :512], key, value).transpose(1, 2)
    return ((found[:, :512] - exact).norm() / exact.norm()).item()


def backend_error(name: str, device: torch.device) -> float:
    """The same for a backend by its name, as a block would call it."""
    processor = SimpleNamespace(_attention_backend=name)

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, processor)

    return kernel_error(kernel, device)
