import pytest
import torch

from worker.model.attention import LARGEST_ERROR, backend_error, fastest_backend


@pytest.mark.gpu
def test_the_attention_kernel_of_this_gpu_is_right() -> None:
    device = torch.device("cuda")
    assert backend_error(fastest_backend(device), device) < LARGEST_ERROR
    assert backend_error("_native_flash", device) < LARGEST_ERROR
