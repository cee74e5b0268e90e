"""Ulysses context parallelism (arXiv 2309.14509): several ranks share each pass.

Each rank holds a share of the tokens, of the image's whole columns in time, and of the text. Before
attention they swap: each then has all tokens of some heads, in the order in which one process has
them, and whatever attends there need not know of other ranks. Afterwards they swap back. How many
exchanges a pass has follows from its shape alone, and never from what a rank has computed, so that
none waits for one that another leaves out. No gradient passes through.

Shape letters: B samples, N tokens of all ranks and n of one, h heads of all ranks, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ContextParallel:
    """The ranks that share a pass."""

    group: dist.ProcessGroup

    def share(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of it, which is a view."""
        return x.tensor_split(self.group.size(), dim)[self.group.rank()]

    def share_columns(self, x: Tensor, dim: int, num_frames: int) -> Tensor:
        """The same of image tokens, with all frames of each column on one rank."""
        return self.share(x.unflatten(dim, (-1, num_frames)), dim).flatten(dim, dim + 1)

    def token_shares(self, num_columns: int, num_frames: int, num_text: int) -> "TokenShares":
        """How `share` divides the tokens of a sample, with all frames of a column."""
        image = _parts(num_columns, self.group.size())
        image = tuple(num_frames * columns for columns in image)
        return TokenShares(self.group, image, _parts(num_text, self.group.size()))

    def token_shares_of_cached(
        self, num_columns: int, num_frames: int, num_texts: Sequence[int], device: torch.device
    ) -> list["TokenShares"]:
        """The same for each of the samples that lie here in shares, with so much text on this rank.

        The ranks tell each other: of a share alone no rank knows the others'.
        """
        image = self.token_shares(num_columns, num_frames, 0).image
        own = torch.tensor(num_texts, device=device)
        texts = [torch.empty_like(own) for _ in image]
        dist.all_gather(texts, own, group=self.group)
        return [
            TokenShares(self.group, image, tuple(text)) for text in torch.stack(texts, 1).tolist()
        ]


@dataclass(frozen=True, slots=True)
class TokenShares:
    """The tokens of one sample on the ranks that share them; on each the image's come first."""

    group: dist.ProcessGroup
    image: tuple[int, ...]  # tokens of each rank
    text: tuple[int, ...]

    def swap_for_heads(self, *tensors: Tensor) -> list[Tensor]:
        """All tokens of this rank's heads: of each (B, n, h, D/h) a (B, N, own heads, D/h).

        All tensors go in one exchange.
        """
        batch, own_tokens, num_heads, width = tensors[0].shape
        heads = self._heads(num_heads)
        own_heads = heads[self.group.rank()]
        # heads first, so that what goes to a rank is of one piece: (h, n, tensors, B, D/h)
        sent = torch.stack([x.permute(2, 1, 0, 3) for x in tensors], dim=2).flatten()
        of_a_token = len(tensors) * batch * width  # of one head
        counts = self._counts()
        received = self._exchange(
            sent,
            [count * own_tokens * of_a_token for count in heads],
            [count * own_heads * of_a_token for count in counts],
        )
        del sent
        parts = [
            part.view(own_heads, count, len(tensors), batch, width)
            for part, count in zip(received, counts, strict=True)
        ]
        images = [part[:, :count] for part, count in zip(parts, self.image, strict=True)]
        texts = [part[:, count:] for part, count in zip(parts, self.image, strict=True)]
        return [
            torch.cat([part[:, :, place].permute(2, 1, 0, 3) for part in images + texts], dim=1)
            for place in range(len(tensors))
        ]

    def swap_back(self, attended: Tensor, num_heads: int) -> Tensor:
        """All heads of this rank's tokens, (B, n, h, D/h), from (B, N, own heads, D/h)."""
        batch, _, own_heads, width = attended.shape
        rank, heads = self.group.rank(), self._heads(num_heads)
        counts = self._counts()
        own_tokens = counts[rank]
        by_token = attended.transpose(0, 1)  # (N, B, own heads, D/h)
        images = by_token[: sum(self.image)].split(self.image)
        texts = by_token[sum(self.image) :].split(self.text)
        sent = torch.cat([part for pair in zip(images, texts, strict=True) for part in pair])
        of_a_token = batch * width
        received = self._exchange(
            sent.flatten(),
            [count * own_heads * of_a_token for count in counts],
            [own_tokens * count * of_a_token for count in heads],
        )
        parts = [
            part.view(own_tokens, batch, count, width)
            for part, count in zip(received, heads, strict=True)
        ]
        return torch.cat([part.transpose(0, 1) for part in parts], dim=2)

    def gather_image(self, x: Tensor) -> Tensor:
        """The image tokens of all ranks, (B, N, D), from this rank's (B, n, D)."""
        batch, _, width = x.shape
        sizes = [batch * count * width for count in self.image]
        copies = x.flatten().repeat(len(sizes))  # gloo gathers no parts of different sizes
        received = self._exchange(copies, [x.numel()] * len(sizes), sizes)
        return torch.cat([part.view(batch, -1, width) for part in received], dim=1)

    def _counts(self) -> list[int]:
        """How many tokens each rank holds."""
        return [image + text for image, text in zip(self.image, self.text, strict=True)]

    def _heads(self, num_heads: int) -> tuple[int, ...]:
        """How many heads each rank attends with."""
        return _parts(num_heads, self.group.size())

    def _exchange(
        self, sent: Tensor, sent_sizes: list[int], received_sizes: list[int]
    ) -> tuple[Tensor, ...]:
        """What each rank has sent to this one; sizes are in elements, rank by rank."""
        received = sent.new_empty(sum(received_sizes))
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self.group)
        return received.split(received_sizes)


def _parts(number: int, num_ranks: int) -> tuple[int, ...]:
    """The sizes that `tensor_split` gives."""
    least, more = divmod(number, num_ranks)
    return tuple(least + (rank < more) for rank in range(num_ranks))
