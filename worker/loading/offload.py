"""What is on the GPU when: the plan for its memory, and the models that are offloaded to the host.

A plan is made once, from the memory there is. Where everything fits, everything is resident on the
GPU. Else the weights are in pinned memory of the host, and each model is onloaded while it is in
use: what it has outside its blocks as a whole, its blocks one after the other, each prefetched on a
stream of its own while the one before it computes. As many of the transformer's blocks as there is
room for stay resident.

diffusers' group offloading, which `benchmarks/offload.py` measures beside this, keeps no block on
the GPU however much room there is, allocates each block's tensors anew and copies them one by one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.loading.layout import blocks
from worker.shapes import LONG_SIDE, FrameSize, window_tokens

GIB = 2**30
NUM_PREFETCH_BUFFERS = 2  # for the block in use and the next one, of those that are not resident

# Measured on an H200 (docs/performance.md), rounded up.
TOKEN_BYTES = 27 * 3072  # of the denoiser at its peak, for each token of a window
DENOISER_BYTES = GIB // 4  # whatever the size: convolutions, text, noise
DECODER_SCRATCH_BYTES = 2**28  # of the chunk that is decoded, where memory is short
# A tile of the autoencoder then, and its frames; on another rank, tiles that wait to be taken.
DECODER_BYTES = 11 * GIB // 4
MAX_TEXT_TOKENS = 831  # text positions of a forward pass
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
        buffers = min(NUM_PREFETCH_BUFFERS, len(self.block_bytes))
        return self.other_bytes + buffers * max(self.block_bytes, default=0)


@dataclass(frozen=True)
class MemoryPlan:
    """What is resident on the GPU, and the largest video that then fits."""

    budget_bytes: int  # for weights and everything else
    all_resident: bool
    resident_blocks: int  # of the transformer
    num_blocks: int
    max_tokens: int  # of a window

    def fits(self, size: FrameSize) -> bool:
        """Whether a video of that size can be made."""
        return window_tokens(size) + MAX_TEXT_TOKENS <= self.max_tokens

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
    """The plan for so much memory: the largest videos first, then as many resident blocks as fit.

    Raises:
        ValueError: not even the smallest video fits; says how much is missing.
    """
    transformer = networks["transformer"]
    total = sum(network.total_bytes for network in networks.values())
    num_blocks = len(transformer.block_bytes)

    largest = activation_bytes(max(map(_tokens, LONG_SIDE.items())))
    if total + max(largest, DECODER_BYTES) <= budget_bytes:
        room = budget_bytes - total
        return MemoryPlan(budget_bytes, True, num_blocks, num_blocks, _tokens_in(room))

    # The last block, of the smaller kind, is used in every step: it is always resident.
    least = transformer.streamed_bytes + min(transformer.block_bytes)
    others = [each.streamed_bytes for name, each in networks.items() if name != "transformer"]
    beside = max(*others, networks["vae"].total_bytes + DECODER_BYTES)
    smallest = _tokens((min(LONG_SIDE), min(LONG_SIDE)))
    missing = max(least + activation_bytes(smallest), beside) - budget_bytes
    if missing > 0:
        raise ValueError(f"{missing / GIB:.1f} GiB more of GPU memory are needed")
    max_tokens = min(_tokens_in(budget_bytes - least), max(map(_tokens, LONG_SIDE.items())))
    room = budget_bytes - max(least + activation_bytes(max_tokens), beside)
    resident = 1
    for num_bytes in sorted(transformer.block_bytes, reverse=True)[:-1]:
        room -= num_bytes
        if room < 0:
            break
        resident += 1
    return MemoryPlan(budget_bytes, False, resident, num_blocks, max_tokens)


def _tokens(sides: tuple[int, int]) -> int:
    return window_tokens(FrameSize(*sides)) + MAX_TEXT_TOKENS


def activation_bytes(tokens: int) -> int:
    """What a denoising step needs beside the weights, for so many tokens of a window and text."""
    return DENOISER_BYTES + TOKEN_BYTES * tokens


def _tokens_in(num_bytes: int) -> int:
    return (num_bytes - DENOISER_BYTES) // TOKEN_BYTES


class OffloadedModel:
    """A model whose weights are on the host, and on the device while they are in use.

    Out of use, only resident blocks are on the device. Inside `in_use` the model can run: either
    all of it is there, or what is outside its blocks, and its blocks come as they run. After
    `restore` it is a model on the host again, and no `OffloadedModel` any more.

    Args:
        network: its weights are on the host, those of each block in one storage, those outside of
            the blocks in one more.
        blocks: in the order in which they run. To skip some or to go back costs time alone.
        resident: how many blocks stay on the device once they have been there; None: all blocks
            are onloaded when the model is, and offloaded with it.
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
        self._outside = _FlatWeights([m for m in network.modules() if id(m) not in inside])
        self._blocks = [_FlatWeights(list(block.modules())) for block in blocks]
        self._whole = resident is None
        self._resident = _spread(len(blocks), resident or 0)
        self._buffers: list[_PrefetchBuffer] = []
        self._current: int | None = None
        self._hooks = [
            block.register_forward_pre_hook(lambda *_, index=index: self._before_block(index))
            for index, block in enumerate(blocks)
            if not self._whole
        ]

    def restore(self) -> None:
        """Moves everything back to the host, for good."""
        for hook in self._hooks:
            hook.remove()
        for weights in (self._outside, *self._blocks):
            weights.offload()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the model can run; afterwards, what is not resident is off the device."""
        onloaded = [self._outside]
        self._onload(self._outside)
        if self._whole:
            onloaded += self._blocks
            for weights in self._blocks:
                self._onload(weights)
        else:
            streamed = [each for i, each in enumerate(self._blocks) if i not in self._resident]
            onloaded += streamed
            largest = max(map(len, streamed), default=0)
            self._buffers = [
                _PrefetchBuffer(_empty(largest, self.device))
                for _ in streamed[:NUM_PREFETCH_BUFFERS]
            ]
            if self._stream is not None:  # other work may still read what the buffers were before
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            yield
        finally:
            if self._stream is not None:
                self._stream.synchronize()
            self._buffers, self._current = [], None
            for weights in onloaded:
                weights.offload()

    def _before_block(self, index: int) -> None:
        """Has a block's weights on the device before it runs, and prefetches the next one's."""
        if index == self._current:
            return
        for buffer in self._buffers:
            if buffer.block == self._current and self._stream is not None:
                buffer.released = torch.cuda.current_stream(self.device).record_event()
        self._current = index
        if index in self._resident:
            self._onload(self._blocks[index])
        else:
            buffer = self._prefetch(index)
            if buffer.copied is not None:
                torch.cuda.current_stream(self.device).wait_event(buffer.copied)
            self._blocks[index].bind_to(buffer.memory)
        if len(self._buffers) > 1:
            following = (*range(index + 1, len(self._blocks)), *range(index))
            self._prefetch(next(i for i in following if i not in self._resident))

    def _prefetch(self, index: int) -> "_PrefetchBuffer":
        """The buffer that the block is in, or being copied to."""
        for buffer in self._buffers:
            if buffer.block == index:
                return buffer
        others = [buffer for buffer in self._buffers if buffer.block != self._current]
        buffer = (others or self._buffers)[0]
        weights = self._blocks[index]
        if self._stream is None:
            buffer.memory[: len(weights)].copy_(weights.host)
        else:
            if buffer.released is not None:
                self._stream.wait_event(buffer.released)
            with torch.cuda.stream(self._stream):
                buffer.memory[: len(weights)].copy_(weights.host, non_blocking=True)
                buffer.copied = self._stream.record_event()
        buffer.block = index
        return buffer

    def _onload(self, weights: "_FlatWeights") -> None:
        """Copies weights that are not on the device yet, on the stream that will read them."""
        if weights.memory is None:
            memory = _empty(len(weights), self.device)
            memory.copy_(weights.host, non_blocking=True)
            weights.bind_to(memory)


@dataclass
class _PrefetchBuffer:
    """Memory on the device for one block after the other."""

    memory: Tensor  # (bytes,) uint8
    block: int | None = None  # whose weights are in it, or being copied to it
    copied: "torch.cuda.Event | None" = None  # after its block's weights
    released: "torch.cuda.Event | None" = None  # after its block's last use


class _FlatWeights:
    """The parameters and buffers of some modules, which share one storage on the host."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        tensors: dict[int, Tensor] = {}
        for module in modules:
            for own in (module._parameters, module._buffers):
                tensors |= {id(tensor): tensor for tensor in own.values() if tensor is not None}
        self._tensors = list(tensors.values())
        self._on_host = [tensor.data for tensor in self._tensors]
        storages = {tensor.untyped_storage().data_ptr() for tensor in self._on_host}
        if len(storages) > 1:
            raise ValueError("the weights of a block must be in one storage")
        if self._on_host:
            storage = self._on_host[0].untyped_storage()
            self.host = torch.empty(0, dtype=torch.uint8).set_(storage)
        else:
            self.host = torch.empty(0, dtype=torch.uint8)
        self.memory: Tensor | None = None  # on the device; None: they are on the host

    def __len__(self) -> int:
        return len(self.host)

    def bind_to(self, memory: Tensor) -> None:
        """Makes them views of bytes that are, or soon will be, those on the host."""
        if memory is self.memory:
            return
        self.memory = memory
        for tensor, on_host in zip(self._tensors, self._on_host, strict=True):
            offset = on_host.storage_offset() * on_host.element_size()
            num_bytes = on_host.numel() * on_host.element_size()
            flat = memory[offset : offset + num_bytes].view(on_host.dtype)
            tensor.data = flat.view(on_host.shape)

    def offload(self) -> None:
        """Makes them views of the host's storage again."""
        self.memory = None
        for tensor, on_host in zip(self._tensors, self._on_host, strict=True):
            tensor.data = on_host


def offload_models(
    components: Mapping[str, Any], device: torch.device, plan: MemoryPlan
) -> dict[str, OffloadedModel]:
    """The networks that the plan keeps on the host, by name: the large ones block by block."""
    resident = {
        "text_encoder": 0,
        "text_encoder_2": None,
        "vae": None,
        "transformer": plan.resident_blocks,
    }
    return {
        name: OffloadedModel(network, list(blocks(network).values()), device, count)
        for name, count in resident.items()
        for network in [components[name]]
    }


def _empty(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _spread(count: int, resident: int) -> frozenset[int]:
    """Which of so many blocks are resident: the last, and those that leave the others far apart."""
    streamed = count - resident
    if streamed <= 0 or not resident:
        return frozenset(range(count if resident else 0))
    not_resident = {math.floor(i * (count - 1) / streamed) for i in range(streamed)}
    return frozenset(range(count)) - not_resident
