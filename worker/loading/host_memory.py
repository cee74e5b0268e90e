"""Memory of the host that begins at a page, and what a GPU copies from it by itself."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
_HOST_TO_DEVICE = 1  # cudaMemcpyHostToDevice


class HostMemory(mmap.mmap):
    """Memory that begins at a page of its own, and can be pinned as it is."""

    # Not from torch: its pinned memory is rounded up to a power of two, and kept.

    _pinned_address: int | None = None

    def __new__(cls, num_bytes: int) -> Self:
        return super().__new__(cls, -1, num_bytes, flags=mmap.MAP_PRIVATE)

    def tensor(self) -> Tensor:  # (num_bytes,) uint8
        """The memory, which lives as long as the tensor's storage does."""
        return torch.frombuffer(self, dtype=torch.uint8)

    def pin(self) -> int:
        """Lets the GPU copy from here by itself. Returns CUDA's error, 0 for none."""
        address = self.tensor().data_ptr()
        error = int(torch.cuda.cudart().cudaHostRegister(address, len(self), _PORTABLE))
        if error == 0:
            self._pinned_address = address
        return error

    def __del__(self) -> None:
        if self._pinned_address is not None and not sys.is_finalizing():
            torch.cuda.cudart().cudaHostUnregister(self._pinned_address)


class CopyBuffer:
    """Memory from which parts are copied into tensors, and which is then filled anew.

    Copies to a GPU run on the stream that is current when the buffer is made.
    """

    def __init__(self, memory: Tensor, *, for_gpu: bool) -> None:
        self.memory = memory  # (num_bytes,) uint8
        self.view = memory.numpy().data
        self._address = memory.data_ptr()
        self._stream = torch.cuda.current_stream() if for_gpu else None
        self._copied = torch.cuda.Event() if for_gpu else None

    def start_copy(self, start: int, num_bytes: int, target: Tensor, target_start: int) -> None:
        """Copies bytes into the target. On a GPU they are there once `wait` has returned.

        Args:
            target: (bytes,) uint8, contiguous.
        """
        if self._stream is None or not target.is_cuda or (copy := cuda_copy()) is None:
            source = self.memory[start : start + num_bytes]
            target[target_start : target_start + num_bytes].copy_(source, non_blocking=True)
            return
        error = copy(
            target.data_ptr() + target_start,
            self._address + start,
            num_bytes,
            _HOST_TO_DEVICE,
            self._stream.cuda_stream,
        )
        torch.cuda.check_error(error)

    def end_copies(self) -> None:
        """Says that all copies from what the buffer holds have been started."""
        if self._copied is not None:
            self._copied.record(self._stream)

    def wait(self) -> None:
        """Returns when they have ended: the buffer may be filled anew."""
        # `synchronize` gives up the interpreter, which `query` keeps: see `cuda_copy`.
        if self._copied is not None and not self._copied.query():
            self._copied.synchronize()


@functools.cache
def cuda_copy() -> Callable[[int, int, int, int, int], int] | None:
    """CUDA's cudaMemcpyAsync(to, from, bytes, direction, stream); None if torch hides it.

    Starting a copy takes microseconds. PyDLL keeps the interpreter for them: who gives it up, as
    torch does, waits up to 5 ms to have it again while other threads run Python.
    """
    try:
        function = ctypes.PyDLL(None).cudaMemcpyAsync
    except AttributeError:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = (pointer, pointer, size, ctypes.c_int, pointer)
    function.restype = ctypes.c_int
    return function
