"""Tile parallelism: how the decoding of one video is shared by several ranks.

All ranks have the same latents, cut into the same tiles. A round is one tile for each rank: in
round i rank r decodes tile i * num_ranks + r, and those of the others go to rank 0, which gives
them all in order. Rank 0 says when a round begins, which is a round before it decodes its own tile
of it: so the others decode while it blends and while frames are encoded, and none keeps more than
`ROUNDS_AHEAD + 1` tiles that have not been taken.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from worker.multi_gpu.parallel import SharedWork, computed_by_now
from worker.multi_gpu.process_group import ProcessGroup

ROUNDS_AHEAD = 1  # of rank 0, that the other ranks may decode


class Tile(Protocol):
    """A part of the latents, and what comes of it."""

    @property
    def latents(self) -> Tensor: ...

    @property
    def decoded_shape(self) -> tuple[int, ...]: ...


SomeTile = TypeVar("SomeTile", bound=Tile)


class TileGatherer(SharedWork):
    """The decoding of one video on all ranks, as rank 0 takes part in it."""

    def __init__(self, group: ProcessGroup, begin_step: Callable[[], None]) -> None:
        super().__init__(group, begin_step)
        self._begun: deque[Sequence[Tile]] = deque()  # rounds whose tiles have not been taken

    def map(
        self, decode: Callable[[SomeTile], Tensor], tiles: Sequence[SomeTile]
    ) -> Iterator[Tensor]:
        """All tiles in order, decoded here or elsewhere; those of a round come together."""
        size = self._group.num_ranks
        rounds = [tiles[start : start + size] for start in range(0, len(tiles), size)]
        for number, current in enumerate(rounds):
            for coming in rounds[number + len(self._begun) : number + 1 + ROUNDS_AHEAD]:
                self.begin_step()
                self._begun.append(coming)
            own = decode(current[0])
            decoded = self._take_round(own.device)
            yield own
            del own
            while decoded:
                yield decoded.popleft()

    def _take_round(self, device: torch.device) -> deque[Tensor]:
        """What the other ranks have decoded in the first round that has not been taken."""
        others = self._begun[0][1:]
        decoded = deque(
            torch.empty(tile.decoded_shape, dtype=tile.latents.dtype, device=device)
            for tile in others
        )
        if decoded:
            computed = computed_by_now(device)
            self.await_gather(self._group.receive_from_each(list(decoded)), computed)
        self._begun.popleft()
        if not self._begun:
            self.end_step()
        return decoded

    def take_begun(self) -> None:
        """Takes what the other ranks still decode, so that none waits to be rid of it."""
        while self._begun:
            self._take_round(self._begun[0][0].latents.device)
        self.end_step()


class TileSender:
    """The same, as another rank takes part in it."""

    def __init__(self, group: ProcessGroup, await_step: Callable[[], None]) -> None:
        self._group = group
        self._await_step = await_step
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()  # which lies there until it is taken

    def map(
        self, decode: Callable[[SomeTile], Tensor], tiles: Sequence[SomeTile]
    ) -> Iterator[Tensor]:
        """Decodes and sends this rank's tiles. Gives none.

        Raises:
            Exception: what `await_step` raises, once all begun rounds have been taken.
        """
        for start in range(0, len(tiles), self._group.num_ranks):
            try:
                self._await_step()
            except BaseException:
                self._await_taken(num_left=0)
                raise
            self._await_taken(num_left=ROUNDS_AHEAD)
            own = start + self._group.rank
            if own < len(tiles):
                decoded = decode(tiles[own]).contiguous()
                self._sent.append((self._group.send_to_first(decoded), decoded))
                del decoded
        self._await_taken(num_left=0)
        yield from ()

    def _await_taken(self, num_left: int) -> None:
        while len(self._sent) > num_left:
            work, _ = self._sent[0]
            self._group.await_on_host(work)
            self._sent.popleft()
