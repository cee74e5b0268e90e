import pytest
import torch

from worker.generation.step_cache import StepCache, host_bytes


def window_tokens(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A window of three frames with one token each; a frame's token is `value` and its place."""
    return value + torch.arange(4.0).view(4, 1, 1), torch.full((2, 1), value)


def test_cached_tokens_come_from_the_window_that_computed_a_frame_last() -> None:
    cache = StepCache()
    cache.write([0, 1, 2], *window_tokens(10))
    cache.write([3, 4, 0], *window_tokens(20))
    image, text = cache.read([2, 3, 4])
    assert image.flatten().tolist() == [10, 13, 21, 22]  # the reference frame, then the three
    assert text.flatten().tolist() == [10, 10]
    assert cache.read([4, 0, 1])[0].flatten().tolist() == [20, 22, 23, 12]


@pytest.mark.gpu
def test_tokens_that_wait_on_the_host_come_back_as_they_were() -> None:
    caches = [StepCache(on_host=on_host) for on_host in (False, True)]
    for start in range(0, 40, 4):
        image, text = torch.randn(5, 300, 64, device="cuda"), torch.randn(9, 64, device="cuda")
        for cache in caches:
            cache.write(range(start, start + 4), image, text)
    before = torch.cuda.memory_allocated()
    here, back = (cache.read([7, 8, 39, 0]) for cache in caches)
    assert all(torch.equal(*pair) for pair in zip(here, back, strict=True))
    assert back[0].is_cuda
    caches[1].clear()
    assert torch.cuda.memory_allocated() - before < 2**20


def test_what_waits_on_the_host_is_counted_as_torch_pins_it() -> None:
    assert host_bytes(num_windows=3, tokens=100, text_tokens=16, token_bytes=64) == 3 * (
        8192 + 1024
    )
