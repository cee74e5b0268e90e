"""A mask for FlashAttention 4, in the language of its kernels: only importable where that is."""

from typing import Any

import cutlass
from cutlass import cute
from flash_attn.cute import utils

from worker.model.flash_attention_4 import BLOCK


@cute.jit
def is_unmasked(
    batch: Any, head: Any, query: Any, key: Any, seqlen_info: Any, aux_tensors: Any
) -> Any:
    """Whether a query sees a key: `aux_tensors[0]` is (h, q, k), 1 where it does not."""
    masked = aux_tensors[0][head[0], query[0] // BLOCK, key[0]]
    return utils.scalar_to_ssa(masked == 0, cutlass.Boolean)
