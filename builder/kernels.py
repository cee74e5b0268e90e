"""Compiles FlashAttention 4's kernels for the GPUs that RunPod rents, where there is none.

    python -m builder.kernels

They go where the worker looks for them (`worker.model.flash_attention_4.CACHE_DIR`), so that no
start compiles them. What cannot be compiled here is said, and is compiled by the first start that
needs it: for Blackwell's data centre GPUs the package asks the driver. The exit code is always 0.
"""

import importlib.util
import logging
import os
import subprocess
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from worker.model import flash_attention_4

logger = logging.getLogger("builder.kernels")

# By compute capability: A100; A40 and RTX 30; L40S, L4 and RTX 40; H100 and H200; RTX 50.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a")
OVER_BLOCKS = ("sm_90a",)  # elsewhere the kernels take no blocks, or have not been proved
TOKENS, HEADS, WIDTH = 4224, 24, 128  # only the width is compiled in
MULTIPROCESSORS = 132  # the package asks for a number where no GPU tells it


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if torch.version.cuda is None or importlib.util.find_spec("flash_attn") is None:
        logger.info("no kernels: this environment computes on no GPU, or flash-attn-4 is missing")
        return
    for architecture in ARCHITECTURES:
        done = subprocess.run(
            [sys.executable, "-c", "from builder.kernels import compile_all; compile_all()"],
            env=environment(architecture),
            capture_output=True,
            text=True,
        )
        last = (done.stderr.strip() or "compiled").splitlines()[-1]
        logger.info("%s: %s", architecture, "compiled" if done.returncode == 0 else last)


def environment(architecture: str) -> dict[str, str]:
    """That of a process which compiles for that architecture."""
    return os.environ | {  # noqa: TID251 (the package reads it)
        "FLASH_ATTENTION_ARCH": architecture,
        "CUTE_DSL_ARCH": architecture,
        "QUACK_ARCH": architecture,
        "FLASH_ATTENTION_NUM_SMS": str(MULTIPROCESSORS),
    }


def compile_all() -> None:
    """Compiles for the architecture that the environment names; raises what the compiler does."""
    blocks = TOKENS // flash_attention_4.BLOCK
    with FakeTensorMode():

        def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        query, key, value = (tensor(1, TOKENS, HEADS, WIDTH) for _ in range(3))
        flash_attention_4.attend(query, key, value)
        if os.environ["CUTE_DSL_ARCH"] in OVER_BLOCKS:  # noqa: TID251
            counts = tensor(HEADS, blocks, dtype=torch.int32)
            indices = tensor(HEADS, blocks, blocks, dtype=torch.int32)
            flash_attention_4.attend_blocks(query, key, value, counts, indices)
            mask = tensor(HEADS, blocks, blocks, dtype=torch.uint8)
            means = tensor(1, blocks, HEADS, WIDTH)
            flash_attention_4.attend_unmasked(query, means, means, mask)


if __name__ == "__main__":
    main()
