"""The step cache: tokens of computed steps, which cached steps put through the last block again.

They are 0.9 GB a window at 704 x 768. Those of a long video wait in the host's memory, so that its
length does not matter to the GPU's: a copy there or back takes a thousandth of a computed step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class StepCache:
    """For every latent frame the tokens that last entered the last block, with their window.

    When the windows have moved on, a window is put together from frames of several older ones; its
    reference frame and its text come from the older window of its first frame, as in the reference.

    Args:
        on_host: whether tokens of a GPU wait in pinned memory of the host.
    """

    def __init__(self, *, on_host: bool = False) -> None:
        self._on_host = on_host
        self._device: torch.device | None = None  # where the tokens come from, and go
        # of each latent frame: a window's image tokens and text, and the frame's place among them
        self._tokens: dict[int, tuple[Tensor, Tensor, int]] = {}

    def clear(self) -> None:
        """Forgets all tokens."""
        self._tokens.clear()

    def write(self, frames: Sequence[int], image: Tensor, text: Tensor) -> None:
        """Keeps the tokens of a window of these latent frames: (1 + T, S, D) and (L, D)."""
        self._device = image.device
        if self._on_host and image.is_cuda:
            image, text = _to_host(image), _to_host(text)
        for place, frame in enumerate(frames):
            self._tokens[frame] = (image, text, 1 + place)

    def read(self, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The same for a window of these latent frames."""
        first, text, _ = self._tokens[frames[0]]
        parts = [first[0], *(self._frame(frame) for frame in frames)]
        return torch.stack([self._on_device(part) for part in parts]), self._on_device(text)

    def _frame(self, frame: int) -> Tensor:  # (S, D)
        image, _, place = self._tokens[frame]
        return image[place]

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def host_bytes(num_windows: int, tokens: int, text_tokens: int, token_bytes: int) -> int:
    """What the tokens of one branch take in the host's memory.

    Args:
        tokens: image tokens of a window and its reference frame.
        token_bytes: of one token.
    """
    sizes = (tokens * token_bytes, text_tokens * token_bytes)
    return num_windows * sum(1 << (size - 1).bit_length() for size in sizes)  # as torch pins it


def _to_host(tensor: Tensor) -> Tensor:
    """A copy that is there when the GPU's stream gets there: only for what it reads later."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
