"""The step cache: tokens of computed steps, which cached steps put through the last block again."""

from collections.abc import Sequence

import torch
from torch import Tensor


class StepCache:
    """For every latent frame the tokens that last entered the last block, with their window.

    When the windows have moved on, a window is put together from frames of several older ones; its
    reference frame and its text come from the older window of its first frame, as in the reference.
    """

    def __init__(self) -> None:
        # of each latent frame: a window's image tokens and text, and the frame's place among them
        self._tokens: dict[int, tuple[Tensor, Tensor, int]] = {}

    def clear(self) -> None:
        """Forgets all tokens."""
        self._tokens.clear()

    def write(self, frames: Sequence[int], image: Tensor, text: Tensor) -> None:
        """Keeps the tokens of a window of these latent frames: (1 + T, S, D) and (L, D)."""
        for place, frame in enumerate(frames):
            self._tokens[frame] = (image, text, 1 + place)

    def read(self, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The same for a window of these latent frames."""
        first, text, _ = self._tokens[frames[0]]
        parts = [first[0], *(self._frame(frame) for frame in frames)]
        return torch.stack(parts), text

    def _frame(self, frame: int) -> Tensor:  # (S, D)
        image, _, place = self._tokens[frame]
        return image[place]
