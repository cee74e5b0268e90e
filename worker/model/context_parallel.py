"""Ulysses context parallelism (arXiv 2309.14509): several ranks share each pass.

Each rank holds a share of the tokens, of the image's whole columns in time, and of the text. Before
attention they swap: each then has all tokens of some heads, in the order in which one process has
them, and whatever attends there need not know of other ranks. Afterwards they swap back. How many
exchanges a pass has follows from its shape alone, and never from what a rank has computed, so that
none waits for one that another leaves out. No gradient passes through.

What is swapped travels by the GPUs' copy engines where there is `PeerMemory`, else by NCCL or Gloo.

Shape letters: B samples, N tokens of all ranks and n of one, h heads of all ranks, D width.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from worker.model.kernels import joined, side_by_side
from worker.model.peer_memory import PeerMemory, Slot

_Pair = tuple[Tensor, Tensor]  # of image and text


@dataclass(frozen=True, slots=True)
class ContextParallel:
    """The ranks that share a pass."""

    group: dist.ProcessGroup
    peer_memory: PeerMemory | None = None

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
        return TokenShares(self, image, _parts(num_text, self.group.size()))

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
        return [TokenShares(self, image, tuple(text)) for text in torch.stack(texts, 1).tolist()]


class Work(Protocol):
    """Something that goes on beside the current stream."""

    def wait(self) -> object:
        """Has the stream wait for it."""


@dataclass(frozen=True, slots=True)
class Swap:
    """A tensor of which other ranks' parts are on their way, while this one computes."""

    whole: Tensor
    works: Sequence[Work] = ()
    sent: Sequence[Tensor] = ()  # which stay as they are until then
    arriving: Sequence[tuple[Tensor, Tensor]] = ()  # places, and what goes there

    def wait(self) -> Tensor:
        """The tensor, once all of it is there. On a GPU its stream waits, not the caller."""
        for work in self.works:
            work.wait()
        for place, part in self.arriving:
            _copy(place, part)
        return self.whole


class Place(NamedTuple):
    """Where some heads of a rank's tokens are to be written, each (B, tokens, those heads, D/h)."""

    heads: slice
    image: Tensor
    text: Tensor


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What attention takes of this rank's tokens: first it is written to its places, then sent."""

    places: Sequence[Place]
    send: Callable[[], Swap]


class Exchange(ABC):
    """How the tokens of a sample come to where they are attended with, and back.

    All ranks of a group begin their swaps in the same order: for each attention those to the heads,
    of queries, keys and values, and then the one back. What came to the heads may be overwritten
    once that one has begun.
    """

    @abstractmethod
    def outgoing(self, image: Tensor, text: Tensor) -> Outgoing:
        """Places for what becomes of (B, tokens, h, D/h) each, of this rank; perhaps their own."""

    @abstractmethod
    def swap_back(self, attended: Tensor, num_heads: int) -> Swap:
        """Begins to bring all heads of this rank's tokens here: (B, n, h, D/h)."""

    def swap_for_heads(self, image: Tensor, text: Tensor) -> Swap:
        """Begins to bring all tokens of this rank's heads here: (B, N, own heads, D/h)."""
        outgoing = self.outgoing(image, text)
        for place in outgoing.places:
            _copy(place.image, image[:, :, place.heads])
            _copy(place.text, text[:, :, place.heads])
        return outgoing.send()


class AllHere(Exchange):
    """One process has all tokens of all heads."""

    def outgoing(self, image: Tensor, text: Tensor) -> Outgoing:
        if torch.is_grad_enabled():  # it flows to no part that lies in a whole already
            parts = torch.empty_like(image), torch.empty_like(text)
            return Outgoing([Place(slice(None), *parts)], lambda: Swap(torch.cat(parts, dim=1)))
        whole = side_by_side(image, text)
        if whole is None:
            whole = image.new_empty(len(image), image.shape[1] + text.shape[1], *image.shape[2:])
        place = Place(slice(None), *_cut(whole, image.shape[1]))
        return Outgoing([place], lambda: Swap(whole))

    def swap_for_heads(self, image: Tensor, text: Tensor) -> Swap:
        return Swap(joined(image, text))

    def swap_back(self, attended: Tensor, num_heads: int) -> Swap:
        return Swap(attended)


ALL_HERE = AllHere()


@dataclass(frozen=True, slots=True)
class TokenShares(Exchange):
    """The tokens of one sample on the ranks that share them; on each the image's come first."""

    parallel: ContextParallel
    image: tuple[int, ...]  # tokens of each rank
    text: tuple[int, ...]

    def outgoing(self, image: Tensor, text: Tensor) -> Outgoing:
        num_heads, width = image.shape[2:]
        rank, heads = self._rank, self._heads(num_heads)
        slot = self._next_slot(num_heads, width * image.itemsize)

        def whole_of(peer: int) -> Tensor:
            num_tokens = sum(self.image) + sum(self.text)
            return _memory(slot, peer, (1, num_tokens, heads[peer], width), image)

        whole = whole_of(rank)
        places = self._places(whole)
        packed = {
            peer: image.new_empty(1, self._num_tokens(rank), heads[peer], width)
            for peer in self._others
        }
        sent = {peer: _cut(part, self.image[rank]) for peer, part in packed.items()}

        def send() -> Swap:
            received = {peer: places[peer] for peer in sent}
            works = self._begin(
                slot, sent, received, lambda peer: self._places(whole_of(peer))[rank]
            )
            return Swap(whole, works, list(packed.values()))

        targets = sent | {rank: places[rank]}
        columns = enumerate(_slices(heads))
        return Outgoing([Place(own, *targets[peer]) for peer, own in columns], send)

    def swap_back(self, attended: Tensor, num_heads: int) -> Swap:
        width = attended.shape[3]
        rank, heads = self._rank, self._heads(num_heads)
        slot = self._next_slot(num_heads, width * attended.itemsize)
        attended = attended.contiguous()

        def part_of(peer: int, sender: int) -> Tensor:
            """Where a rank gets the heads of another one: behind those of the ones before."""
            num_tokens = self._num_tokens(peer)
            offset = num_tokens * sum(heads[:sender]) * width
            return _memory(slot, peer, (1, num_tokens, heads[sender], width), attended, offset)

        whole = attended.new_empty(1, self._num_tokens(rank), num_heads, width)
        targets = whole.split(heads, dim=2)
        places = self._places(attended)
        for target, own in zip(_cut(targets[rank], self.image[rank]), places[rank], strict=True):
            _copy(target, own)
        parts = {peer: part_of(rank, peer) for peer in self._others}
        works = self._begin(
            slot,
            {peer: places[peer] for peer in parts},
            {peer: _cut(part, self.image[rank]) for peer, part in parts.items()},
            lambda peer: _cut(part_of(peer, rank), self.image[peer]),
        )
        return Swap(whole, works, [attended], [(targets[peer], parts[peer]) for peer in parts])

    def gather_image(self, x: Tensor) -> Tensor:
        """The image tokens of all ranks, (B, N, D), from this rank's (B, n, D)."""
        batch, _, width = x.shape
        sizes = [batch * count * width for count in self.image]
        copies = x.flatten().repeat(len(sizes))  # gloo gathers no parts of different sizes
        received = x.new_empty(sum(sizes))
        sent_sizes = [x.numel()] * len(sizes)
        group = self.parallel.group
        dist.all_to_all_single(received, copies, sizes, sent_sizes, group=group)
        parts = received.split(sizes)
        return torch.cat([part.view(batch, -1, width) for part in parts], dim=1)

    @property
    def _rank(self) -> int:
        return self.parallel.group.rank()

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(len(self.image)) if rank != self._rank]

    def _num_tokens(self, rank: int) -> int:
        return self.image[rank] + self.text[rank]

    def _heads(self, num_heads: int) -> tuple[int, ...]:
        """How many heads each rank attends with."""
        return _parts(num_heads, len(self.image))

    def _places(self, whole: Tensor) -> list[_Pair]:
        """Where each rank's image and text lie among all tokens, (1, N, own heads, D/h)."""
        images = whole[:, : sum(self.image)].split(self.image, dim=1)
        texts = whole[:, sum(self.image) :].split(self.text, dim=1)
        return list(zip(images, texts, strict=True))

    def _next_slot(self, num_heads: int, head_bytes: int) -> Slot | None:
        """One that the largest share of any rank fits in, on its way there or back."""
        if self.parallel.peer_memory is None:
            return None
        ranks = range(len(self.image))
        to_heads = sum(map(self._num_tokens, ranks)) * max(self._heads(num_heads))
        back = max(map(self._num_tokens, ranks)) * num_heads
        return self.parallel.peer_memory.next_slot(max(to_heads, back) * head_bytes)

    def _begin(
        self,
        slot: Slot | None,
        sent: dict[int, _Pair],
        received: dict[int, _Pair],  # where it lands on this rank
        lands: Callable[[int], _Pair],  # where what is sent lands on that one; with a slot
    ) -> list[Work]:
        """Begins the exchange with each other rank."""
        if slot is not None:
            copies = (zip(sent[peer], lands(peer), strict=True) for peer in sent)
            return [slot.write(itertools.chain.from_iterable(copies))]
        operations = [
            dist.P2POp(operation, part, group=self.parallel.group, group_peer=peer)
            for peer in sent
            for operation, parts in ((dist.isend, sent[peer]), (dist.irecv, received[peer]))
            for part in parts
            if part.numel() > 0  # nothing is sent then
        ]
        return list(dist.batch_isend_irecv(operations)) if operations else []


def _memory(
    slot: Slot | None, rank: int, shape: Sequence[int], like: Tensor, offset: int = 0
) -> Tensor:
    """A rank's memory to receive in: of its slot, so many values behind the start, or new."""
    if slot is None:
        return like.new_empty(shape)
    return slot.tensor(rank, shape, like.dtype, offset)


def _copy(target: Tensor, source: Tensor) -> None:
    """Copies heads, which lie apart in one of both: sixteen bytes at a time where that fits."""
    if source.shape[-1] * source.itemsize % 16 == 0:
        target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.copy_(source)


def _cut(part: Tensor, num_image: int) -> _Pair:
    return part[:, :num_image], part[:, num_image:]


def _parts(number: int, num_ranks: int) -> tuple[int, ...]:
    """The sizes that `tensor_split` gives."""
    least, more = divmod(number, num_ranks)
    return tuple(least + (rank < more) for rank in range(num_ranks))


def _slices(sizes: Sequence[int]) -> list[slice]:
    """The parts of those sizes, one behind the other."""
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
