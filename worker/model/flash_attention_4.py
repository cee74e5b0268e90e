"""FlashAttention 4 (the package flash-attn-4), where it is installed: all keys, or chosen blocks.

Its kernels are compiled at their first use and kept in a directory (`CACHE_DIR`); the image has
them from `python -m builder.kernels`. Tensors are bfloat16.

Shape letters: B samples, N tokens, h heads, D width, q and k blocks of queries and of keys.
"""

import functools
import os
import threading
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "flash_attn_4"
BLOCK = 128  # tokens of a block of queries, and of keys
CACHE_DIR = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
CACHE_ENABLED = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"


_importing = threading.Lock()


def _interface() -> Any:
    """The package's functions, which are imported once; raises as `_import`."""
    with _importing:
        return _import()


@functools.cache
def _import() -> Any:
    """The package's functions.

    Raises:
        ImportError: it is not installed, or does not work here.
    """
    os.environ.setdefault(CACHE_ENABLED, "1")  # noqa: TID251 (the package reads it)
    # The package's own default is a path below /tmp that any user can guess and fill.
    directory = Path.home() / ".cache" / "avatar-worker" / "kernels"
    os.environ.setdefault(CACHE_DIR, str(directory))  # noqa: TID251
    # Of its compiler, about its own code.
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)
    try:
        return import_module("flash_attn.cute.interface")
    except ImportError:
        raise
    except Exception as error:  # its imports look at the GPU and load libraries
        raise ImportError(f"flash-attn-4 cannot be used: {error}") from error


def begin_import() -> None:
    """Imports the package in a thread, since that takes seconds; whoever needs it then waits."""
    threading.Thread(target=why_not, name="flash-attn-4", daemon=True).start()


def why_not() -> str | None:
    """Why the package cannot be used; None: it can."""
    try:
        _interface()
    except ImportError as error:
        return str(error)
    return None


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention, 3 x (B, N, h, D/h) -> (B, N, h, D/h).

    Raises:
        ImportError: the package is missing.
    """
    out, *_ = _interface()._flash_attn_fwd(query, key, value)
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
        ImportError: the package is missing.
    """
    interface = _interface()
    none = (
        torch.zeros(1, *counts.shape, dtype=torch.int32, device=counts.device),
        torch.zeros(1, *counts.shape, 1, dtype=torch.int32, device=counts.device),
    )
    blocks = interface.BlockSparseTensorsTorch(
        *none, counts.unsqueeze(0), indices.unsqueeze(0), block_size=(BLOCK, BLOCK)
    )
    out, lse, *_ = interface._flash_attn_fwd(
        query, key, value, block_sparse_tensors=blocks, return_lse=True
    )
    return out, lse


def attend_unmasked(
    query: Tensor,  # (1, N, h, D/h)
    key: Tensor,  # (1, k, h, D/h), as is value
    value: Tensor,
    mask: Tensor,  # (h, q, k) uint8: 1 where a block of queries does not see a key
) -> tuple[Tensor, Tensor]:  # (1, N, h, D/h), (1, h, N) float32
    """Softmax attention over few keys by a mask; a query that sees none has a sum of zero.

    Raises:
        ImportError: the package is missing.
    """
    interface = _interface()
    masks = import_module("worker.model.flash_attention_4_mask")
    out, lse, *_ = interface._flash_attn_fwd(
        query, key, value, mask_mod=masks.is_unmasked, aux_tensors=[mask], return_lse=True
    )
    return out, lse
