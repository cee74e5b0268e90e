"""The sandbox of the decoders: what a function in it cannot do, and what becomes of the worker."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from avatar_client.contract.job_errors import WorkerFailedError
from tests.support.waiting import AT_ONCE_SECONDS, wait_until
from worker.media.sandbox import Decoded, Failure, Sandbox, SandboxError
from worker.media.sandbox_process import Limits

MEGABYTE = 2**20
LIMITS = Limits(5.0, 200 * MEGABYTE, 5.0, 200 * MEGABYTE, answer_bytes=MEGABYTE)
QUICK = Limits(0.5, 200 * MEGABYTE, 0.5, 200 * MEGABYTE, answer_bytes=MEGABYTE)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox("worker.media.decoders")
    yield made
    made.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[BinaryIO]:
    path = tmp_path / "input"
    path.write_bytes(b"a client's bytes")
    with path.open("rb") as opened:
        yield opened


def go_on() -> None:
    """The job is not stopped."""


def run(
    sandbox: Sandbox,
    function: str,
    file: BinaryIO,
    limits: Limits = LIMITS,
    check: Callable[[], None] = go_on,
    **arguments: Any,
) -> Decoded | Failure:
    return sandbox.run(f"tests.security.hostile:{function}", file, arguments, limits, check)


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


def require_nothing_left(sandbox: Sandbox) -> None:
    """The template has no child, not even one that has ended."""
    assert sandbox.template_pid is not None
    assert children_of(sandbox.template_pid) == []


REFUSALS = [
    *("PermissionError", "not permitted", "Too many open files", "Bad file descriptor"),
    "not allowed to raise maximum limit",
]


def test_a_function_gets_the_file_and_answers(sandbox: Sandbox, file: BinaryIO) -> None:
    answer = run(sandbox, "echo", file)
    assert isinstance(answer, Decoded)
    assert answer.facts == {"length": 16}
    assert answer.arrays[0].tobytes() == b"a client's bytes"
    require_nothing_left(sandbox)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("write_file", {"path": "{tmp}/new"}),
        ("write_file", {"path": "{tmp}/input"}),
        ("write_to_what_is_open", {}),
        ("read_file", {"path": "/etc/passwd"}),
        ("read_by_old_call", {"path": "/etc/passwd"}),
        ("open_socket", {}),
        ("open_pipe", {}),
        ("fork", {}),
        ("run_program", {}),
        ("become_program", {}),
        ("end_the_worker", {"worker": "{pid}"}),
        ("raise_own_limits", {}),
    ],
)
def test_a_function_can_neither_write_read_call_nor_multiply(
    sandbox: Sandbox, file: BinaryIO, tmp_path: Path, function: str, arguments: dict[str, Any]
) -> None:
    if "path" in arguments:
        arguments = {"path": arguments["path"].format(tmp=tmp_path)}
    if "worker" in arguments:
        arguments = {"worker": os.getpid()}
    answer = run(sandbox, function, file, **arguments)
    assert isinstance(answer, Failure)
    assert any(words in answer.message for words in REFUSALS), answer.message
    assert [path.name for path in tmp_path.iterdir()] == ["input"]
    assert (tmp_path / "input").read_bytes() == b"a client's bytes"
    require_nothing_left(sandbox)


def test_a_function_sees_no_secret_and_no_other_descriptor(
    monkeypatch: pytest.MonkeyPatch, file: BinaryIO
) -> None:
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "marked")
    with tempfile.TemporaryFile() as secret:
        os.set_inheritable(secret.fileno(), True)
        sandbox = Sandbox("worker.media.decoders")
        answer = run(sandbox, "tell_all", file)
        sandbox.close()
    assert isinstance(answer, Decoded)
    assert "marked" not in str(answer.facts)
    assert answer.facts["descriptors"] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("spin", "too long"),
        ("sleep", "too long"),
        ("answer_for_ever", "too long"),
        ("take_memory", "too much memory"),
        ("crash", "decoder fail"),
        ("answer_more_than_is_allowed", "decoder fail"),
    ],
)
def test_a_function_that_takes_too_much_is_given_up_and_the_next_is_served(
    sandbox: Sandbox, file: BinaryIO, function: str, words: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(SandboxError, match=words):
        run(sandbox, function, file, QUICK)
    assert time.monotonic() - begun < AT_ONCE_SECONDS
    require_nothing_left(sandbox)
    assert isinstance(run(sandbox, "echo", file), Decoded)


RUBBISH = [
    "",
    "00",
    "ffffffff",
    "01000000" + b"x".hex(),
    "04000000" + b"null".hex(),
    *(
        len(text).to_bytes(4, "little").hex() + text.hex()
        for text in (
            b'{"facts": {"a": {"b": 1}}}',
            b'{"facts": {"a": NaN}}',
            b'{"arrays": [{"dtype": "object", "shape": [1]}]}',
            b'{"arrays": [{"dtype": "uint8", "shape": [-1]}]}',
            b'{"arrays": [{"dtype": "uint8", "shape": [1000000, 1000000]}]}',
            b'{"arrays": [{"dtype": "uint8", "shape": [true]}]}',
            b'{"arrays": [{"dtype": "uint8", "shape": [8]}]}',
            b'{"failed": 7}',
            b'{"failed": "X", "message": "' + b"x" * 4000 + b'"}',
            b"[" * 50_000,
            b'{"' + b"\xff" + b'": 1}',
        )
    ),
]


@pytest.mark.parametrize("content", RUBBISH, ids=range(len(RUBBISH)))
def test_an_answer_that_is_none_is_a_failure_of_the_file(
    sandbox: Sandbox, file: BinaryIO, content: str
) -> None:
    with pytest.raises(SandboxError, match="decoder fail"):
        run(sandbox, "answer_rubbish", file, content=content)
    require_nothing_left(sandbox)


def test_memory_past_the_heap_is_limited_too(sandbox: Sandbox, file: BinaryIO) -> None:
    answer = run(sandbox, "take_memory_for_good", file)
    assert isinstance(answer, Failure)
    assert "Cannot allocate memory" in answer.message
    assert sandbox.peak_bytes < 400 * MEGABYTE


def test_a_stop_ends_the_process(sandbox: Sandbox, file: BinaryIO) -> None:
    class StoppedError(Exception):
        pass

    begun = time.monotonic()

    def check() -> None:
        if time.monotonic() - begun > 0.3:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(sandbox, "sleep", file, Limits(60.0, MEGABYTE, 60.0, MEGABYTE, 0), check)
    assert time.monotonic() - begun < AT_ONCE_SECONDS
    require_nothing_left(sandbox)


def test_a_template_that_has_ended_is_started_anew(sandbox: Sandbox, file: BinaryIO) -> None:
    assert isinstance(run(sandbox, "echo", file), Decoded)
    first = sandbox.template_pid
    assert first is not None
    os.kill(first, 9)
    assert isinstance(run(sandbox, "echo", file), Decoded)
    assert sandbox.template_pid not in (None, first)

    def end_it() -> None:
        time.sleep(0.5)
        assert sandbox.template_pid is not None
        os.kill(sandbox.template_pid, 9)

    ender = threading.Thread(target=end_it)
    ender.start()
    with pytest.raises(SandboxError, match="too long"):
        run(sandbox, "spin", file, Limits(2.0, MEGABYTE, 2.0, MEGABYTE, 0))
    ender.join()


def test_a_template_that_does_not_start_is_our_fault(file: BinaryIO) -> None:
    sandbox = Sandbox("worker.media.no_such_module")
    with pytest.raises(WorkerFailedError) as failure:
        run(sandbox, "echo", file)
    assert failure.value.retryable
    sandbox.close()


@pytest.mark.slow
def test_hundreds_of_files_leave_nothing_behind(sandbox: Sandbox, file: BinaryIO) -> None:
    def descriptors(pid: int) -> int:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    run(sandbox, "echo", file)
    template = sandbox.template_pid
    assert template is not None
    before = (descriptors(os.getpid()), descriptors(template), children_of(os.getpid()))
    for number in range(300):
        file.seek(0)
        answer = run(sandbox, "echo" if number % 10 else "fork", file)
        assert isinstance(answer, Decoded | Failure)
    assert descriptors(os.getpid()) <= before[0]
    wait_until(lambda: descriptors(template) <= before[1])  # it may still close the last one
    assert children_of(os.getpid()) == before[2]
    assert sandbox.template_pid == template
    require_nothing_left(sandbox)


def test_the_end_of_the_worker_ends_the_template(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import os, sys; from worker.media.sandbox import Sandbox; "
        "s = Sandbox('worker.media.decoders'); s.start(); "
        "print(s.template_pid, flush=True); sys.stdin.read(1); os._exit(1)"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    template = int(process.stdout.readline())
    assert Path(f"/proc/{template}").exists()
    process.communicate(b"x")
    wait_until(lambda: not Path(f"/proc/{template}").exists())
