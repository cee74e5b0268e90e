"""FlashAttention 4 (the package flash-attn-4), where it is installed: all keys, or chosen blocks.

The package takes seconds to import and more to compile. What it compiles can be had as a library
that needs neither: the image has those of the GPUs that RunPod rents (`python -m builder.kernels`),
and they load in a tenth of a second. On a GPU without a library the package serves, which keeps
what it has compiled in the same directory. Tensors are bfloat16.

Shape letters: B samples, N tokens, h heads, D width, q and k blocks of queries and of keys.
"""

import ctypes
import functools
import logging
import math
import os
import threading
import warnings
from collections.abc import Callable
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

NAME = "flash_attn_4"
BLOCK = 128  # tokens of a block of queries, and of keys
CACHE_DIR = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
CACHE_ENABLED = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
ALL_KEYS, CHOSEN_BLOCKS, UNMASKED_KEYS = "attend", "attend_blocks", "attend_unmasked"
_PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl", "apache-tvm-ffi")  # a library fits these alone

_importing = threading.Lock()


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention, 3 x (B, N, h, D/h) -> (B, N, h, D/h).

    Raises:
        ImportError: the package is missing, or has no such kernel for this GPU.
    """
    out, _ = _forward(ALL_KEYS, query, key, value)
    return out


def attend_blocks(
    query: Tensor,  # (1, N, h, D/h), as are key and value
    key: Tensor,
    value: Tensor,
    counts: Tensor,  # (h, q) int32, of the blocks of keys that a block of queries sees
    indices: Tensor,  # (h, q, k) int32, these blocks in order; what lies behind is not read
) -> tuple[Tensor, Tensor]:  # (1, N, h, D/h), (1, h, N) float32
    """Softmax attention over the chosen blocks, and the logarithm of its sum.

    Raises:
        ImportError: the package is missing, or has no such kernel for this GPU.
    """
    masked = (
        torch.zeros(1, *counts.shape, dtype=torch.int32, device=counts.device),
        torch.zeros(1, *counts.shape, 1, dtype=torch.int32, device=counts.device),
    )
    blocks = (*masked, counts.unsqueeze(0), indices.unsqueeze(0))
    out, sums = _forward(CHOSEN_BLOCKS, query, key, value, blocks=blocks)
    assert sums is not None
    return out, sums


def attend_unmasked(
    query: Tensor,  # (1, N, h, D/h)
    key: Tensor,  # (1, k, h, D/h), as is value
    value: Tensor,
    mask: Tensor,  # (h, q, k) uint8: 1 where a block of queries does not see a key
) -> tuple[Tensor, Tensor]:  # (1, N, h, D/h), (1, h, N) float32
    """Softmax attention over few keys by a mask; a query that sees none has a sum of zero.

    Raises:
        ImportError: the package is missing, or has no such kernel for this GPU.
    """
    out, sums = _forward(UNMASKED_KEYS, query, key, value, mask=mask)
    assert sums is not None
    return out, sums


def why_not() -> str | None:
    """Why it cannot be used; None: it can."""
    if torch.cuda.is_available() and library(ALL_KEYS, torch.cuda.get_device_capability()):
        return None
    try:
        package()
    except ImportError as error:
        return str(error)
    return None


def begin_loading() -> None:
    """Loads it in a thread, since the package takes seconds; whoever needs it then waits."""
    threading.Thread(target=why_not, name="flash-attn-4", daemon=True).start()


def package() -> Any:
    """The module that speaks to the package, which is imported once.

    Raises:
        ImportError: it is not installed, or does not work here.
    """
    with _importing:
        return _import()


@functools.cache
def _import() -> Any:
    os.environ.setdefault(CACHE_ENABLED, "1")  # noqa: TID251 (the package reads it)
    os.environ.setdefault(CACHE_DIR, str(_directory()))  # noqa: TID251
    # Of its compiler, about its own code.
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)
    try:
        return import_module("worker.model.flash_attention_4_package")
    except ImportError:
        raise
    except Exception as error:  # its imports look at the GPU and load libraries
        raise ImportError(f"flash-attn-4 cannot be used: {error}") from error


def library_path(name: str, capability: tuple[int, int]) -> Path:
    """Where the library of a kernel lies for GPUs of that compute capability.

    Raises:
        ImportError: the package is not installed.
    """
    versions = "-".join(metadata.version(package) for package in _PACKAGES)
    return _directory() / "libraries" / versions / "sm_{}{}".format(*capability) / f"{name}.so"


@functools.cache
def library(name: str, capability: tuple[int, int]) -> Callable[..., None] | None:
    """The kernel from its library; None: there is none that loads here.

    Raises:
        ImportError: there are libraries for this GPU, but none of this kernel: it has none.
    """
    try:
        path, of_all_keys = (library_path(each, capability) for each in (name, ALL_KEYS))
    except ImportError:
        return None
    if not path.exists():
        if of_all_keys.exists():
            raise ImportError("flash-attn-4 has no kernel over chosen blocks for this GPU")
        return None
    try:
        _load_runtime()
        loaded: Callable[..., None] = import_module("tvm_ffi").load_module(str(path))[name]
    except Exception as error:  # whatever a loader of libraries raises
        logger.warning("%s is of no use, the package serves: %s", path, error)
        return None
    return loaded


@functools.cache
def _load_runtime() -> None:
    """Loads what all kernels call, where they find it."""
    (version, _, _) = str(torch.version.cuda).partition(".")
    found = util.find_spec("nvidia_cutlass_dsl")
    for directory in (found and found.submodule_search_locations) or ():
        path = Path(directory, f"cu{version}", "lib", "libcute_dsl_runtime.so")
        if path.exists():
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            return
    raise OSError(f"nvidia-cutlass-dsl has no libcute_dsl_runtime.so for CUDA {version}")


def _directory() -> Path:
    # The package's own default is a path below /tmp that any user can guess and fill.
    default = Path.home() / ".cache" / "avatar-worker" / "kernels"
    return Path(os.environ.get(CACHE_DIR) or default)  # noqa: TID251


def _forward(
    name: str,
    query: Tensor,  # (B, N, h, D/h)
    key: Tensor,  # (B, N of keys, h, D/h), as is value
    value: Tensor,
    *,
    blocks: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,  # as the package's module says
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention and, but for that to all keys, the logarithms of its sums.

    Raises:
        ImportError: neither a library nor the package has the kernel.
    """
    return_sums = name != ALL_KEYS
    kernel = None
    if query.is_cuda:
        kernel = library(name, torch.cuda.get_device_capability(query.device))
    if kernel is None:
        found: tuple[Tensor, Tensor | None] = package().forward(
            query, key, value, blocks=blocks, mask=mask, return_sums=return_sums
        )
        return found
    query, key, value = (x.contiguous() for x in (query, key, value))
    batch, tokens, heads, width = query.shape
    out, sums = torch.empty_like(query), None
    if return_sums:
        sums = torch.empty(batch, heads, tokens, dtype=torch.float32, device=query.device)
    # As flash_attn.cute.interface calls it; of varying lengths, pages, windows and sinks none.
    sparse = None if blocks is None else (*blocks, None, None, None, None)
    auxiliary = (None if mask is None else [mask], None)
    scale = 1 / math.sqrt(width)
    kernel(query, key, value, out, sums, scale, *[None] * 8, sparse, auxiliary, None, None)
    return out, sums
