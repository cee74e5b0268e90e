"""What a decoder must not be able to do, as functions that the sandbox runs."""

import ctypes
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np

from worker.media.sandbox_process import ANSWER, Answer, Budget


def write_file(_: BinaryIO, __: Budget, *, path: str) -> Answer:
    Path(path).write_text("written")
    return Answer({})


def write_to_what_is_open(file: BinaryIO, __: Budget) -> Answer:
    os.write(file.fileno(), b"written")
    return Answer({})


def read_file(_: BinaryIO, __: Budget, *, path: str) -> Answer:
    return Answer({"text": Path(path).read_text()})


def read_by_old_call(_: BinaryIO, __: Budget, *, path: str) -> Answer:
    """Past the C library's functions: the system call `open` itself."""
    number = {"x86_64": 2}.get(os.uname().machine, 56)
    descriptor = ctypes.CDLL(None, use_errno=True).syscall(number, path.encode(), 0)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "open")
    return Answer({"descriptor": descriptor})


def open_socket(_: BinaryIO, __: Budget) -> Answer:
    with socket.socket():
        return Answer({})


def open_pipe(_: BinaryIO, __: Budget) -> Answer:
    return Answer({"ends": list(map(str, os.pipe()))})


def fork(_: BinaryIO, __: Budget) -> Answer:
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    return Answer({})


def run_program(_: BinaryIO, __: Budget) -> Answer:
    subprocess.run(["/bin/true"], check=True)
    return Answer({})


def become_program(_: BinaryIO, __: Budget) -> Answer:
    os.execv(sys.executable, [sys.executable, "-c", "print()"])  # does not return


def end_the_worker(_: BinaryIO, __: Budget, *, worker: int) -> Answer:
    os.kill(worker, 9)
    return Answer({})


def raise_own_limits(_: BinaryIO, __: Budget) -> Answer:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    return Answer({})


def tell_all(_: BinaryIO, __: Budget) -> Answer:
    """What lies around: the environment, and the descriptors that can be read from."""
    found = [f"{name}={value}" for name, value in os.environ.items()]
    open_ones = []
    for descriptor in range(1024):
        try:
            os.lseek(descriptor, 0, os.SEEK_CUR)
            open_ones.append(str(descriptor))
        except OSError as error:
            if error.errno == 29:  # a pipe or a socket
                open_ones.append(str(descriptor))
    return Answer({"environment": found, "descriptors": open_ones})


def take_memory(_: BinaryIO, __: Budget) -> Answer:
    return Answer({"size": len(bytes(2**33))})


def take_memory_for_good(_: BinaryIO, __: Budget) -> Answer:
    """Past the limit on one heap: as other mappings."""
    import mmap

    kept = [mmap.mmap(-1, 2**28) for _ in range(64)]
    for each in kept:
        each.write(bytes(2**28))
    return Answer({"size": len(kept)})


def spin(_: BinaryIO, __: Budget) -> Answer:
    while True:
        pass


def sleep(_: BinaryIO, __: Budget) -> Answer:
    import signal

    signal.setitimer(signal.ITIMER_PROF, 0)  # what ends it by itself
    time.sleep(600)
    return Answer({})


def crash(_: BinaryIO, __: Budget) -> Answer:
    ctypes.string_at(1)
    return Answer({})


def answer_more_than_is_allowed(_: BinaryIO, __: Budget) -> Answer:
    return Answer({}, [np.zeros(10_000_000, np.uint8)])


def answer_rubbish(_: BinaryIO, __: Budget, *, content: str) -> Answer:
    os.write(ANSWER, bytes.fromhex(content))
    os._exit(0)


def answer_for_ever(_: BinaryIO, __: Budget) -> Answer:
    os.write(ANSWER, (60_000).to_bytes(4, "little"))
    while True:
        os.write(ANSWER, b" " * 64)
        time.sleep(0.05)


def echo(file: BinaryIO, __: Budget) -> Answer:
    """What a good function does."""
    content = np.frombuffer(file.read(), np.uint8)
    return Answer({"length": len(content)}, [content])
