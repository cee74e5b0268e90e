"""The walls of the sandbox, which a process puts up around itself and cannot take down.

Two of them keep it from files and sockets: no file descriptor is left to it (every kernel, root or
not), and a seccomp filter allows only the system calls of a computation (Linux on x86-64 and
arm64; needs no privilege). docs/decisions/sandbox.md says what each holds.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522

# Of a seccomp_data: the number of the call, the architecture, the low half of the first argument.
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, JUMP_IF_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000  # FAIL with an errno in the low bits
X32_BIT = 0x40000000  # another numbering of the same calls
CLONE_THREAD = 0x10000

# Memory, time, threads, the files that are open, and its own end: (x86-64, arm64).
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "mremap": (25, 216), "madvise": (28, 233),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "getpid": (39, 172), "gettid": (186, 178),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "getrusage": (98, 165),
    "setitimer": (38, 103), "getrandom": (318, 278), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
CLONE, CLONE3, PRLIMIT = (56, 220), (435, 435), (302, 261)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def drop_everything(num_files: int) -> None:
    """Puts up all walls; only the first `num_files` descriptors stay open.

    Raises:
        OSError: one that every machine has could not be put up.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    os.closerange(num_files, 2**16)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, num_files))
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.capset(struct.pack("<Ii", CAPABILITY_VERSION_3, 0), bytes(24))  # root keeps no powers
    if not _filter_calls(libc):
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # where it is not root, no fork then


def filters_calls() -> bool:
    """Whether this machine has the wall of system calls; for the log. Forks a process to see."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os._exit(0 if _filter_calls(ctypes.CDLL(None, use_errno=True)) else 1)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def end_with_parent() -> None:
    """Has the kernel kill this process when the one that forked it ends, and kill it first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


def _filter_calls(libc: ctypes.CDLL) -> bool:
    """Refuses every other system call from now on; False if the kernel cannot."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return False
    column, architecture = ARCHITECTURES[platform.machine()]
    refuse = (RETURN, 0, 0, FAIL | errno.EPERM)
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_AT_LEAST, 0, 1, X32_BIT),
        refuse,
        # the C library falls back to clone, whose flags can be seen
        (JUMP_IF_EQUAL, 0, 1, CLONE3[column]),
        (RETURN, 0, 0, FAIL | errno.ENOSYS),
        (JUMP_IF_EQUAL, 0, 4, CLONE[column]),
        (LOAD, 0, 0, ARGUMENT),
        (JUMP_IF_BITS, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW),
        refuse,
        (JUMP_IF_EQUAL, 0, 4, PRLIMIT[column]),
        (LOAD, 0, 0, ARGUMENT),
        (JUMP_IF_EQUAL, 0, 1, 0),  # this process, whose hard limits stay
        (RETURN, 0, 0, ALLOW),
        refuse,
    ]
    for numbers in ALLOWED.values():
        program += [(JUMP_IF_EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ALLOW)]
    program.append(refuse)
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    instructions = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(instructions))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    answer: int = libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)
    return answer == 0
