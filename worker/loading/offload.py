"""What lies on the GPU when: the plan for its memory, and the networks that come block by block.

A plan is made once, from the memory there is. Where everything fits, everything stays on the GPU.
Else the networks lie on the host (`worker.loading.loader`) and each is brought while it is in use:
what it has besides its blocks as a whole, its blocks one after the other on a stream of their own,
each while the one before it computes. As many of the transformer's blocks as there is room for
stay.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worker.shapes import LONG_SIDE, FrameSize, window_tokens

GIB = 2**30
SLOTS = 2  # blocks on their way or in use, of those that do not stay

# Measured on an H200 (docs/performance.md), rounded up.
TOKEN_BYTES = 27 * 3072  # of the denoiser at its peak, for each token of a window
DENOISER_BYTES = GIB // 4  # whatever the size: convolutions, text, noise
DECODER_SCRATCH_BYTES = 2**28  # of the decoder's chunk in work, where memory is short
DECODER_BYTES = 11 * GIB // 4  # a tile of the autoencoder then, and its frames
TEXT_TOKENS = 831  # at most
USABLE_SHARE = 0.96  # of free memory: the rest is for libraries, and lost between tensors


@dataclass(frozen=True)
class NetworkSize:
    """How much memory a network takes."""

    block_bytes: Sequence[int]  # of each block, in any order
    other_bytes: int  # outside of its blocks

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self.block_bytes) + self.other_bytes

    @property
    def streamed_bytes(self) -> int:
        """What it takes at least while it is in use."""
        slots = min(SLOTS, len(self.block_bytes))
        return self.other_bytes + slots * max(self.block_bytes, default=0)


@dataclass(frozen=True)
class MemoryPlan:
    """What stays on the GPU, and the largest video that then fits."""

    budget_bytes: int  # for weights and everything else
    all_resident: bool
    resident_blocks: int  # of the transformer
    num_blocks: int
    max_tokens: int  # of a window

    def fits(self, size: FrameSize) -> bool:
        """Whether a video of that size can be made."""
        return window_tokens(size) + TEXT_TOKENS <= self.max_tokens

    def resolutions(self) -> list[int]:
        """The resolutions that can be made whatever the shape of the portrait."""
        return [
            short for short, long in sorted(LONG_SIDE.items()) if self.fits(FrameSize(short, long))
        ]

    def __str__(self) -> str:
        if self.all_resident:
            stays = "everything stays on the GPU"
        else:
            stays = (
                f"{self.resident_blocks} of the transformer's {self.num_blocks} blocks stay on the "
                "GPU, everything else comes when it is used"
            )
        most = ", ".join(map(str, self.resolutions())) or "none"
        return f"{self.budget_bytes / GIB:.1f} GiB: {stays}; resolutions for any portrait: {most}"


def make_plan(budget_bytes: int, networks: Mapping[str, NetworkSize]) -> MemoryPlan:
    """The plan for so much memory: the largest videos first, then as much that stays as possible.

    Raises:
        ValueError: not even the smallest video fits; says how much is missing.
    """
    transformer = networks["transformer"]
    total = sum(network.total_bytes for network in networks.values())
    num_blocks = len(transformer.block_bytes)

    largest = _activation_bytes(max(map(_tokens, LONG_SIDE.items())))
    if total + max(largest, DECODER_BYTES) <= budget_bytes:
        room = budget_bytes - total
        return MemoryPlan(budget_bytes, True, num_blocks, num_blocks, _tokens_in(room))

    # The last block, of the smaller kind, is used in every step; the others are streamed or stay.
    least = transformer.streamed_bytes + min(transformer.block_bytes)
    others = [each.streamed_bytes for name, each in networks.items() if name != "transformer"]
    beside = max(*others, networks["vae"].total_bytes + DECODER_BYTES)
    smallest = _tokens((min(LONG_SIDE), min(LONG_SIDE)))
    missing = max(least + _activation_bytes(smallest), beside) - budget_bytes
    if missing > 0:
        raise ValueError(f"{missing / GIB:.1f} GiB more of GPU memory are needed")
    max_tokens = min(_tokens_in(budget_bytes - least), max(map(_tokens, LONG_SIDE.items())))
    room = budget_bytes - max(least + _activation_bytes(max_tokens), beside)
    resident = 1
    for num_bytes in sorted(transformer.block_bytes, reverse=True)[:-1]:
        room -= num_bytes
        if room < 0:
            break
        resident += 1
    return MemoryPlan(budget_bytes, False, resident, num_blocks, max_tokens)


def _tokens(sides: tuple[int, int]) -> int:
    return window_tokens(FrameSize(*sides)) + TEXT_TOKENS


def _activation_bytes(tokens: int) -> int:
    return DENOISER_BYTES + TOKEN_BYTES * tokens


def _tokens_in(num_bytes: int) -> int:
    return (num_bytes - DENOISER_BYTES) // TOKEN_BYTES


class HostedNetwork:
    """A network that lies on the host and is brought to the device while it is in use.

    Args:
        network: its weights on the host, those of each block in one storage, those outside of
            the blocks in one more.
        blocks: in the order in which they run. To skip some or to go back costs time alone.
        resident: how many blocks stay on the device once they have been there; None: all come
            when the network comes, and leave with it.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        resident: int | None,
    ) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        inside = {id(module) for block in blocks for module in block.modules()}
        self._outside = _Weights([m for m in network.modules() if id(m) not in inside])
        self._blocks = [_Weights(list(block.modules())) for block in blocks]
        self._whole = resident is None
        self._stays = _spread(len(blocks), resident or 0)
        self._slots: list[_Slot] = []
        self._current: int | None = None
        self._hooks = [
            block.register_forward_pre_hook(lambda *_, index=index: self._arrive(index))
            for index, block in enumerate(blocks)
            if not self._whole
        ]

    def let_go(self) -> None:
        """Brings everything back to the host, for good."""
        for hook in self._hooks:
            hook.remove()
        for weights in (self._outside, *self._blocks):
            weights.return_to_host()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the network can run; afterwards, what does not stay has left the device."""
        leaving = [self._outside]
        self._bring(self._outside)
        if self._whole:
            leaving += self._blocks
            for weights in self._blocks:
                self._bring(weights)
        else:
            coming = [each for i, each in enumerate(self._blocks) if i not in self._stays]
            leaving += coming
            largest = max(map(len, coming), default=0)
            self._slots = [_Slot(_empty(largest, self.device)) for _ in coming[:SLOTS]]
            if self._stream is not None:  # other work may still read what the slots were before
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            yield
        finally:
            if self._stream is not None:
                self._stream.synchronize()
            self._slots, self._current = [], None
            for weights in leaving:
                weights.return_to_host()

    def _arrive(self, index: int) -> None:
        """Before a block runs: its weights are there, and the next one's are on their way."""
        if index == self._current:
            return
        for slot in self._slots:
            if slot.holds == self._current and self._stream is not None:
                slot.free = torch.cuda.current_stream(self.device).record_event()
        self._current = index
        if index in self._stays:
            self._bring(self._blocks[index])
        else:
            slot = self._fetch(index)
            if slot.ready is not None:
                torch.cuda.current_stream(self.device).wait_event(slot.ready)
            self._blocks[index].lie_in(slot.memory)
        if len(self._slots) > 1:
            following = (*range(index + 1, len(self._blocks)), *range(index))
            self._fetch(next(i for i in following if i not in self._stays))

    def _fetch(self, index: int) -> "_Slot":
        """A slot that the block is in, or on its way to."""
        for slot in self._slots:
            if slot.holds == index:
                return slot
        others = [slot for slot in self._slots if slot.holds != self._current]
        slot = (others or self._slots)[0]
        weights = self._blocks[index]
        if self._stream is None:
            slot.memory[: len(weights)].copy_(weights.host)
        else:
            if slot.free is not None:
                self._stream.wait_event(slot.free)
            with torch.cuda.stream(self._stream):
                slot.memory[: len(weights)].copy_(weights.host, non_blocking=True)
                slot.ready = self._stream.record_event()
        slot.holds = index
        return slot

    def _bring(self, weights: "_Weights") -> None:
        """Weights that are not there yet come on the stream that will read them."""
        if weights.memory is None:
            memory = _empty(len(weights), self.device)
            memory.copy_(weights.host, non_blocking=True)
            weights.lie_in(memory)


@dataclass
class _Slot:
    """Memory on the device for one block after the other."""

    memory: Tensor
    holds: int | None = None
    ready: "torch.cuda.Event | None" = None  # its block has come
    free: "torch.cuda.Event | None" = None  # its block has been used


class _Weights:
    """The parameters and buffers of some modules, which lie in one storage on the host."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        tensors: dict[int, Tensor] = {}
        for module in modules:
            for own in (module._parameters, module._buffers):
                tensors |= {id(tensor): tensor for tensor in own.values() if tensor is not None}
        self._tensors = list(tensors.values())
        self._on_host = [tensor.data for tensor in self._tensors]
        storages = {tensor.untyped_storage().data_ptr() for tensor in self._on_host}
        if len(storages) > 1:
            raise ValueError("the weights of a block must lie in one storage")
        if self._on_host:
            storage = self._on_host[0].untyped_storage()
            self.host = torch.empty(0, dtype=torch.uint8).set_(storage)
        else:
            self.host = torch.empty(0, dtype=torch.uint8)
        self.memory: Tensor | None = None  # where they lie on the device

    def __len__(self) -> int:
        return len(self.host)

    def lie_in(self, memory: Tensor) -> None:
        """Makes them views of bytes that are, or soon will be, those on the host."""
        if memory is self.memory:
            return
        self.memory = memory
        for tensor, on_host in zip(self._tensors, self._on_host, strict=True):
            offset = on_host.storage_offset() * on_host.element_size()
            num_bytes = on_host.numel() * on_host.element_size()
            flat = memory[offset : offset + num_bytes].view(on_host.dtype)
            tensor.data = flat.view(on_host.shape)

    def return_to_host(self) -> None:
        """Makes them what they were."""
        self.memory = None
        for tensor, on_host in zip(self._tensors, self._on_host, strict=True):
            tensor.data = on_host


def _empty(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _spread(count: int, resident: int) -> frozenset[int]:
    """Which of so many stay: the last one, and the others so that those that come lie far apart."""
    streamed = count - resident
    if streamed <= 0 or not resident:
        return frozenset(range(count if resident else 0))
    come = {math.floor(i * (count - 1) / streamed) for i in range(streamed)}
    return frozenset(range(count)) - come
