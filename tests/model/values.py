"""Values in bfloat16 for the tests of what a GPU's kernels give beside torch's operators."""

import pytest
import torch
from torch import Tensor

ROUNDING = 3e-3  # of bfloat16, in relative norm
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def normal(*shape: int, device: torch.device | str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)
