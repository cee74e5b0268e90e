"""This machine, where a job fails because of it: its disk, its memory, its GPU.

Such a job is no better sent to this worker again, and is well served by another one. A library's
exception says too little: a full disk looks like a broken server, a damaged recording or an encoder
that failed. So the chain of exceptions below a failure is searched for what the system said.
"""

import errno
import os
import re
import socket
import ssl
import tempfile

import av

from avatar_client.contract.job_errors import (
    EncodeError,
    GenerationError,
    GpuFaultError,
    UnsupportedMediaError,
    WorkerError,
    WorkerFailedError,
)
from worker import import_guard

MIN_FREE_FILES = 16  # of a file system that counts them: a job's directory and what is in it

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What no server and no client causes: of a disk, and of a process that has no descriptor left.
DISK = (*FULL, errno.EROFS, errno.EIO, errno.EUCLEAN, errno.ENXIO, errno.ENODEV, errno.ESTALE)
DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
FORBIDDEN = (errno.EACCES, errno.EPERM)  # of a file; of a socket they are the network's
# Their numbers are other libraries' own, and mean something else.
FOREIGN_NUMBERS = (ssl.SSLError, socket.gaierror, socket.herror)
GPU = re.compile(r"CUDA|cuDNN|CUDNN|cuBLAS|CUBLAS|NCCL")
HOST_ALLOCATOR = "DefaultCPUAllocator"  # of torch, whose error has no class of its own

AGAIN = "send the job again, and another worker takes it"


def as_own_fault(error: BaseException) -> WorkerError | None:
    """The failure of a job as this machine's own; None if it is not, or says so already."""
    if isinstance(error, WorkerError) and error.refresh_worker:
        return None
    for link in import_guard.exception_chain(error):
        # of decoders, damaged media get the same as a broken disk and the end of memory
        if isinstance(link, av.FFmpegError) and not isinstance(error, EncodeError):
            continue
        reason = _of_system(link)
        if reason is None and not isinstance(error, UnsupportedMediaError):
            reason = _of_memory(link)
        if reason is not None:
            return WorkerFailedError(f"{reason}; {AGAIN}")
        is_of_model = isinstance(error, GenerationError) or not isinstance(error, WorkerError)
        if is_of_model and isinstance(link, RuntimeError) and GPU.search(str(link)):
            return GpuFaultError("the GPU failed")
    return None


def require_room(num_bytes: int) -> None:
    """Returns if that much can be written where jobs keep their files.

    Raises:
        WorkerFailedError: the disk has less room.
        OSError: it cannot be asked.
    """
    disk = os.statvfs(tempfile.gettempdir())
    has_files = disk.f_files == 0 or disk.f_favail >= MIN_FREE_FILES  # 0: they are not counted
    if disk.f_bavail * disk.f_frsize < num_bytes or not has_files:
        raise WorkerFailedError(f"this worker's disk has too little room for the job; {AGAIN}")


def _of_memory(error: BaseException) -> str | None:
    is_own = isinstance(error, MemoryError) or HOST_ALLOCATOR in str(error)
    return "this worker's memory is used up" if is_own else None


def _of_system(error: BaseException) -> str | None:
    """What the system says of this machine; None if it speaks of another, or of a file's place."""
    if not isinstance(error, OSError) or isinstance(error, FOREIGN_NUMBERS):
        return None
    if error.errno in FULL:
        return "this worker's disk is full"
    if error.errno in DISK or (error.errno in FORBIDDEN and error.filename is not None):
        return "this worker's disk failed"
    if error.errno in DESCRIPTORS:
        return "this worker has too many files open"
    if error.errno in (errno.ENOMEM, errno.ENOBUFS):
        return "this worker's memory is used up"
    return None
