"""Makes libraries of FlashAttention 4's kernels for the GPUs that RunPod rents, without a GPU.

    python -m builder.kernels

They go where the worker looks for them (`worker.model.flash_attention_4.library_path`), so that no
start compiles them or imports the compiler. What cannot be made here is said, and the package
compiles it at the first start that needs it: for Blackwell's data centre GPUs it asks the driver.
Links with `ld`. The exit code is always 0.
"""

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from worker.model import flash_attention_4

logger = logging.getLogger("builder.kernels")

# By compute capability: A100; A40 and RTX 30; L40S, L4 and RTX 40; H100 and H200; RTX 50.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a")
OVER_BLOCKS = ("sm_90a",)  # the package's kernels for the others take no blocks, or ignore them
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
    architecture = os.environ["CUTE_DSL_ARCH"]  # noqa: TID251
    blocks = TOKENS // flash_attention_4.BLOCK
    with FakeTensorMode():

        def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        query, key, value = (tensor(1, TOKENS, HEADS, WIDTH) for _ in range(3))
        forward = flash_attention_4.package().forward
        if architecture in OVER_BLOCKS:
            counts = tensor(1, HEADS, blocks, dtype=torch.int32)
            indices = tensor(1, HEADS, blocks, blocks, dtype=torch.int32)
            none = tensor(1, HEADS, blocks, 1, dtype=torch.int32)
            chosen = {"blocks": (counts, none, counts, indices), "return_sums": True}
            make_library(
                flash_attention_4.CHOSEN_BLOCKS,
                architecture,
                lambda: forward(query, key, value, **chosen),
            )
            mask = tensor(HEADS, blocks, blocks, dtype=torch.uint8)
            means = tensor(1, blocks, HEADS, WIDTH)
            make_library(
                flash_attention_4.UNMASKED_KEYS,
                architecture,
                lambda: forward(query, means, means, mask=mask, return_sums=True),
            )
        # The last: where it is, a start takes what is not there for what this GPU does not have.
        make_library(flash_attention_4.ALL_KEYS, architecture, lambda: forward(query, key, value))


def make_library(name: str, architecture: str, compile_kernel: Callable[[], object]) -> None:
    """Makes the library of the kernel that the call compiles."""
    path = flash_attention_4.library_path(name, capability_of(architecture))
    with tempfile.TemporaryDirectory() as directory:
        compiled = Path(directory) / f"{name}.o"
        flash_attention_4.package().export(compile_kernel, compiled, name)
        link(compiled, path)


def link(compiled: Path, library: Path) -> None:
    """Makes a library of an object file; whoever looks meanwhile finds it whole or not at all.

    Raises:
        OSError: there is no linker, or no room.
        subprocess.CalledProcessError: it is no object file.
    """
    linker = shutil.which("ld")
    if linker is None:
        raise FileNotFoundError("ld, of the package binutils, is missing")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        linked = Path(directory) / library.name
        command = [linker, "-shared", "-o", str(linked), str(compiled)]
        subprocess.run(command, check=True)  # noqa: S603 (our own words)
        linked.replace(library)


def capability_of(architecture: str) -> tuple[int, int]:
    """(9, 0) of "sm_90a"."""
    digits = re.sub(r"\D", "", architecture)
    return int(digits[:-1]), int(digits[-1])


if __name__ == "__main__":
    main()
