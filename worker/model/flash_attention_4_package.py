"""The package flash-attn-4 itself: only importable where it is, and that takes seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cutlass
from cutlass import cute
from flash_attn.cute import interface, utils
from torch import Tensor

from worker.model.flash_attention_4 import BLOCK


@cute.jit
def is_unmasked(
    batch: Any, head: Any, query: Any, key: Any, seqlen_info: Any, aux_tensors: Any
) -> Any:
    """Whether a query sees a key: `aux_tensors[0]` is (h, q, k), 1 where it does not."""
    masked = aux_tensors[0][head[0], query[0] // BLOCK, key[0]]
    return utils.scalar_to_ssa(masked == 0, cutlass.Boolean)


def forward(
    query: Tensor,  # (B, N, h, D/h)
    key: Tensor,  # (B, N of keys, h, D/h), as is value
    value: Tensor,
    *,
    blocks: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    return_sums: bool = False,
) -> tuple[Tensor, Tensor | None]:  # (B, N, h, D/h), (B, h, N) float32
    """Attention, and the logarithms of its sums if they are wanted; compiled if it has to be.

    Args:
        blocks: counts (B, h, q) and indices (B, h, q, k), int32, of the blocks of keys that a block
            of queries sees: first of those that have a mask, then of those seen whole.
        mask: for `is_unmasked`.
    """
    given: dict[str, Any] = {}
    if blocks is not None:
        given["block_sparse_tensors"] = interface.BlockSparseTensorsTorch(
            *blocks, block_size=(BLOCK, BLOCK)
        )
    if mask is not None:
        given |= {"mask_mod": is_unmasked, "aux_tensors": [mask]}
    out, sums, *_ = interface._flash_attn_fwd(query, key, value, return_lse=return_sums, **given)
    return out, sums


def export(compile_kernel: Callable[[], object], path: Path, name: str) -> None:
    """Writes the kernel that a call compiles as an object file, with one function of that name."""

    class Exported(dict[Any, Any]):
        def __setitem__(self, key: Any, compiled: Any) -> None:
            compiled.export_to_c(object_file_path=str(path), function_name=name)
            super().__setitem__(key, compiled)

    compiled_before = interface._flash_attn_fwd.compile_cache
    interface._flash_attn_fwd.compile_cache = Exported()
    try:
        compile_kernel()
    finally:
        interface._flash_attn_fwd.compile_cache = compiled_before
