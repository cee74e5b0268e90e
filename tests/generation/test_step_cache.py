import torch

from worker.generation.step_cache import StepCache


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
