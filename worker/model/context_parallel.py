"""Ulysses context parallelism (arXiv 2309.14509): several ranks share each pass.

Each rank holds a share of the tokens, of the image's whole columns in time, and of the text. Before
attention they swap: each then has all tokens of some heads, in the order in which one process has
them, and whatever attends there need not know of other ranks. Afterwards they swap back. How many
exchanges a pass has follows from its shape alone, and never from what a rank has computed, so that
none waits for one that another leaves out. No gradient passes through.

Shape letters: B samples, N tokens of all ranks and n of one, h heads of all ranks, D width.
"""

from collections.abc import Iterable, Sequence
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

    def swap_for_heads(self, x: Tensor) -> "Swap":
        """Begins to bring all tokens of this rank's heads here: of (1, n, h, D/h) (1, N, own, D/h).

        All ranks of the group begin their swaps in the same order.
        """
        rank, heads = self.group.rank(), self._heads(x.shape[2])
        whole = x.new_empty(1, sum(self.image) + sum(self.text), heads[rank], x.shape[3])
        places, own_image = self._places(whole), self.image[rank]
        sent, operations = [], []
        for peer, part in enumerate(x.split(heads, dim=2)):
            if peer == rank:
                for place, own in zip(places[rank], _cut(part, own_image), strict=True):
                    _copy(place, own)
                continue
            sent.append(part.new_empty(part.shape))
            _copy(sent[-1], part)
            operations += self._operations(peer, _cut(sent[-1], own_image), places[peer])
        return Swap(whole, _begin(operations), sent)

    def swap_back(self, attended: Tensor, num_heads: int) -> "Swap":
        """Begins to bring all heads of this rank's tokens here, the way back."""
        rank, heads = self.group.rank(), self._heads(num_heads)
        attended = attended.contiguous()
        places, own_image = self._places(attended), self.image[rank]
        own_tokens = own_image + self.text[rank]
        whole = attended.new_empty(1, own_tokens, num_heads, attended.shape[3])
        arriving, operations = [], []
        for peer, target in enumerate(whole.split(heads, dim=2)):
            if peer == rank:
                for target_part, own in zip(_cut(target, own_image), places[rank], strict=True):
                    _copy(target_part, own)
                continue
            part = target.new_empty(target.shape)
            arriving.append((target, part))
            operations += self._operations(peer, places[peer], _cut(part, own_image))
        return Swap(whole, _begin(operations), [attended], arriving)

    def gather_image(self, x: Tensor) -> Tensor:
        """The image tokens of all ranks, (B, N, D), from this rank's (B, n, D)."""
        batch, _, width = x.shape
        sizes = [batch * count * width for count in self.image]
        copies = x.flatten().repeat(len(sizes))  # gloo gathers no parts of different sizes
        received = x.new_empty(sum(sizes))
        sent_sizes = [x.numel()] * len(sizes)
        dist.all_to_all_single(received, copies, sizes, sent_sizes, group=self.group)
        parts = received.split(sizes)
        return torch.cat([part.view(batch, -1, width) for part in parts], dim=1)

    def _heads(self, num_heads: int) -> tuple[int, ...]:
        """How many heads each rank attends with."""
        return _parts(num_heads, self.group.size())

    def _places(self, whole: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Where each rank's image and text lie among all tokens, (1, N, own heads, D/h)."""
        images = whole[:, : sum(self.image)].split(self.image, dim=1)
        texts = whole[:, sum(self.image) :].split(self.text, dim=1)
        return list(zip(images, texts, strict=True))

    def _operations(
        self, peer: int, sent: Iterable[Tensor], received: Iterable[Tensor]
    ) -> list[dist.P2POp]:
        """What is sent to a rank and comes from it; nothing is where a part has no values."""
        operations = [(dist.isend, part) for part in sent] + [
            (dist.irecv, part) for part in received
        ]
        return [
            dist.P2POp(operation, part, group=self.group, group_peer=peer)
            for operation, part in operations
            if part.numel() > 0
        ]


@dataclass(frozen=True, slots=True)
class Swap:
    """A tensor of which other ranks' parts are on their way, while this one computes."""

    whole: Tensor
    works: Sequence[dist.Work] = ()
    sent: Sequence[Tensor] = ()  # which stay as they are until then
    arriving: Sequence[tuple[Tensor, Tensor]] = ()  # places, and what goes there

    def wait(self) -> Tensor:
        """The tensor, once all of it is there. On a GPU its stream waits, not the caller."""
        for work in self.works:
            work.wait()
        for place, part in self.arriving:
            _copy(place, part)
        return self.whole


def _begin(operations: list[dist.P2POp]) -> list[dist.Work]:
    return dist.batch_isend_irecv(operations) if operations else []


def _copy(target: Tensor, source: Tensor) -> None:
    """Copies heads, which lie apart in one of both: sixteen bytes at a time where that fits."""
    if source.shape[-1] * source.itemsize % 16 == 0:
        target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.copy_(source)


def _cut(part: Tensor, num_image: int) -> tuple[Tensor, Tensor]:
    """The image's and the text's tokens."""
    return part[:, :num_image], part[:, num_image:]


def _parts(number: int, num_ranks: int) -> tuple[int, ...]:
    """The sizes that `tensor_split` gives."""
    least, more = divmod(number, num_ranks)
    return tuple(least + (rank < more) for rank in range(num_ranks))
