"""Attention over all tokens, without a mask: which kernel serves, and whether it is right.

diffusers' `set_attention_backend` chooses; what it calls native runs here, on the tensors as they
lie, where diffusers copies them.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
# By the GPU's compute capability. Measured on 9.0 (docs/performance.md); elsewhere PyTorch chooses.
BY_CAPABILITY = {9: "_native_cudnn"}
LARGEST_ERROR = 1e-2  # relative norm, in bfloat16; kernels that are right come to 3e-3


def attend(
    query: Tensor,  # (B, N, h, D/h), as are key and value
    key: Tensor,
    value: Tensor,
    processor: Any,
) -> Tensor:  # (B, N, D)
    """Softmax attention, by the backend and over the ranks that the processor was given."""
    backend, parallel = processor._attention_backend, processor._parallel_config
    name = AttentionBackendName(backend).value if backend else "native"
    if parallel is not None or name not in ("native", *KERNELS):
        attended = dispatch_attention_fn(
            query, key, value, backend=backend, parallel_config=parallel
        )
        return attended.to(query.dtype).flatten(2)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel(KERNELS[name]) if name in KERNELS else nullcontext():
        attended = scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).flatten(2)


def fastest_backend(device: torch.device) -> str:
    """The backend for this GPU, which has shown that it is right.

    Raises:
        RuntimeError: neither that of the table nor PyTorch's own choice is right.
    """
    major, _ = torch.cuda.get_device_capability(device)
    names = dict.fromkeys([BY_CAPABILITY.get(major, "native"), "native"])
    errors = {}
    for name in names:
        errors[name] = backend_error(name, device)
        if errors[name] < LARGEST_ERROR:
            return name
    raise RuntimeError(f"no attention kernel is right on this GPU: {errors}")


def backend_error(name: str, device: torch.device) -> float:
    """How far the kernel is from float32, for a length that no tile divides."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, 4243, 24, 128)
    tensors = torch.randn(shape, generator=generator, device=device).bfloat16()
    try:
        processor = SimpleNamespace(_attention_backend=name, _parallel_config=None)
        query, key, value = tensors
        found = attend(query, key, value, processor).float()
    except RuntimeError:  # the kernel does not take these
        return float("inf")
    query, key, value = (x.float().transpose(1, 2) for x in tensors)
    with sdpa_kernel(SDPBackend.MATH):
        exact = scaled_dot_product_attention(query[:, :, :512], key, value).transpose(1, 2)
    exact = exact.flatten(2)
    return ((found[:, :512] - exact).norm() / exact.norm()).item()
