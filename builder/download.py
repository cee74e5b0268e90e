"""Fetches the published files that a variant is made of, each checked against its hash.

    python -m builder.download --variant bf16|fp8 --revision COMMIT --target DIR [--token-file FILE]

The revision may stand in `weights.toml` instead.

What an interrupted run has fetched is kept, also of a file that it was in the middle of; therefore
the bytes are streamed here, and only the listing, the session and the errors are huggingface_hub's:
version 2 of it begins such a file again. A failure is one line, and its exit code says its kind:

    1 other   2 wrong arguments   3 access denied   4 not published   5 no connection
    6 wrong content   7 disk full
"""

import argparse
import errno
import hashlib
import json
import logging
import re
import shutil
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from huggingface_hub import HfApi, ModelInfo, constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from worker import atomic_file
from worker.loading import manifest

logger = logging.getLogger("builder.download")  # __name__ is __main__ on the command line

Variant = Literal["bf16", "fp8"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
MAX_PARALLEL = 8  # files
SPARE_BYTES = 64 * 2**20  # left free on the disk
PROGRESS_SECONDS = 10.0
LISTING_TIMEOUT_SECONDS = 30.0
# Waits before the next attempt, where not a byte has come since the last one.
WAITS_SECONDS: Sequence[float] = (1, 2, 5, 10, 20)
TRANSIENT_STATUS = (408, 429)  # and all from 500

T = TypeVar("T")


class BuildError(Exception):
    """A step of the build that failed: one line, with what to do about it."""

    exit_code = 1


class NoRevisionError(BuildError):
    """Nothing says which commit is meant."""

    exit_code = 2


class AccessDeniedError(BuildError):
    """The hub does not give the files to this account, or to nobody in particular."""

    exit_code = 3


class NotPublishedError(BuildError):
    """The repository, its revision or a file is not there."""

    exit_code = 4


class ConnectionLostError(BuildError):
    """The hub does not answer, or not any more."""

    exit_code = 5


class WrongContentError(BuildError):
    """A file is not the one that is asked for."""

    exit_code = 6


class DiskFullError(BuildError):
    """The target's disk is too small."""

    exit_code = 7


class _CutError(Exception):
    """The answer ended before the file did."""


class _StoppedError(Exception):
    """Another file has failed."""


@dataclass(frozen=True)
class WantedFile:
    """A file as `weights.toml` names it."""

    path: str
    variants: Sequence[Variant] = VARIANTS
    optional: bool = False
    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Upstream:
    """What `weights.toml` says."""

    repository: str
    licence: str
    notice: str
    files: tuple[WantedFile, ...]
    revision: str | None = None  # a commit


@dataclass(frozen=True)
class PublishedFile:
    """A file as the hub lists it."""

    path: str
    size_bytes: int
    sha256: str | None  # what the content must have; None: only git's hash is known
    git_sha1: str

    def require(self, path: Path) -> dict[str, Any]:
        """Size and sha256 of the file on the disk.

        Raises:
            WrongContentError: it is another one.
        """
        entry = manifest.describe(path)
        if entry["size_bytes"] != self.size_bytes:
            fault = f"{entry['size_bytes']} bytes instead of {self.size_bytes}"
        elif self.sha256 not in (None, entry["sha256"]):
            fault = f"the sha256 {entry['sha256']} instead of {self.sha256}"
        elif self.sha256 is None and self.git_sha1 != (found := _git_sha1(path)):
            fault = f"git's hash {found} instead of {self.git_sha1}"
        else:
            return entry
        raise WrongContentError(
            f"{self.path} has {fault}: the hub, or a proxy before it, serves another file; try "
            "again later, or without the proxy"
        )


@dataclass(frozen=True)
class Listing:
    """The files of one commit that a variant needs."""

    repository: str
    commit: str
    files: tuple[PublishedFile, ...]


class Lock:
    """What the first download has found and every later one must find: a file beside the target."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f"{target.name}.lock.json")
        content = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.commit: str | None = content.get("commit")
        self.files: dict[str, dict[str, Any]] = content.get("files", {})
        self._writing = threading.Lock()

    def pin(self, commit: str) -> None:
        """Records the commit of the files."""
        self.commit = commit
        self._write()

    def record(self, path: str, entry: dict[str, Any]) -> None:
        """Records size and sha256 of a file that was checked."""
        with self._writing:
            self.files[path] = entry
            self._write()

    def _write(self) -> None:
        content = {"commit": self.commit, "files": self.files}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        atomic_file.write_text(self.path, text, durable=True)


def read_upstream() -> Upstream:
    """The content of `weights.toml`."""
    content = tomllib.loads(Path(__file__).with_name("weights.toml").read_text())
    files = tuple(WantedFile(**entry) for entry in content.pop("files"))
    return Upstream(**content, files=files)


def read_token(path: Path | None) -> str | None:
    """The token in a build secret's file; None leaves it to huggingface_hub (`HF_TOKEN`)."""
    if path is None:
        return None
    if not path.is_file():
        logger.info("no token in %s: downloading without one", path)
        return None
    return path.read_text().strip() or None


def resolve(variant: Variant, lock: Lock, token: str | None, revision: str | None) -> Listing:
    """What the hub has of the variant's files. Pins the commit in the lock.

    Args:
        revision: a commit; None: that of `weights.toml`, or of the lock.

    Raises:
        BuildError: there is no revision; a file is not published, or is not the one that is pinned
            or locked.
    """
    upstream = read_upstream()
    revision = revision or upstream.revision or lock.commit
    info = _model_info(upstream.repository, revision or "main", token)
    assert info.sha is not None
    if revision is None:
        raise NoRevisionError(
            f"{upstream.repository}: no revision is given; main is at {info.sha} now: pass "
            f"--revision {info.sha}, or pin it in builder/weights.toml"
        )
    files = _listed(upstream, info, variant, lock)
    lock.pin(info.sha)
    return Listing(upstream.repository, info.sha, files)


def _model_info(repository: str, revision: str, token: str | None) -> ModelInfo:
    ask = partial(
        HfApi(token=token).model_info,
        repository,
        revision=revision,
        files_metadata=True,
        timeout=LISTING_TIMEOUT_SECONDS,
    )
    return _retry(f"{repository} at {revision}", ask)


def _listed(
    upstream: Upstream, info: ModelInfo, variant: Variant, lock: Lock
) -> tuple[PublishedFile, ...]:
    """The variant's files as they are published."""
    published = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    files = []
    for wanted in upstream.files:
        if variant not in wanted.variants:
            continue
        sibling = published.get(wanted.path)
        if sibling is not None:
            assert sibling.size is not None  # as is asked for by files_metadata
            assert sibling.blob_id is not None
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            found = PublishedFile(wanted.path, sibling.size, sha256, sibling.blob_id)
            files.append(_as_recorded(found, wanted, lock))
        elif wanted.optional:
            logger.warning("%s is not published, and left out", wanted.path)
        else:
            raise NotPublishedError(
                f"{upstream.repository} has no file {wanted.path} at {info.sha}: pin a revision "
                "that has it, or correct the path, in builder/weights.toml"
            )
    return tuple(files)


def download(
    listing: Listing, files: Sequence[PublishedFile], target: Path, lock: Lock, token: str | None
) -> None:
    """Brings these files of the listing into the target, and records them in the lock.

    Raises:
        BuildError: why not all of them are there. Those that are, are whole.
    """
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
    total_bytes = sum(file.size_bytes for file in files)
    measure = partial(_present_bytes, target, files)
    require_space(target, total_bytes - measure())
    fetcher = _Fetcher(listing, target, lock, token)
    with _progress(measure, total_bytes), ThreadPoolExecutor(MAX_PARALLEL) as pool:
        futures = [pool.submit(fetcher.ensure, file) for file in files]
        try:
            with disk_errors(target):
                for future in as_completed(futures):
                    future.result()
        except BaseException:
            fetcher.stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def require_space(directory: Path, needed_bytes: int) -> None:
    """Raises DiskFullError unless the disk has room for so much more."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes + SPARE_BYTES:
        raise DiskFullError(
            f"the disk of {directory} has {free_bytes / 1e9:.1f} GB free and "
            f"{(needed_bytes + SPARE_BYTES) / 1e9:.1f} GB are needed: make room, or choose another"
        )


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Raises BuildError where writing below the directory fails, DiskFullError if it is full."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"the disk of {directory} is full: make room and run the same command again"
            ) from error
        raise BuildError(f"{directory} cannot be written: {error}") from error


class _Fetcher:
    """Fetches the files of one commit, in several threads until `stop` is set."""

    def __init__(self, listing: Listing, target: Path, lock: Lock, token: str | None) -> None:
        self.stop = threading.Event()
        self._listing = listing
        self._target = target
        self._lock = lock
        self._endpoint = HfApi().endpoint
        # compressed, a file could not be taken up in its middle
        self._headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}

    def ensure(self, file: PublishedFile) -> None:
        """The file, whole and checked; what an earlier run has left of it is used."""
        path, part = self._target / file.path, _part(self._target, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            path.replace(part)  # checked like the rest
        left_over = part.is_file()
        while True:
            self._complete(file, part)
            try:
                entry = file.require(part)
                break
            except WrongContentError as error:
                part.unlink()
                if not left_over:
                    raise
                logger.warning("%s. It is from an earlier run, and fetched anew.", error)
                left_over = False
        atomic_file.publish(part, path, durable=True)
        self._lock.record(file.path, entry)
        logger.info("%s is there", file.path)

    def _complete(self, file: PublishedFile, part: Path) -> None:
        part.touch()
        if part.stat().st_size < file.size_bytes:
            attempt = partial(self._append, file, part)
            _retry(file.path, attempt, lambda: part.stat().st_size, self.stop)

    def _append(self, file: PublishedFile, part: Path) -> None:
        """Adds what the part lacks."""
        present_bytes = part.stat().st_size
        url = hf_hub_url(
            self._listing.repository,
            file.path,
            revision=self._listing.commit,
            endpoint=self._endpoint,
        )
        with (
            get_session().stream(
                "GET",
                url,
                headers=self._headers
                | ({"Range": f"bytes={present_bytes}-"} if present_bytes else {}),
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            ) as response,
            part.open("ab") as content,
        ):
            hf_raise_for_status(response)
            if present_bytes and response.status_code != 206:  # the server sends all of it
                content.truncate(0)
            for chunk in response.iter_bytes():  # as they come: nothing is lost in a cut
                if self.stop.is_set():
                    raise _StoppedError
                if content.tell() + len(chunk) > file.size_bytes:
                    raise WrongContentError(
                        f"{file.path} goes on after its {file.size_bytes} bytes: the hub, or a "
                        "proxy before it, serves another file; try again later, or without it"
                    )
                content.write(chunk)
        if part.stat().st_size < file.size_bytes:
            raise _CutError("the answer ended early")


def _retry(
    what: str,
    attempt: Callable[[], T],
    measure: Callable[[], int] = lambda: 0,
    stop: threading.Event | None = None,
) -> T:
    """The result of the attempt, which is repeated while the connection is at fault.

    Args:
        what: a file or a repository, for the messages.
        measure: how far it has come; each gain renews the patience.
    """
    reached, waits = measure(), iter(WAITS_SECONDS)
    while True:
        try:
            return attempt()
        except OfflineModeIsEnabled as error:
            raise ConnectionLostError(
                f"{what}: HF_HUB_OFFLINE is set: run with HF_HUB_OFFLINE=0"
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status < 500 and status not in TRANSIENT_STATUS:
                raise _refusal(what, status) from error
            problem = f"HTTP {status}"
        except (HTTPError, _CutError) as error:
            problem = str(error) or type(error).__name__
        if measure() > reached:
            reached, waits = measure(), iter(WAITS_SECONDS)
        wait_seconds = next(waits, None)
        if wait_seconds is None:
            raise ConnectionLostError(
                f"{what}: {problem}, {len(WAITS_SECONDS) + 1} times in a row: check the network, "
                "then run the same command again; it goes on from here"
            )
        logger.warning("%s: %s; trying again in %g s", what, problem, wait_seconds)
        if stop is None:
            time.sleep(wait_seconds)
        elif stop.wait(wait_seconds):
            raise _StoppedError


def _refusal(what: str, status: int) -> BuildError:
    if status in (401, 403):
        return AccessDeniedError(
            f"{what}: access denied (HTTP {status}): accept the licence on the repository's page, "
            "then give a token of that account that may read it (--token-file or HF_TOKEN)"
        )
    if status == 404:
        return NotPublishedError(
            f"{what}: not found (HTTP 404): check repository, revision and path in "
            "builder/weights.toml"
        )
    return BuildError(f"{what}: the hub answers HTTP {status}")


def _as_recorded(file: PublishedFile, wanted: WantedFile, lock: Lock) -> PublishedFile:
    """The file with the hash that is pinned or locked, if there is one.

    Raises:
        WrongContentError: the hub has another one.
    """
    locked = lock.files.get(file.path, {})
    for where, size_bytes, sha256 in (
        ("builder/weights.toml", wanted.size_bytes, wanted.sha256),
        (str(lock.path), locked.get("size_bytes"), locked.get("sha256")),
    ):
        if size_bytes not in (None, file.size_bytes) or (
            sha256 and file.sha256 not in (None, sha256)
        ):
            raise WrongContentError(
                f"{file.path} was changed on the hub: {where} knows another one; if the change is "
                "wanted, correct the entry there"
            )
    return PublishedFile(
        file.path,
        file.size_bytes,
        file.sha256 or wanted.sha256 or locked.get("sha256"),
        file.git_sha1,
    )


def _part(target: Path, file: PublishedFile) -> Path:
    return target / f"{file.path}.part"


def _present_bytes(target: Path, files: Sequence[PublishedFile]) -> int:
    """How much of the files is there."""
    total = 0
    for file in files:
        for path in (target / file.path, _part(target, file)):
            if path.is_file():
                total += min(path.stat().st_size, file.size_bytes)
    return total


@contextmanager
def _progress(measure: Callable[[], int], total_bytes: int) -> Iterator[None]:
    """Logs now and then how far it has come."""
    done = threading.Event()
    begun, at_first = time.monotonic(), measure()

    def report() -> None:
        while not done.wait(PROGRESS_SECONDS):
            present = measure()
            rate = (present - at_first) / (time.monotonic() - begun)
            logger.info("%.2f of %.2f GB, %.0f MB/s", present / 1e9, total_bytes / 1e9, rate / 1e6)

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()


def _git_sha1(path: Path) -> str:
    """The hash by which git, and the hub, knows a small file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is downloaded, and as whom."""
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument(
        "--revision",
        type=_commit,
        help="the commit of the published repository; without it, or where it is empty, that of "
        "builder/weights.toml",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        help="holds a token of the Hugging Face hub, for example a build secret; without it "
        "HF_TOKEN counts",
    )


def _commit(text: str) -> str | None:
    """The commit that the argument names; None if it is empty, as a build's argument may be."""
    if text and not re.fullmatch("[0-9a-f]{40}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no commit, which has 40 hexadecimal digits")
    return text or None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m builder.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--target", type=Path, required=True, help="the directory to fill")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("builder").setLevel(logging.INFO)
    target = arguments.target.resolve()
    try:
        lock = Lock(target)
        token = read_token(arguments.token_file)
        listing = resolve(arguments.variant, lock, token, arguments.revision)
        download(listing, listing.files, target, lock, token)
    except BuildError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
